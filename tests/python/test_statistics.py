"""What a layer says about the work that it has done."""

import dataclasses

import pytest
import torch
from moe_tools import EVERY_VARIANT, inputs, layer

import cpumoe


@EVERY_VARIANT
def test_calls_tokens_and_bytes_are_counted(isa, fmt):
    experts = layer(fmt).pack(isa=isa)
    before = experts.statistics()
    assert (before.calls, before.seconds, before.bytes_read, before.gb_per_s) == (0, 0, 0, 0)
    assert before.expert_tokens.tolist() == [0, 0, 0, 0]
    x = torch.zeros(3, layer(fmt).hidden, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 2], [2, 2], [-1, 4]])  # the last token's experts are skipped
    experts(x, ids, torch.ones(3, 2))
    experts.submit(x, ids, torch.ones(3, 2)).result()
    after = experts.statistics()
    assert isinstance(after, cpumoe.ExpertsStatistics)
    assert after.calls == 2
    assert after.expert_tokens.dtype == torch.int64
    assert after.expert_tokens.tolist() == [2, 0, 6, 0]
    assert after.bytes_read == 2 * 2 * (experts.nbytes // 4)  # calls, experts, bytes of an expert
    assert after.seconds > 0
    assert after.gb_per_s == pytest.approx(after.bytes_read / after.seconds / 1e9)
    assert before.calls == 0


def test_masked_experts_and_failed_calls_are_not_counted():
    weights = layer("mxfp4")
    mask = torch.tensor([True, False, True, True])
    experts = weights.pack(expert_mask=mask)
    x, _, w = inputs(weights, tokens=3)
    experts(x, torch.tensor([[0, 1], [1, 2], [3, 0]]), w)
    with pytest.raises(IndexError):
        experts(x, torch.full((3, 2), 9), w)
    after = experts.statistics()
    assert after.calls == 1
    assert after.expert_tokens.tolist() == [0, 2, 0, 0]


def test_statistics_are_a_copy_that_cannot_be_assigned_to():
    weights = layer("mxfp4")
    experts = weights.pack()
    experts(*inputs(weights, tokens=3))
    first = experts.statistics()
    first.expert_tokens.zero_()
    assert int(experts.statistics().expert_tokens.sum()) == 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.calls = 0
