"""Experts.from_checkpoint(experts=...): experts in another order, and replicas."""

import pytest
import torch
from checkpoint_tools import a_call, first_layer, write_small
from moe_tools import EVERY_VARIANT, mask, refused

from cpumoe import Experts
from cpumoe.models import registry

MODELS = pytest.mark.parametrize("model", ["v4-flash", "gpt-oss-20b", "kimi-k2"])
SIZES = {"layers": 2, "experts": 4}


@MODELS
@pytest.mark.parametrize("order", [(3, 1, 2, 0), (2, 1), (1, 3, 1, 1, 0, 3)])
def test_the_layers_experts_are_those_that_the_caller_names(tmp_path, model, order):
    folder = write_small(tmp_path, model, **SIZES)
    number = first_layer(folder)
    whole = Experts.from_checkpoint(folder, number)
    experts = Experts.from_checkpoint(folder, number, experts=order)
    assert experts.num_experts == len(order)
    assert experts.nbytes == whole.nbytes // 4 * len(set(order))
    x, _, weights = a_call()
    ids = torch.randint(len(order), weights.shape, generator=torch.Generator().manual_seed(3))
    expected = whole(x, torch.tensor(order)[ids], weights)
    # Sums are rounded in the order of the layer's experts.
    assert torch.allclose(experts(x, ids, weights), expected, rtol=1e-5, atol=1e-6)
    for i, expert in enumerate(order):
        mine, original = experts.export(i), whole.export(expert)
        assert torch.equal(mine.up.codes, original.up.codes)
        if original.up_bias is not None:
            assert torch.equal(mine.up_bias, original.up_bias)


@EVERY_VARIANT
def test_replicas_have_their_own_mask_and_share_memory(tmp_path, isa, fmt):
    specs = (spec for spec in registry.MODELS if spec.weight_format == fmt)
    model = next((spec.name for spec in specs if spec.layout != "other"), None)
    if model is None:
        pytest.skip(f"no model in {fmt} can be written")
    folder = write_small(tmp_path, model, **SIZES)
    number = first_layer(folder)
    experts = Experts.from_checkpoint(folder, number, experts=[0, 1, 1, 0, 2, 3], isa=isa)
    whole = Experts.from_checkpoint(folder, number, isa=isa)
    x, ids, weights = a_call(tokens=40)
    replica = torch.tensor([[0, 3], [1, 2], [4, 4], [5, 5]])[ids, torch.arange(3) % 2]
    expected = whole(x, ids, weights)
    assert torch.equal(experts(x, replica, weights), expected)
    counts = torch.bincount(replica.flatten(), minlength=6)
    assert torch.equal(experts.statistics().expert_tokens, counts)
    experts.expert_mask = mask(3, 4, experts=6)
    whole_weights = weights.masked_fill((replica == 3) | (replica == 4), 0)
    kept = torch.where(whole_weights > 0, ids, -1)
    assert torch.equal(experts(x, replica, weights), whole(x, kept, weights))
    experts.evict()
    assert experts.packed_experts == [0, 1, 2, 3, 5]  # 3 shares the copy of 0
    experts.expert_mask = mask(0, 3, experts=6)
    assert experts.packed_experts == [0, 1, 2, 3, 4, 5]
    experts.evict()
    assert experts.packed_experts == [1, 2, 4, 5]
    experts.expert_mask = mask(0, experts=6)
    assert experts.packed_experts == [0, 1, 2, 3, 4, 5]
    experts.expert_mask = None
    assert torch.equal(experts(x, replica, weights), expected)


@pytest.mark.parametrize(
    ("experts", "kind", "message"),
    [
        ([0, 4], IndexError, "experts[1]: expected 0..3, got 4"),
        ([-1], IndexError, "experts[0]: expected 0..3, got -1"),
        ([0, 1.5], TypeError, "experts[1]: expected an int, got 1.5"),
        (3, TypeError, "experts: expected a sequence of ints, got int"),
        ([], ValueError, "experts: expected at least one expert, got none"),
    ],
)
def test_experts_that_the_checkpoint_does_not_have(tmp_path, experts, kind, message):
    folder = write_small(tmp_path, "v4-flash", **SIZES)
    with refused(kind, message):
        Experts.from_checkpoint(folder, first_layer(folder), experts=experts)


def test_a_mask_has_the_size_of_the_layer(tmp_path):
    folder = write_small(tmp_path, "v4-flash", **SIZES)
    with refused(ValueError, "expert_mask: expected [2], got [4]"):
        Experts.from_checkpoint(folder, first_layer(folder), experts=[1, 1], expert_mask=mask())
