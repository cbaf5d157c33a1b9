"""Dense layers whose weights a checkpoint stores quantized: packed as stored, never dequantized."""

import json
import sys

import pytest
import tiny_models
import torch
from checkpoint_tools import edit_config, edit_tensors
from dense_tools import our_layers
from moe_tools import PEAK_MEMORY, output_with_torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

import cpumoe
from cpumoe.checkpoint import SafetensorsFolder
from cpumoe.checkpoint.dense_matrices import has_known_blocks, stored_matrix
from cpumoe.formats import weight_format
from cpumoe.integrations.transformers import ExpertsOptions, dense, from_pretrained
from cpumoe.integrations.transformers.loading import from_pretrained_by_host

TOKENS = torch.arange(3, 43)[None]


@pytest.fixture(autouse=True)
def _tiny_layers_count(monkeypatch):
    monkeypatch.setattr(dense, "_LEAST_BYTES", 0)


def load(folder, chosen="native", dtype=torch.float32):
    options = ExpertsOptions(dense=chosen, progress=False)
    return from_pretrained(folder, options=options, dtype=dtype)


def formats(model):
    return {name: layer.format for name, layer in our_layers(model).items()}


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def assert_equal_logits(ours, hosts):
    actual, expected = logits(ours), logits(hosts)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def is_dense(name):
    return "_proj" in name and ".experts." not in name and name.endswith(".weight")


def deepseek_v3(folder, *, one_scale=False):
    """DeepSeek-V3: FP8 experts and dense weights in blocks, or with one scale for a matrix.

    All blocks of a matrix have equal scales, because the host takes ragged blocks for smaller ones.
    """
    tiny_models.kimi(folder, model_type="deepseek_v3", stored="fp8")
    changes = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if is_dense(name):
            codes, grid = tiny_models.fp8_blocks(weight)
            scale = grid.float().amax()
            scales = scale if one_scale else scale.expand(grid.shape).contiguous()
            changes |= {name: codes, f"{name}_scale_inv": scales}
    edit_tensors(folder, changes)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quantization, "modules_to_not_convert": []})
    return folder


def compressed(folder, stored):
    """Qwen3-MoE in a format of compressed-tensors, with dense weights in the experts' format."""
    tiny_models.int4_moe(folder, "qwen3_moe", stored=stored)
    tensors = load_file(folder / "model.safetensors")
    changes = {}
    for name in filter(is_dense, tensors):
        changes |= _quantized(name, tensors[name].float(), stored)
    edit_tensors(folder, changes)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["targets"] = ["Linear"]
    edit_config(folder, quantization_config={**quantization, "ignore": ["lm_head", "re:.*gate$"]})
    return folder


def _quantized(name, weight, stored):
    if stored == "float-quantized":
        rows = 2.0 ** torch.ceil(torch.log2(weight.abs().amax(1, keepdim=True) / 448))
        return {name: (weight / rows).to(torch.float8_e4m3fn), f"{name}_scale": rows.bfloat16()}
    parts = {"pack-quantized": "int4", "mxfp4-pack-quantized": "mxfp4"}
    codes, scales, *factor = weight_format(parts.get(stored, "nvfp4")).quantize(weight)
    if stored == "pack-quantized":
        codes = codes.view(torch.int32)
    found = {name: None, f"{name}_packed": codes, f"{name}_scale": scales}
    if factor:
        found[f"{name}_global_scale"] = 1 / factor[0]
    return found


def test_fp8_layers_of_deepseek_v4_are_exported_bit_for_bit(tmp_path):
    folder = tiny_models.deepseek_v4(tmp_path)
    model = load(folder, dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    names = {
        "model.layers.2.self_attn.q_b_proj": "layers.2.attn.wq_b",
        "model.layers.1.self_attn.compressor.indexer.q_b_proj": "layers.1.attn.indexer.wq_b",
        "model.layers.4.mlp.shared_experts.down_proj": "layers.4.ffn.shared_experts.w2",
    }
    for ours, theirs in names.items():
        matrix = model.get_submodule(ours).export()
        for part, suffix in ((matrix.codes, "weight"), (matrix.scales, "scale")):
            expected = stored[f"{theirs}.{suffix}"]
            assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))
    found = formats(model)
    assert found["model.layers.0.self_attn.o_b_proj"] == "fp8"
    assert found["model.layers.1.self_attn.compressor.kv_proj"] == found["lm_head"] == "bf16"


def test_a_model_with_fp8_layers_has_the_hosts_logits_and_tokens(tmp_path):
    folder = deepseek_v3(tmp_path)
    ours, hosts = load(folder), from_pretrained_by_host(folder, dtype=torch.float32)
    found = formats(ours)
    assert found["model.layers.0.mlp.down_proj"] == "fp8"
    assert found["model.layers.1.self_attn.kv_b_proj"] == "fp8"
    assert_equal_logits(ours, hosts)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(TOKENS, **settings), hosts.generate(TOKENS, **settings))


