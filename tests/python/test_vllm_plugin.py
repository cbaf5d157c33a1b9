"""The plugin for vLLM, with stand-ins for the few things of vLLM that it touches.

`test_vllm_classes.py` says whether an installed vLLM still has them.
"""

import dataclasses
import importlib
import random
from types import SimpleNamespace

import pytest
import torch
import vllm_tools
from moe_tools import GPT_OSS, PLAIN, inputs, layer, refused
from vllm_tools import MoEActivation, RoutedExperts

import cpumoe
from cpumoe import Experts, QuantizedMatrix, SwiGLU


@pytest.fixture(scope="module")
def host():
    """One vLLM for all tests, because importing the plugin takes time."""
    with vllm_tools.with_plugin() as made:
        yield made


@pytest.fixture(autouse=True)
def _clean(request):
    if "host" in request.fixturenames:
        host = request.getfixturevalue("host")
        host.additional.clear()
        host.context.clear()


def scheme(bits, kind, strategy, group, fmt="pack-quantized", **more):
    weights = SimpleNamespace(
        num_bits=bits,
        type=kind,
        strategy=strategy,
        group_size=group,
        symmetric=True,
        dynamic=False,
        actorder=None,
        block_structure=more.pop("block", None),
    )
    vars(weights).update(more)
    return {"weights": weights, "format": fmt, "input_activations": None}


# Configuration, its scheme, the format, and vLLM's names for parts.
FORMS = {
    "mxfp4": ("mxfp4", None, "mxfp4", ("weight", "weight_scale")),
    "deepseek_v4": ("deepseek_v4_fp8", None, "mxfp4", ("weight", "weight_scale")),
    "fp8": ("fp8", None, "fp8", ("weight", "weight_scale_inv")),
    "int4": (
        "compressed-tensors",
        scheme(4, "int", "group", 32),
        "int4",
        ("weight_packed", "weight_scale"),
    ),
    "compressed_mxfp4": (
        "compressed-tensors",
        scheme(4, "float", "group", 32, "mxfp4-pack-quantized"),
        "mxfp4",
        ("weight_packed", "weight_scale"),
    ),
    "compressed_nvfp4": (
        "compressed-tensors",
        scheme(4, "float", "tensor_group", 16, "nvfp4-pack-quantized"),
        "nvfp4",
        ("weight_packed", "weight_scale", "weight_global_scale"),
    ),
    "compressed_fp8_blocks": (
        "compressed-tensors",
        scheme(8, "float", "block", None, "float-quantized", block=[128, 128]),
        "fp8",
        ("weight", "weight_scale"),
    ),
    "compressed_fp8_rows": (
        "compressed-tensors",
        scheme(8, "float", "channel", None, "float-quantized"),
        "fp8",
        ("weight", "weight_scale"),
    ),
    "compressed_int4_rows": (
        "compressed-tensors",
        scheme(4, "int", "channel", None),
        "int4",
        ("weight_packed", "weight_scale"),
    ),
    "modelopt": (
        "modelopt_fp4",
        None,
        "nvfp4",
        ("weight", "weight_scale", "weight_scale_2"),
    ),
}


def config(host, name, given=None):
    made = host.registered[name]()
    made.scheme = given
    return made


def tensors(weights, names, *, divides):
    """Every tensor of every projection as vLLM's loader passes it on."""
    for expert in range(weights.num_experts):
        for shard, projection in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            matrix = getattr(weights, projection)[expert]
            parts = [matrix.codes, matrix.scales, matrix.factor]
            for name, part in zip(names, parts, strict=False):
                if name == "weight_packed" and weights.fmt == "int4":
                    part = part.view(torch.int32)
                if part is matrix.factor and divides:
                    part = 1 / part.reshape(1)
                yield name, part, shard, expert
            if weights.gate_bias is not None:
                yield "bias", getattr(weights, f"{projection}_bias")[expert], shard, expert


def load(module, everything):
    for name, tensor, shard, expert in everything:
        parameter = getattr(module, f"{'w2' if shard == 'w2' else 'w13'}_{name}")
        parameter.weight_loader(
            param=parameter,
            loaded_weight=tensor,
            weight_name=f"experts.w13_{name}",
            shard_id=shard,
            expert_id=expert,
            return_success=True,
        )


def factor_of_powers(weights):
    """NVFP4 whose factors have exact reciprocals."""
    if weights.fmt != "nvfp4":
        return weights
    for name in ("gate", "up", "down"):
        getattr(weights, name).factor.fill_(0.25)
    return weights


