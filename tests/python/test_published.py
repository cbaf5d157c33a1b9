"""Checkpoints whose experts are not quantized, as transformers publishes each family's."""

import json

import pytest
import torch
from checkpoint_tools import a_call, edit_config, edit_tensors, first_layer, write_small
from safetensors.torch import load_file, save_file

import cpumoe
from cpumoe.checkpoint import CheckpointError, UnsupportedFormatError, open_checkpoint
from cpumoe.formats import weight_format
from cpumoe.models import MODELS, find_model
from cpumoe.reference import experts_forward

PUBLISHED = [spec.name for spec in MODELS if spec.layout == "published"]
# A family for each layout, activation, and place of the layers in a greater model.
FAMILIES = [
    "aria",
    "deepseek_v4",
    "diffusion_gemma",
    "gemma4",
    "glm4v_moe",
    "glm5_next",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "hy_v4",
    "inkling",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax_m2",
    "minimax_m3_vl",
    "mistral_large4",
    "nemotron_h",
    "olmoe",
    "openai_privacy_filter",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_vl_moe",
]
EXPERTS = "model.layers.0.mlp.experts"


def dense(matrix):
    return weight_format("bf16").dequantize(matrix.codes, matrix.scales)


def stored(folder):
    return load_file(folder / "model.safetensors")


def change(folder, name, function):
    edit_tensors(folder, {name: function(stored(folder)[name])})


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_those_of_the_hosts_model(tmp_path, family):
    families = pytest.importorskip("families")
    from cpumoe.integrations.transformers.activation import module_activation

    model = families.tiny_model(family).bfloat16()
    model.save_pretrained(tmp_path)
    reader = open_checkpoint(tmp_path)
    assert (reader.format, reader.unsupported) == ("bf16", ())
    modules = dict(families.experts_modules(model))
    assert reader.layers() == sorted(modules)
    stored_bytes = sum(
        reader.folder.info(name).nbytes
        for names in reader.tensor_names().values()
        for name in names
    )
    assert stored_bytes == 2 * sum(p.numel() for m in modules.values() for p in m.parameters())
    for layer, module in modules.items():
        reader.check_layer(layer)
        assert reader.activation == module_activation(module)
        for index in (0, families.EXPERTS - 1):
            expert = reader.expert(layer, index)
            gate, up, down = families.expert_weights(module, index)
            assert torch.equal(dense(expert.gate), gate)
            assert torch.equal(dense(expert.up), up)
            assert torch.equal(dense(expert.down), down)
            assert (expert.gate_bias is not None) == module.has_bias
            if module.has_bias:
                gate, up = families.halves(module, module.gate_up_proj_bias[index])
                assert torch.equal(expert.gate_bias, gate)
                assert torch.equal(expert.up_bias, up)
                assert torch.equal(expert.down_bias, module.down_proj_bias[index])


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_bf16_model_of_the_registry_is_written_read_and_computed(tmp_path, model):
    spec = find_model(model)
    write_small(tmp_path, model, experts=4, top_k=3)
    reader = open_checkpoint(tmp_path)
    assert reader.layers() == [spec.first_moe_layer, spec.first_moe_layer + 1]
    assert reader.activation == spec.activation
    assert (reader.format, reader.model_type) == ("bf16", spec.model_type)
    layer = first_layer(tmp_path)
    call = a_call()
    actual = cpumoe.Experts.from_checkpoint(reader, layer, isa="generic", progress=False)(*call)
    experts = [reader.expert(layer, index) for index in range(4)]
    expected = experts_forward(
        *call, *([getattr(e, name) for e in experts] for name in ("gate", "up", "down")),
        format="bf16", activation=spec.activation,
    )  # fmt: skip
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_tensors_of_each_projection_are_read_as_stored(qwen3):
    expert, tensors = open_checkpoint(qwen3).expert(0, 1), stored(qwen3)
    for name in ("gate", "up", "down"):
        codes = getattr(expert, name).codes
        assert torch.equal(codes, tensors[f"{EXPERTS}.1.{name}_proj.weight"])