def test_a_scale_for_the_whole_matrix_serves_each_row(tmp_path):
    folder = deepseek_v3(tmp_path, one_scale=True)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**quantization, "weight_block_size": None})
    tensors = load_file(folder / "model.safetensors")
    experts = [n for n in tensors if ".experts." in n and n.endswith("_scale_inv")]
    edit_tensors(folder, {name: tensors[name].amax() for name in experts})
    ours = load(folder)
    assert formats(ours)["model.layers.0.mlp.down_proj"] == "fp8"
    assert_equal_logits(ours, from_pretrained_by_host(folder, dtype=torch.float32))


@pytest.mark.parametrize(
    ("stored", "fmt"),
    [
        ("pack-quantized", "int4"),
        ("mxfp4-pack-quantized", "mxfp4"),
        ("nvfp4-pack-quantized", "nvfp4"),
        ("float-quantized", "fp8"),
    ],
)
def test_layers_of_compressed_tensors_compute_with_the_stored_weights(tmp_path, stored, fmt):
    folder = compressed(tmp_path, stored)
    ours = load(folder)
    found = formats(ours)
    dense_names = [name for name in found if "self_attn" in name]
    assert len(dense_names) == 4 * tiny_models.LAYERS
    assert {found[name] for name in dense_names} == {fmt}
    # The host's own dequantizer rounds to bf16 on the way.
    weights = {}
    for name in dense_names:
        layer = ours.get_submodule(name)
        weights[name] = weight_format(fmt).dense(layer.export())
    tensors = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        divisor = tensors.get(f"{name}.weight_global_scale", torch.tensor(1.0))
        codes = tensors.get(f"{name}.weight_packed", tensors.get(f"{name}.weight"))
        codes = codes if codes.dtype == torch.float8_e4m3fn else codes.view(torch.uint8)
        expected = weight_format(fmt).dequantize(codes, tensors[f"{name}.weight_scale"])
        assert torch.allclose(weight, expected / divisor, rtol=1e-6)
    before = logits(ours)
    for name, weight in weights.items():
        module = nn.Linear(*reversed(weight.shape), bias=False)
        module.weight = nn.Parameter(weight)
        ours.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = module
    assert (before - logits(ours)).norm() < 1e-5 * before.norm()


def test_the_format_that_is_stored_may_be_named(tmp_path):
    folder = deepseek_v3(tmp_path)
    exact, named = load(folder), load(folder, "fp8")
    name = "model.layers.1.self_attn.kv_b_proj"
    matrices = [model.get_submodule(name).export() for model in (exact, named)]
    assert torch.equal(*(matrix.codes.view(torch.uint8) for matrix in matrices))
    assert set(formats(named).values()) == {"fp8"}
    assert set(formats(load(folder, "nvfp4")).values()) == {"nvfp4"}


def test_the_host_gets_the_weights_that_it_looks_at(tmp_path, monkeypatch):
    folder = deepseek_v3(tmp_path)
    hosts = from_pretrained_by_host(folder, dtype=torch.bfloat16)
    forward = DeepseekV3MLP.forward

    def looking(self, x):
        assert self.up_proj.weight.dtype == torch.bfloat16
        return forward(self, x)

    monkeypatch.setattr(DeepseekV3MLP, "forward", looking)
    ours = load(folder, dtype=torch.bfloat16)
    done = ours.hf_quantizer.dense_layers
    name = "model.layers.0.mlp.up_proj"
    assert done.hosts[name] == "the model looks at its weights"
    assert formats(ours)["model.layers.0.mlp.down_proj"] == "fp8"
    module = ours.get_submodule(name)
    assert type(module) is nn.Linear
    assert torch.equal(module.weight, hosts.get_submodule(name).weight)


def test_a_model_that_cannot_be_tried_is_the_hosts(tmp_path, monkeypatch):
    folder = deepseek_v3(tmp_path)

    def refuse(model):
        raise ValueError("no")

    monkeypatch.setattr(dense, "let_model_write", refuse)
    with pytest.warns(RuntimeWarning, match="^dense layers stay transformers': the model cannot"):
        ours = load(folder)
    hosts = from_pretrained_by_host(folder, dtype=torch.float32)
    own = dict(ours.named_parameters())
    for name, parameter in hosts.named_parameters():
        if ".experts." not in name:
            assert torch.equal(own.pop(name), parameter)
    assert not own


def test_a_missing_tensor_is_missing_still(tmp_path):
    folder = deepseek_v3(tmp_path)
    edit_tensors(folder, {"model.layers.1.self_attn.kv_b_proj.weight": None})
    with pytest.raises(cpumoe.CheckpointError, match=r"missing tensors: 1 \(.*kv_b_proj\.weight\)"):
        load(folder)