def with_scales_of_rows(weights):
    """The weights quantized again, with one scale for each row."""
    row = cpumoe.weight_format(weights.fmt)

    def again(matrix):
        return QuantizedMatrix(*row.quantize(row.dense(matrix), matrix.shape[-1]))

    return dataclasses.replace(
        weights, gate=again(weights.gate), up=again(weights.up), down=again(weights.down)
    )


@pytest.mark.parametrize("form", FORMS)
def test_tensors_in_any_order_are_the_experts(host, form):
    name, given, fmt, names = FORMS[form]
    weights = factor_of_powers(layer(fmt, hidden=256, seed=5))
    if form.endswith("_rows"):
        weights = with_scales_of_rows(weights)
    module = RoutedExperts(config(host, name, given), hidden=256)
    everything = list(tensors(weights, names, divides="global" in names[-1]))
    random.Random(3).shuffle(everything)
    load(module, everything)
    assert module.quant_method.experts is None
    assert all(not p.numel() for n, p in module.named_parameters() if n.endswith(tuple(names)))
    module.quant_method.process_weights_after_loading(module)
    assert not dict(module.named_parameters())
    args = inputs(weights, tokens=4)
    assert torch.equal(module(*args), weights.pack()(*args))


def test_gpt_oss(host):
    weights = layer("mxfp4", bias=torch.bfloat16, activation=GPT_OSS)
    module = RoutedExperts(
        config(host, "gpt_oss_mxfp4"), activation=MoEActivation.SWIGLUOAI, has_bias=True
    )
    assert module.quant_method.weight_dtype == "gpt_oss_mxfp4"

    def alternate(gate, up):
        return torch.stack([gate, up], dim=2).flatten(1, 2)

    stacks = {
        "w13_weight": alternate(weights.gate.codes, weights.up.codes),
        "w13_weight_scale": alternate(weights.gate.scales, weights.up.scales),
        "w13_bias": torch.stack([weights.gate_bias, weights.up_bias], dim=2).flatten(1),
        "w2_weight": weights.down.codes,
        "w2_weight_scale": weights.down.scales.view(torch.float8_e8m0fnu),
        "w2_bias": weights.down_bias,
    }
    for name, tensor in stacks.items():
        parameter = getattr(module, name)
        parameter.weight_loader(parameter, tensor, weight_name=name, shard_id=None, expert_id=None)
    module.quant_method.process_weights_after_loading(module)
    for dtype in (torch.bfloat16, torch.float32):
        args = inputs(weights, tokens=4, dtype=dtype)
        assert torch.equal(module(*args), weights.pack()(*args))
    method = host.registered["gpt_oss_mxfp4"]
    assert torch.float32 in method.get_supported_act_dtypes()


@pytest.mark.parametrize(
    ("form", "hidden", "intermediate"),
    [
        ("mxfp4", 90, 74),
        ("fp8", 133, 77),
        ("compressed_fp8_rows", 33, 31),
        ("compressed_nvfp4", 50, 70),
        ("compressed_int4_rows", 40, 24),
        ("int4", 64, 32),
    ],
)
def test_sizes_that_are_no_multiple_of_32(host, form, hidden, intermediate):
    name, given, fmt, names = FORMS[form]
    weights = factor_of_powers(layer(fmt, hidden=hidden, intermediate=intermediate))
    if form.endswith("_rows"):
        weights = with_scales_of_rows(weights)
    module = RoutedExperts(config(host, name, given), hidden=hidden, intermediate=intermediate)
    load(module, tensors(weights, names, divides="global" in names[-1]))
    module.quant_method.process_weights_after_loading(module)
    args = inputs(weights, tokens=4)
    assert torch.equal(module(*args), weights.pack()(*args))


@pytest.mark.parametrize("form", ["mxfp4", "int4"])
def test_ranks_that_share_each_expert(host, form):
    name, given, fmt, names = FORMS[form]
    weights = layer(fmt, intermediate=192, bias=torch.float32)
    args = inputs(weights, tokens=4, dtype=torch.float32)
    total = torch.zeros(4, weights.hidden)
    for rank in range(2):
        module = RoutedExperts(
            config(host, name, given), intermediate=192, ranks=2, rank=rank, has_bias=True
        )
        everything = []
        for part, tensor, shard, expert in tensors(weights, names, divides=False):
            if part == "bias" and shard == "w2" and rank:
                tensor = torch.zeros_like(tensor)
            everything.append((part, tensor, shard, expert))
        load(module, everything)
        module.quant_method.process_weights_after_loading(module)
        total += module(*args)
    torch.testing.assert_close(total, weights.pack()(*args), rtol=1e-5, atol=1e-5)


