"""Workloads and the arithmetic of timing."""

from types import SimpleNamespace

import pytest
import torch
from checkpoint_tools import SMALL, write_small

import cpumoe
from cpumoe.measure.layer_weights import LayerWeights
from cpumoe.measure.throughput import (
    NUM_ROUTINGS,
    ROUTINGS,
    CallTimer,
    Workload,
    make_workload,
    median_spread,
    relative_l2,
)
from cpumoe.models import find_model


class Clock:
    """A clock that advances by a second at each reading."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def workload(tokens, routing="balanced", experts=16, top_k=4, **options):
    return make_workload(
        tokens, hidden_size=32, num_experts=experts, top_k=top_k, routing=routing, **options
    )


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = write_small(tmp_path_factory.mktemp("v4"), "v4-flash")
    with cpumoe.open_checkpoint(folder) as reader:
        weights = LayerWeights.from_checkpoint(reader, 0)
    return weights.pack(cpumoe.ExpertsOptions(isa="generic"))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing):
    work = workload(50, routing)
    assert work.topk_ids.shape == (NUM_ROUTINGS, 50, 4)
    assert (work.tokens, work.top_k) == (50, 4)
    for row in work.topk_ids.view(-1, 4).tolist():
        assert len(set(row)) == 4
        assert 0 <= min(row) <= max(row) < 16
    assert torch.allclose(work.topk_weights.sum(1), torch.ones(50))
    same = workload(50, routing)
    assert torch.equal(work.topk_ids, same.topk_ids)
    assert not torch.equal(work.topk_ids, workload(50, routing, seed=1).topk_ids)
    assert work.touched_experts == (4 if routing == "concentrated" else 16)


def test_popularity():
    counts = {
        routing: workload(1000, routing, top_k=1).topk_ids.flatten().bincount().double()
        for routing in ("balanced", "zipf")
    }
    assert counts["balanced"].max() < 1.3 * counts["balanced"].min()
    ranked = counts["zipf"].sort(descending=True).values
    assert ranked[0] / ranked[1] == pytest.approx(2, rel=0.2)
    assert ranked[0] / ranked[9] == pytest.approx(10, rel=0.4)


def test_workload_refusals():
    with pytest.raises(ValueError, match="tokens: must be at least 1, got 0"):
        workload(0)
    with pytest.raises(ValueError, match=r"top_k: expected 1\.\.3, got 4"):
        workload(1, experts=3)
    with pytest.raises(ValueError, match=r"routing: expected one of balanced, .*, got 'x'"):
        workload(1, "x")


def test_what_a_call_costs(experts):
    sizes = {"hidden_size": SMALL["hidden"], "num_experts": SMALL["experts"], "top_k": 2}
    work = make_workload(1, **sizes)
    assert work.weight_bytes(experts) == pytest.approx(experts.nbytes * 2 / 3)
    assert work.macs(experts) == 2 * 3 * SMALL["hidden"] * SMALL["intermediate"]
    many = make_workload(64, **sizes)
    assert many.weight_bytes(experts) == experts.nbytes


def test_timer(experts):
    work = make_workload(2, hidden_size=SMALL["hidden"], num_experts=3, top_k=2)
    timer = CallTimer(experts, work, Clock())
    assert timer.run(0) == [1]
    assert timer.run(0, least=3) == [1, 1, 1]
    assert timer.run(7) == [1, 1, 1]  # three readings of the clock per call
    first = CallTimer(experts, work)
    outputs = [first.call() for _ in range(NUM_ROUTINGS + 1)]
    assert torch.equal(outputs[0], outputs[-1])
    expected = experts(work.hidden_states, work.topk_ids[1], work.topk_weights)
    assert torch.equal(outputs[1], expected)


def test_statistics():
    assert median_spread([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]) == (3.5, 2.0, 5.0)
    assert median_spread([[1.0]]) == (1.0, 1.0, 1.0)
    assert relative_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_made_up_experts_are_the_same_each_time():
    weights = LayerWeights.from_model(find_model("gpt-oss-20b"), limit=2, format="int4")
    assert (weights.num_experts, weights.top_k, weights.format) == (2, 2, "int4")
    first, again = weights.experts[1], weights.experts[-1]
    assert torch.equal(first.gate.codes, again.gate.codes)
    assert torch.equal(first.down_bias, again.down_bias)
    assert not torch.equal(first.gate.codes, weights.experts[0].gate.codes)
    with pytest.raises(IndexError):
        weights.experts[2]
    with pytest.raises(ValueError, match="mxfp8"):
        LayerWeights.from_model(find_model("gpt-oss-20b"), limit=1, format="mxfp8")


def test_skipped_ids_are_neither_read_nor_multiplied():
    experts = SimpleNamespace(hidden_size=64, intermediate_size=32, activation=cpumoe.SwiGLU())
    ids = torch.tensor([[[0, -1], [-1, -1]], [[2, 3], [3, -1]]], dtype=torch.int32)
    work = Workload(torch.zeros(2, 64).bfloat16(), ids, torch.ones(2, 2))
    assert work.touched_experts == (1 + 2) / 2
    assert work.macs(experts) == (1 + 3) / 2 * 3 * 64 * 32
