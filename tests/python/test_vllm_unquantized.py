"""The plugin for vLLM: experts that are not quantized, with stand-ins for vLLM's classes."""

import importlib

import pytest
import torch
import vllm_tools
from moe_tools import inputs, layer, refused
from vllm_tools import MoEActivation, RoutedExperts, UnquantizedFusedMoEMethod

NAME = "UnquantizedFusedMoEMethod"


@pytest.fixture(scope="module")
def host():
    with vllm_tools.with_plugin() as made:
        yield made


@pytest.fixture(autouse=True)
def _clean(host):
    for each in (host.additional, host.context, host.log.lines):
        each.clear()


def load(module, weights, dtype):
    for expert in range(weights.num_experts):
        for shard, projection in (("w3", "up"), ("w1", "gate"), ("w2", "down")):
            name = f"{'w2' if shard == 'w2' else 'w13'}_weight"
            matrix = getattr(weights, projection)[expert].codes.to(dtype)
            getattr(module, name).weight_loader(
                *(getattr(module, name), matrix), weight_name=name, shard_id=shard, expert_id=expert
            )
    module.quant_method.process_weights_after_loading(module)


@pytest.mark.parametrize(
    ("dtype", "fmt"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "bf16")]
)
def test_experts_are_packed_as_they_are(host, dtype, fmt):
    weights = layer(fmt, hidden=50, intermediate=37)
    module = RoutedExperts(None, hidden=50, intermediate=37, dtype=dtype)
    assert isinstance(module.quant_method, UnquantizedFusedMoEMethod)
    assert not module.quant_method.is_monolithic
    load(module, weights, torch.float32)
    assert not dict(module.named_parameters())
    assert module.quant_method.experts.format == fmt
    args = inputs(weights, tokens=4, dtype=dtype)
    assert torch.equal(module(*args), weights.pack()(*args))
    assert host.log.lines == [f"cpumoe computes routed experts in {fmt}"]


def test_ranks(host):
    weights = layer("bf16", intermediate=94)
    args = inputs(weights, tokens=4, dtype=torch.float32)
    total = torch.zeros(4, weights.hidden)
    for rank in range(2):
        module = RoutedExperts(None, intermediate=94, ranks=2, rank=rank, dtype=torch.float32)
        load(module, weights, torch.bfloat16)
        total += module(*args)
    torch.testing.assert_close(total, weights.pack()(*args), rtol=1e-5, atol=1e-5)


def test_weights_of_an_fp32_model_are_not_rounded(host):
    module = RoutedExperts(None, dtype=torch.float32)
    with refused(
        ValueError,
        "model.layers.0.mlp.experts.w2_weight: expected weights that are bfloat16 numbers, as the "
        "checkpoint's config says, got others; pass --dtype bfloat16 to vLLM, which rounds them, "
        "or set CPUMOE_VLLM=0",
    ):
        module.w2_weight.weight_loader(
            *(module.w2_weight, torch.full((160, 96), 0.1)),
            weight_name="w2_weight",
            shard_id="w2",
            expert_id=0,
        )


def test_memory_that_is_given_back_is_free(host):
    """Pages that are free read as zeros; the rest of the tensor stays."""
    module = RoutedExperts(None)
    whole = module.w13_weight.data.fill_(1)
    module.quant_method._arriving._give_back(3)
    assert not whole[:2].any()
    assert whole[3].all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": MoEActivation.SITU}, "activation SITU"),
        ({"lora": True}, "LoRA adapters may change them"),
        ({"weighted_input": True}, "the router's weights multiply the input"),
        ({"dtype": torch.float64}, "weights in float64 that are not quantized"),
    ],
)
def test_what_is_left_to_vllm(host, options, reason):
    module = RoutedExperts(None, **options)
    assert type(module.quant_method) is UnquantizedFusedMoEMethod
    assert module.created_by_host
    assert host.log.lines == [f"cpumoe leaves routed experts to vLLM: {reason}"]
    assert not host.additional


def test_disabled(host):
    host.additional["cpumoe"] = {"enabled": False}
    assert type(RoutedExperts(None).quant_method) is UnquantizedFusedMoEMethod
    assert host.additional == {"cpumoe": {"enabled": False}}


def test_checkpoints_in_fp32(host, monkeypatch):
    unquantized = importlib.import_module("cpumoe.integrations.vllm.unquantized")
    monkeypatch.setattr(unquantized, "_checkpoint_dtype", lambda: torch.float32)
    RoutedExperts(None, dtype=torch.float32)
    (line,) = host.log.lines
    assert line.endswith("weights in float32 that are not quantized")


def test_another_plugin(host, monkeypatch):
    unquantized = importlib.import_module("cpumoe.integrations.vllm.unquantized")
    unquantized.register()  # a second time
    monkeypatch.setitem(vllm_tools.replaced, NAME, dict)
    with refused(ImportError, f"another plugin replaces {NAME}"):
        unquantized.register()