def test_sizes_of_gpt_oss_are_padded(host):
    weights = layer("mxfp4", intermediate=160, activation=GPT_OSS)
    args = inputs(weights, tokens=3, dtype=torch.float32)
    total = torch.zeros(3, weights.hidden)
    # 160 features in 2 ranks: 80 each, in tensors of 96. vLLM's model gives the first rank 96 of
    # them, because groups must not be cut.
    for first, last in ((0, 96), (96, 160)):
        module = RoutedExperts(
            config(host, "gpt_oss_mxfp4"),
            activation=MoEActivation.SWIGLUOAI,
            intermediate=160,
            ranks=2,
        )
        for part, name in (("codes", "weight"), ("scales", "weight_scale")):
            gate, up, down = (getattr(getattr(weights, p), part) for p in ("gate", "up", "down"))
            per = 160 // down.shape[2]
            both = torch.stack([gate, up], dim=2).flatten(1, 2)[:, 2 * first : 2 * last]
            for stack, tensor in (
                ("w13", both),
                ("w2", down[:, :, first // per : last // per]),
            ):
                parameter = getattr(module, f"{stack}_{name}")
                parameter.weight_loader(parameter, tensor, weight_name=name)
        module.quant_method.process_weights_after_loading(module)
        total += module(*args)
    torch.testing.assert_close(total, weights.pack()(*args), rtol=1e-5, atol=1e-5)


def test_ranks_that_share_the_experts(host):
    weights = layer("int4")
    args = inputs(weights, tokens=6, dtype=torch.float32)
    total = torch.zeros(6, weights.hidden)
    for mine in ([0, 2], [1, 3]):
        name, given, _, names = FORMS["int4"]
        module = RoutedExperts(config(host, name, given), experts_of_rank=mine)
        load(module, tensors(weights, names, divides=False))
        module.quant_method.process_weights_after_loading(module)
        total += module(args.hidden_states, args.topk_ids.int(), args.topk_weights)
    torch.testing.assert_close(total, weights.pack()(*args), rtol=1e-5, atol=1e-5)


def test_scales_keep_the_checkpoints_dtype(host):
    name, given, _, names = FORMS["int4"]
    weights = layer("int4")
    wide = {p: getattr(weights, p) for p in ("gate", "up", "down")}
    module = RoutedExperts(config(host, name, given), dtype=torch.float16)
    load(
        module,
        (
            (part, tensor.float() if part == "weight_scale" else tensor, shard, expert)
            for part, tensor, shard, expert in tensors(weights, names, divides=False)
        ),
    )
    module.quant_method.process_weights_after_loading(module)
    exported = module.quant_method.experts.export(1)
    assert exported.up.scales.dtype == torch.float32
    assert torch.equal(exported.up.scales, wide["up"][1].scales.float())


def test_scales_in_e8m0_are_not_converted(host):
    name, given, _, names = FORMS["fp8"]
    weights = layer("fp8", hidden=128, intermediate=128)
    module = RoutedExperts(config(host, name, given), hidden=128, intermediate=128)
    powers = {}
    everything = []
    for part, tensor, shard, expert in tensors(weights, names, divides=False):
        if part == "weight_scale_inv":
            tensor = powers[shard, expert] = tensor.to(torch.float8_e8m0fnu)
        everything.append((part, tensor, shard, expert))
    load(module, everything)
    module.quant_method.process_weights_after_loading(module)
    exported = module.quant_method.experts.export(2)
    assert exported.up.scales.dtype == torch.float8_e8m0fnu
    for shard, matrix in (("w1", exported.gate), ("w2", exported.down), ("w3", exported.up)):
        expected = powers[shard, 2].view(torch.uint8)
        assert torch.equal(matrix.scales.view(torch.uint8), expected)


def test_incomplete_and_made_up_weights(host):
    name, given, _, names = FORMS["int4"]
    weights = layer("int4")
    module = RoutedExperts(config(host, name, given))
    everything = list(tensors(weights, names, divides=False))
    load(module, everything[:-1])
    with refused(
        ValueError,
        "model.layers.0.mlp.experts: expected all experts in the checkpoint, got a part of "
        "w13_weight_scale; the checkpoint is incomplete",
    ):
        module.quant_method.process_weights_after_loading(module)
    load(module, everything[-1:])
    with pytest.raises(RuntimeError, match="expected one load"):
        load(module, everything[-1:])
    made_up = RoutedExperts(config(host, name, given))
    made_up.quant_method.process_weights_after_loading(made_up)
    args = inputs(weights, tokens=2)
    assert torch.equal(made_up(*args), torch.zeros_like(args.hidden_states))


def test_what_is_left_to_vllm(host):
    def answer(name, given=None, **options):
        host.log.lines.clear()
        with pytest.raises(AttributeError, match="'str' object"):  # "the host's" is no method
            RoutedExperts(config(host, name, given), **options)
        return host.log.lines

    says = "cpumoe leaves routed experts to vLLM: "
    int4 = FORMS["int4"][1]
    assert answer("mxfp4", activation=MoEActivation.SITU) == [f"{says}activation SITU"]
    assert answer("mxfp4", activation=MoEActivation.SWIGLUOAI) == [f"{says}activation SWIGLUOAI"]
    assert answer("mxfp4", hidden=81) == [f"{says}hidden size 81 is no multiple of 2"]
    assert answer("mxfp4", weighted_input=True) == [
        f"{says}the router's weights multiply the input"
    ]
    assert answer("mxfp4", lora=True) == [f"{says}LoRA adapters may change them"]
    assert answer("mxfp4", eplb=True) == [f"{says}they are moved between ranks (EPLB)"]
    cut = f"{says}intermediate size 96 in each of 2 ranks is no multiple of 64"
    # vLLM's loader would give the second rank the scales of the group that its codes begin in.
    assert answer("mxfp4", intermediate=160, ranks=2) == [
        f"{says}intermediate size 80 in each of 2 ranks is no multiple of 32"
    ]
    assert answer("gpt_oss_mxfp4", activation=MoEActivation.SWIGLUOAI, intermediate=80) == [
        f"{says}intermediate size 80 is no multiple of 32"
    ]
    wide = scheme(4, "int", "group", 64)
    assert answer("compressed-tensors", wide, hidden=256, intermediate=192, ranks=2) == [cut]
    for given in (
        scheme(8, "int", "group", 32),
        scheme(4, "int", "group", 32, symmetric=False),
        scheme(4, "int", "group", 32, actorder="group"),
        scheme(8, "float", "tensor", None),
    ):
        (line,) = answer("compressed-tensors", given)
        assert line.startswith(says)
    assert answer("compressed-tensors", None) == []  # an unquantized layer is no news
    host.additional["cpumoe"] = {"enabled": False}
    disabled = answer("compressed-tensors", int4)
    assert disabled == [f"{says}the additional config says enabled: false"]
    other = config(host, "mxfp4").get_quant_method(torch.nn.Linear(2, 2), "lm_head")
    assert other == "the host's"


def test_activations():
    stored = importlib.import_module("cpumoe.integrations.vllm.stored")

    def activation(name, limit=None, alpha=None, beta=None, interleaved=False):
        given = stored.Activation(name, limit, alpha, beta)
        return stored.activation_of(given, interleaved=interleaved)

    assert activation("SILU") == PLAIN
    assert activation("SILU", limit=10.0) == SwiGLU(limit=10.0)
    assert activation("SWIGLUOAI", interleaved=True) == GPT_OSS
    separate = activation("SWIGLUOAI_UNINTERLEAVE", 7.0, 1.702, 1.0)
    assert separate == GPT_OSS
    assert activation("GELU_TANH") == cpumoe.GLU("gelu_tanh")
    assert isinstance(activation("GELU", limit=3.0), str)
    assert isinstance(activation("SILU", interleaved=True), str)


def test_compiled_code_has_a_key_of_its_own(host):
    host.additional["cpumoe"] = {"precision": "bf16"}
    RoutedExperts(config(host, "mxfp4"))
    assert host.additional == {"cpumoe": {"precision": "bf16", "version": cpumoe.__version__}}
    RoutedExperts(config(host, "mxfp4"))


def test_no_graph_break(host):
    weights = layer("mxfp4")
    module = RoutedExperts(config(host, "mxfp4"))
    load(module, tensors(weights, FORMS["mxfp4"][3], divides=False))
    module.quant_method.process_weights_after_loading(module)
    args = inputs(weights, tokens=3)
    compiled = torch.compile(lambda *given: module(*given) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*args), module(*args) + 1)


def test_settings_reach_the_experts(host):
    host.additional["cpumoe"] = {"isa": "generic", "precision": "bf16"}
    weights = layer("mxfp4")
    module = RoutedExperts(config(host, "mxfp4"))
    load(module, tensors(weights, FORMS["mxfp4"][3], divides=False))
    module.quant_method.process_weights_after_loading(module)
    experts = module.quant_method.experts
    assert isinstance(experts, Experts)
    assert (experts.isa, experts.precision) == ("generic", "bf16")