@pytest.fixture
def qwen3(tmp_path):
    return write_small(tmp_path, "Qwen3-30B-A3B")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_in_other_floats_are_read_if_they_are_bf16_numbers(qwen3, dtype):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    change(qwen3, name, lambda w: w.to(torch.float16).to(torch.bfloat16))  # no tiny numbers
    expected = stored(qwen3)[name]
    change(qwen3, name, lambda w: w.to(dtype))
    reader = open_checkpoint(qwen3)
    reader.check_layer(1)
    codes = reader.expert(1, 2).up.codes
    assert codes.dtype == torch.bfloat16
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_that_need_more_bits_are_refused_by_name(qwen3, dtype):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    weights = torch.ones(96, 64, dtype=dtype)
    weights[5, 7] = 1 + 2**-10
    weights[6, 0] = torch.nan
    edit_tensors(qwen3, {name: weights})
    message = (
        rf"^{name}: expected weights that are bf16 numbers, got float\d\d with 2 of 6144 that are "
        r"not, such as 1.0009765625; cpumoe does not round weights: convert the checkpoint"
    )
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(qwen3).expert(1, 2)
    with pytest.raises(UnsupportedFormatError, match=message):
        cpumoe.Experts.from_checkpoint(qwen3, 1)


def in_fp16(folder):
    """Rewrites all tensors of a checkpoint in fp16."""
    save_file({n: t.half() for n, t in stored(folder).items()}, folder / "model.safetensors")


def test_fp16_experts_are_read_as_stored_and_computed(qwen3):
    in_fp16(qwen3)
    reader = open_checkpoint(qwen3)
    assert (reader.format, reader.unsupported) == ("fp16", ())
    reader.check_layer(0)
    name = f"{EXPERTS}.1.up_proj.weight"
    assert torch.equal(reader.expert(0, 1).up.codes, stored(qwen3)[name])
    call = a_call()
    actual = cpumoe.Experts.from_checkpoint(qwen3, 0, isa="generic", progress=False)(*call)
    experts = [reader.expert(0, index) for index in range(3)]
    expected = experts_forward(
        *call, *([getattr(e, name) for e in experts] for name in ("gate", "up", "down")),
        format="fp16",
    )  # fmt: skip
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_a_tensor_in_another_dtype_among_fp16_ones_is_named(qwen3):
    in_fp16(qwen3)
    change(qwen3, NAME, lambda w: w.bfloat16())
    with pytest.raises(CheckpointError, match=f"{NAME}: expected float16 .*, got bfloat16"):
        open_checkpoint(qwen3).check_layer(0)


NAME = f"{EXPERTS}.2.down_proj.weight"
ACCEPTED = "expected bfloat16 or float16 or float32"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "no such tensor in "),
        (
            torch.ones(64, 95, dtype=torch.bfloat16),
            rf"{ACCEPTED} \[64, 96\], got bfloat16 \[64, 95\]",
        ),
        (
            torch.ones(64, 96, dtype=torch.int8),
            rf"{ACCEPTED} \[64, 96\], got int8 \[64, 96\]",
        ),
    ],
)
def test_damaged_tensors_are_named(qwen3, tensor, message):
    edit_tensors(qwen3, {NAME: tensor})
    reader = open_checkpoint(qwen3)
    reader.expert(0, 1)
    with pytest.raises(CheckpointError, match=f"{NAME}: {message}"):
        reader.check_layer(0)
    with pytest.raises(CheckpointError, match=f"{NAME}: {message}"):
        reader.expert(0, 2)


@pytest.mark.parametrize("index", [0, 2])
def test_a_missing_gate_is_a_missing_tensor(qwen3, index):
    name = f"model.layers.1.mlp.experts.{index}.gate_proj.weight"
    edit_tensors(qwen3, {name: None})
    with pytest.raises(CheckpointError, match=f"^{name}: no such tensor in "):
        open_checkpoint(qwen3).check_layer(1)


def test_an_expert_without_any_tensor_is_named_in_its_own_layout(tmp_path):
    write_small(tmp_path, "Mixtral-8x7B")
    names = [n for n in stored(tmp_path) if ".layers.0." in n and ".experts.2." in n]
    edit_tensors(tmp_path, dict.fromkeys(names))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w1\.weight: no such tensor"):
        open_checkpoint(tmp_path).expert(0, 2)


def test_biases_are_read_if_there_are_all_and_missed_if_there_are_some(qwen3):
    sizes = {"gate": 96, "up": 96, "down": 64}
    biases = {
        f"model.layers.{layer}.mlp.experts.{index}.{name}_proj.bias": torch.randn(n).bfloat16()
        for layer in (0, 1) for index in range(3) for name, n in sizes.items()
    }  # fmt: skip
    edit_tensors(qwen3, biases)
    reader = open_checkpoint(qwen3)
    reader.check_layer(0)
    expert = reader.expert(0, 1)
    for name in sizes:
        assert torch.equal(getattr(expert, f"{name}_bias"), biases[f"{EXPERTS}.1.{name}_proj.bias"])
    assert cpumoe.Experts.from_checkpoint(qwen3, 0).export(1).gate_bias is not None
    edit_tensors(qwen3, {name: None for name in biases if ".down_proj." in name})
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}\.0\.down_proj\.bias: no such tensor"):
        open_checkpoint(qwen3).check_layer(0)