N, K = 200, 256
FP8 = torch.zeros(N, K).to(torch.float8_e4m3fn)
INT4 = torch.zeros(N, K // 8, dtype=torch.int32)
FP4 = torch.zeros(N, K // 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "fmt"),
    [
        ({"weight": FP8, "weight_scale_inv": torch.ones(2, 2)}, "fp8"),
        ({"weight": FP8, "weight_scale": torch.ones(N, 1).bfloat16()}, "fp8"),
        ({"weight": FP8, "weight_scale": torch.ones(1)}, "fp8"),
        (
            {"weight": FP8, "weight_scale": torch.tensor(1.0), "input_scale": torch.tensor(1.0)},
            "fp8",
        ),
        ({"weight_packed": INT4, "weight_scale": torch.ones(N, 2).bfloat16()}, "int4"),
        (
            {
                "weight_packed": INT4,
                "weight_scale": torch.ones(N, 1).half(),
                "weight_shape": torch.tensor([N, K]),
            },
            "int4",
        ),
        ({"weight_packed": FP4, "weight_scale": torch.ones(N, 8, dtype=torch.uint8)}, "mxfp4"),
        (
            {
                "weight_packed": FP4,
                "weight_scale": torch.ones(N, 16).to(torch.float8_e4m3fn),
                "weight_global_scale": torch.tensor([4.0]),
            },
            "nvfp4",
        ),
        ({"weight": FP8}, None),
        ({"weight": FP8.float(), "weight_scale_inv": torch.ones(2, 2)}, None),
        ({"weight": FP8, "weight_scale_inv": torch.ones(2, 3)}, None),
        ({"weight": FP8, "weight_scale_inv": torch.ones(N)}, None),
        ({"weight": FP8[:, 1:], "weight_scale_inv": torch.ones(2, 2)}, None),
        (
            {"weight": FP8, "weight_scale": torch.ones(2, 2), "weight_zero_point": torch.ones(2)},
            None,
        ),
        ({"weight_packed": INT4[:, 1:], "weight_scale": torch.ones(N, 2).bfloat16()}, None),
        (
            {
                "weight_packed": INT4,
                "weight_scale": torch.ones(N, 2).bfloat16(),
                "weight_g_idx": torch.zeros(K, dtype=torch.int32),
            },
            None,
        ),
        (
            {
                "weight_packed": FP4,
                "weight_scale": torch.ones(N, 16).to(torch.float8_e4m3fn),
                "weight_global_scale": torch.tensor([0.0]),
            },
            None,
        ),
    ],
)
def test_forms_are_told_apart_by_kinds_dtypes_and_shapes(tmp_path, tensors, fmt):
    named = {f"a.{kind}": tensor.contiguous() for kind, tensor in tensors.items()}
    save_file(named, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    kinds = {kind: f"a.{kind}" for kind in tensors if kind != "weight_g_idx"}
    found = stored_matrix(SafetensorsFolder(tmp_path), kinds, (N, K))
    assert (None if found is None else found.format) == fmt
    if found is not None:
        assert found.matrix.shape == (N, K)


def test_blocks_of_another_size_are_not_taken_for_128():
    assert has_known_blocks({})
    assert has_known_blocks({"weight_block_size": [128, 128]})
    assert not has_known_blocks({"weight_block_size": [120, 128]})
    groups = {"a": {"weights": {"block_structure": [128, 128]}}, "b": {"weights": None}}
    assert has_known_blocks({"config_groups": groups})
    groups["c"] = {"weights": {"block_structure": [64, 64]}}
    assert not has_known_blocks({"config_groups": groups})


LOADING = """
import json, sys
import torch
from cpumoe import default_runtime
from cpumoe.integrations.transformers import ExpertsOptions, from_pretrained

default_runtime()
options = ExpertsOptions(dense="native", progress=False)
with PeakMemory() as peak:
    model = from_pretrained(sys.argv[1], options=options)
ours = model.hf_quantizer.dense_layers.ours
print(json.dumps([peak.bytes - peak.before, anonymous_bytes() - peak.before, len(ours)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_loading_is_one_copy_as_stored(tmp_path):
    folder = deepseek_v3(tmp_path)
    generator = torch.Generator().manual_seed(1)
    hidden, inner = 2048, 16384
    edit_config(folder, hidden_size=hidden, intermediate_size=inner)
    widths = {tiny_models.HIDDEN: hidden, 2 * tiny_models.INNER: inner}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_scale_inv"):
            continue
        shape = [widths.get(size, size) for size in tensor.shape]
        if "o_proj" in name:  # the heads are as wide as before
            shape[1] = tensor.shape[1]
        if "_proj" in name:
            codes = torch.randint(100, shape, dtype=torch.int8, generator=generator)
            tensors[name] = codes.view(torch.float8_e4m3fn)
            grid = [-(-size // 128) for size in shape]
            tensors[f"{name}_scale_inv"] = torch.full(grid, 2.0**-12)
        else:
            tensors[name] = torch.rand(shape, generator=generator).to(tensor.dtype)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert stored > 100e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    peak, after, ours = json.loads(output_with_torch(PEAK_MEMORY + LOADING, str(folder)))
    assert ours >= 6
    assert after >= 0.9 * stored
    assert peak < 1.1 * stored + (16 << 20), f"{peak / stored:.2f} copies of the weights"
