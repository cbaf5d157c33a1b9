"""Checkpoints without a quantization under transformers; docs/families.md has the families."""

import pytest
import torch
from checkpoint_tools import edit_tensors
from safetensors.torch import load_file

import cpumoe

pytest.importorskip("transformers")

import families
from transformers import AutoModelForCausalLM

from cpumoe.integrations.transformers import (
    CpuExperts,
    ExpertsOptions,
    disable,
    enable,
    from_pretrained,
)

OPTIONS = ExpertsOptions(progress=False)
TOKENS = torch.arange(3, 27)[None]


def logits(model):
    with torch.no_grad():
        return families.logits(model, TOKENS)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, CpuExperts)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    families.tiny_model("qwen3_moe").bfloat16().save_pretrained(folder)
    return folder


def experts_in(folder, dtype):
    return {
        name: tensor.to(dtype)
        for name, tensor in load_file(folder / "model.safetensors").items()
        if ".experts." in name
    }


@pytest.fixture
def own_copy(published, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    return tmp_path


def test_experts_stay_bf16_and_everything_else_is_the_hosts(published):
    ours = from_pretrained(published, options=OPTIONS)
    assert [module.experts.format for module in experts_of(ours)] == ["bf16"] * families.LAYERS
    assert not any(p.is_meta for p in ours.parameters())
    hosts = dict(AutoModelForCausalLM.from_pretrained(published).named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, hosts[name])


def test_the_model_says_that_it_is_not_quantized_and_refuses_to_be_saved(published, tmp_path):
    ours = from_pretrained(published, options=OPTIONS)
    assert getattr(ours.config, "quantization_config", None) is None
    with pytest.raises(ValueError, match="not serializable"):
        ours.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_experts_in_another_float_give_the_same_logits(published, own_copy, dtype):
    expected = logits(from_pretrained(published, dtype=torch.float32, options=OPTIONS))
    weights = experts_in(own_copy, torch.bfloat16)
    # The smallest of bf16's numbers have too many bits for fp16.
    exact = {n: t.to(dtype) for n, t in weights.items() if torch.equal(t.half().bfloat16(), t)}
    assert exact
    edit_tensors(own_copy, exact)
    actual = logits(from_pretrained(own_copy, dtype=torch.float32, options=OPTIONS))
    assert torch.equal(actual, expected)


def test_experts_that_bf16_cannot_hold_are_refused_by_name(own_copy):
    weights = experts_in(own_copy, torch.float32)
    edit_tensors(own_copy, {name: tensor + 2**-20 for name, tensor in weights.items()})
    message = r"^model\.layers\.0\.mlp\.experts\.\d\.\w+\.weight: expected weights that are bf16"
    with pytest.raises(cpumoe.UnsupportedFormatError, match=message):
        from_pretrained(own_copy, options=OPTIONS)


def test_enable_leaves_unquantized_checkpoints_to_the_host(published):
    enable(OPTIONS)
    try:
        model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    finally:
        disable()
    assert experts_of(model) == []
    model.set_experts_implementation("cpumoe")
    ours = from_pretrained(published, dtype=torch.float32, options=OPTIONS)
    assert torch.equal(logits(model), logits(ours))