def test_experts_without_a_gate_are_refused(qwen3):
    edit_tensors(qwen3, {n: None for n in stored(qwen3) if n.endswith("gate_proj.weight")})
    message = r"bf16 experts: experts without a gate projection are not supported: .*down_proj"
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(qwen3).check_supported()


def test_experts_with_tensors_that_no_layout_has_are_refused(qwen3):
    name = "model.layers.0.mlp.experts.1.post_norm.weight"
    edit_tensors(qwen3, {name: torch.ones(64)})
    message = f"bf16 experts: experts with {name} are not supported"
    with pytest.raises(UnsupportedFormatError, match=message):
        open_checkpoint(qwen3).check_supported()


def test_dense_layers_shared_experts_and_later_layers_are_none_of_the_experts(tmp_path):
    write_small(tmp_path, "GLM-4.5-Air")
    names = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.3.mlp.experts.0.up_proj.weight",  # multi-token prediction
    )
    edit_tensors(tmp_path, {name: torch.ones(96, 64).bfloat16() for name in names})
    reader = open_checkpoint(tmp_path)
    assert reader.layers() == [1, 2]
    reader.check_layer(1)


def test_a_layer_in_another_format_leaves_the_checkpoint_to_other_readers(qwen3):
    scales = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    edit_tensors(qwen3, {scales: torch.ones(96, 1)})
    assert open_checkpoint(qwen3).unsupported
    edit_config(qwen3, quantization_config={"quant_method": "fp8"})
    reader = open_checkpoint(qwen3)
    assert [reader.layer_format(layer) for layer in (0, 1)] == ["bf16", "fp8"]
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight_scale_inv: no such"):
        reader.check_layer(1)


def test_experts_that_a_quantized_checkpoint_leaves_unquantized_are_read(qwen3):
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
        "ignore": ["re:.*experts.*"],
    }
    edit_config(qwen3, quantization_config=quantization)
    assert open_checkpoint(qwen3).unsupported == ()
    cpumoe.Experts.from_checkpoint(qwen3, 0)


def fused(folder, *, transposed):
    """Rewrites a checkpoint with a tensor per projection as one with a tensor per layer."""
    tensors, old = {}, stored(folder)
    for layer in (0, 1):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([old[f"{experts}.{i}.{name}_proj.weight"] for i in range(3)])
            for name in ("gate", "up", "down")
        )
        stacks = {"gate_up_proj": torch.cat((gate, up), 1), "down_proj": down}
        for name, stack in stacks.items():
            tensors[f"{experts}.{name}"] = (stack.mT if transposed else stack).contiguous()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 96), (64, 64), (64, 32), (32, 64)])
def test_shapes_tell_whether_stacks_are_transposed(tmp_path, transposed, hidden, inner):
    write_small(tmp_path, "Qwen3-30B-A3B", hidden=hidden, intermediate=inner)
    expected = open_checkpoint(tmp_path).expert(1, 2)
    fused(tmp_path, transposed=transposed)
    reader = open_checkpoint(tmp_path)
    reader.check_layer(1)
    actual = reader.expert(1, 2)
    for name in ("gate", "up", "down"):
        assert torch.equal(dense(getattr(actual, name)), dense(getattr(expected, name)))


def test_a_stack_of_another_shape_is_named(tmp_path):
    write_small(tmp_path, "Qwen3-30B-A3B")
    fused(tmp_path, transposed=True)
    name = "model.layers.0.mlp.experts.down_proj"
    change(tmp_path, name, lambda stack: stack[:, :32])
    message = rf"{ACCEPTED} \[3, 192, 64\], got bfloat16 \[3, 64, 192\]; config"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path).check_layer(0)


def test_the_activation_of_an_unknown_model_has_to_be_named(qwen3):
    path = qwen3 / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "new_moe"}))
    with pytest.raises(UnsupportedFormatError, match="model_type 'new_moe'; pass activation="):
        cpumoe.Experts.from_checkpoint(qwen3, 0)
    cpumoe.Experts.from_checkpoint(qwen3, 0, activation=cpumoe.SwiGLU())
