"""Experts of a layer that are computed while the GPU goes on, and added to the next layer."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from moe_tools import Inputs
from sglang_tools import (
    TOP_K,
    assert_close,
    batch,
    checkpoint,
    gpu,
    loaded,
    oracle,
)

from cpumoe import Experts

LAYERS = 6
# Not all layers of a model have routed experts.
PASS = (0, 2, 3, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("v4"), layers=LAYERS)


def plain_split(ids, weights, kept):
    """The rule, one pair at a time."""
    now = set()
    for row, values in zip(ids.tolist(), weights.tolist(), strict=True):
        greatest = sorted(range(len(row)), key=lambda slot, values=values: (-values[slot], slot))
        now |= {row[slot] for slot in greatest[: max(kept, 0)]}
    rows = [[expert in now for expert in row] for row in ids.tolist()]
    runs_now = torch.tensor(rows, dtype=torch.bool).view(ids.shape)
    return ids.where(runs_now, torch.tensor(-1)), ids.where(~runs_now, torch.tensor(-1))


def layers(folder, *, deferred, indices=PASS, **changes):
    options = {"max_deferred_experts_per_token": deferred, **changes}
    return {i: loaded(folder, layer_idx=i, **options) for i in indices}


def inputs_of(index, tokens):
    return batch(tokens, dtype=torch.float32, seed=index)


def run_pass(wrappers, tokens):
    """Runs the layers one after the other, as a model does."""
    results = {}
    for index, wrapper in wrappers.items():
        args = inputs_of(index, tokens)
        wrapper.submit_forward(*args, None)
        results[index] = wrapper.sync_forward(args.hidden_states, None)
    return results


def expected_pass(folder, tokens, deferred, indices=PASS, mask=None):
    expected, pending = {}, 0.0
    for index in indices:
        x, ids, weights = inputs_of(index, tokens)
        last = index == LAYERS - 1
        now, later = plain_split(ids, weights, TOP_K - (0 if last else deferred))
        args = (Inputs(x, part, weights) for part in (now, later))
        now_sum, later_sum = (oracle(folder, a, layer=index, mask=mask) for a in args)
        expected[index] = now_sum + pending
        pending = later_sum
    return expected


def assert_equal_passes(results, expected):
    assert results.keys() == expected.keys()
    for index, result in results.items():
        assert_close(result, expected[index])


@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
@pytest.mark.parametrize("deferred", [1, 2, 3, 9])
def test_the_next_layer_adds_what_was_deferred(folder, deferred, tokens):
    results = run_pass(layers(folder, deferred=deferred), tokens)
    assert_equal_passes(results, expected_pass(folder, tokens, deferred))


def test_a_call_of_more_tokens_than_the_buffer_defers_nothing(folder):
    wrappers = layers(folder, deferred=2, chunked_prefill_size=16)
    assert_equal_passes(run_pass(wrappers, 40), expected_pass(folder, 40, 0))
    assert_equal_passes(run_pass(wrappers, 16), expected_pass(folder, 16, 2))


def test_a_bf16_sum_is_rounded_once(folder):
    wrappers = layers(folder, deferred=1, indices=(0, 5))
    parts = {i: inputs_of(i, 16) for i in wrappers}
    x, ids, weights = (
        {i: a.hidden_states.bfloat16() for i, a in parts.items()},
        {i: a.topk_ids for i, a in parts.items()},
        {i: a.topk_weights for i, a in parts.items()},
    )
    for i, wrapper in wrappers.items():
        wrapper.submit_forward(x[i], ids[i], weights[i], None)
        result = wrapper.sync_forward(x[i], None)
    _, later = plain_split(ids[0], weights[0], TOP_K - 1)
    experts = [wrapper._layer.experts for wrapper in wrappers.values()]
    exact = experts[0](x[0], later, weights[0], out_dtype=torch.float32)
    experts[1](x[5], ids[5], weights[5], out=exact, accumulate=True)
    assert torch.equal(result, exact.bfloat16())


@pytest.mark.parametrize("deferred", [None, 0])
def test_without_deferral_results_are_the_layers_own_bits(folder, deferred):
    wrappers = layers(folder, deferred=deferred)
    results = run_pass(wrappers, 33)
    for index, result in results.items():
        experts = Experts.from_checkpoint(folder, index, runtime=wrappers[index]._runtime)
        assert torch.equal(result, experts(*inputs_of(index, 33)))


def test_experts_of_the_gpu_are_skipped_in_both_parts(folder):
    wrappers = layers(folder, deferred=2, num_gpu_experts=4)
    expected = expected_pass(folder, 20, 2, mask=gpu(0, 1, 2, 3))
    assert_equal_passes(run_pass(wrappers, 20), expected)


def test_the_last_layer_with_experts_defers_nothing(folder):
    wrappers = layers(folder, deferred=3)
    for _ in range(2):
        assert_equal_passes(run_pass(wrappers, 8), expected_pass(folder, 8, 3))
    assert [wrapper._layer.deferred for wrapper in wrappers.values()] == [3, 3, 3, 0]


def test_a_pass_that_ended_early_leaves_nothing_to_the_next(folder, caplog):
    wrappers = layers(folder, deferred=2)
    args = inputs_of(0, 8)
    for index in (0, 2):
        wrappers[index].submit_forward(*args, None)
    with caplog.at_level(logging.WARNING):
        results = run_pass(wrappers, 8)
    assert_equal_passes(results, expected_pass(folder, 8, 2))
    assert [record.message for record in caplog.records] == [
        "layer 0: the experts that layer 2 deferred are left out, because its pass has ended early"
    ]


def test_an_error_of_an_argument_loses_nothing(folder):
    wrappers = layers(folder, deferred=2)
    results = {}
    for index, wrapper in wrappers.items():
        x, ids, weights = inputs_of(index, 8)
        for wrong in ((x[:, 1:], ids, weights), (x, ids.float(), weights), (x, ids, weights[1:])):
            with pytest.raises((TypeError, ValueError)):
                wrapper.submit_forward(*wrong, None)
        wrapper.submit_forward(x, ids, weights, None)
        results[index] = wrapper.sync_forward(x, None)
    assert_equal_passes(results, expected_pass(folder, 8, 2))


def test_inputs_may_be_overwritten_while_deferred_experts_run(folder):
    wrappers = layers(folder, deferred=3)
    expected = expected_pass(folder, 64, 3)
    for index, wrapper in wrappers.items():
        x, ids, weights = (tensor.clone() for tensor in inputs_of(index, 64))
        wrapper.submit_forward(x, ids, weights, None)
        x.fill_(torch.nan)
        ids.fill_(0)
        weights.fill_(torch.nan)
        assert_close(wrapper.sync_forward(x, None), expected[index])


def test_the_hosts_settings_do_not_matter(folder):
    wrappers = layers(folder, deferred=2)
    inputs = {index: inputs_of(index, 12) for index in wrappers}
    results = {}
    with torch.device("meta"), torch.inference_mode():
        for index, wrapper in wrappers.items():
            wrapper.submit_forward(*inputs[index], None)
            results[index] = wrapper.sync_forward(inputs[index].hidden_states, None)
    assert_equal_passes(results, expected_pass(folder, 12, 2))


def test_passes_of_two_threads_do_not_mix(folder):
    wrappers = layers(folder, deferred=2)
    expected = {tokens: expected_pass(folder, tokens, 2) for tokens in (3, 17)}

    def passes(tokens):
        return [run_pass(wrappers, tokens) for _ in range(10)]

    with ThreadPoolExecutor(len(expected)) as threads:
        results = dict(zip(expected, threads.map(passes, expected), strict=True))
    for tokens, passed in results.items():
        assert len(passed) == 10
        for result in passed:
            assert_equal_passes(result, expected[tokens])


def test_layers_with_threads_of_their_own_add_in_order(folder):
    wrappers = {
        index: loaded(
            folder,
            layer_idx=index,
            max_deferred_experts_per_token=3,
            cpuinfer_threads=1 + index % 2,
        )
        for index in PASS
    }
    for _ in range(5):
        assert_equal_passes(run_pass(wrappers, 300), expected_pass(folder, 300, 3))


def test_a_mask_may_change_while_deferred_experts_run(folder):
    wrappers = layers(folder, deferred=2, gpu_experts_mask=gpu(0, 1))
    for mask in (gpu(0, 1), gpu(6, 7), gpu(0, 1)):
        for wrapper in wrappers.values():
            wrapper.gpu_experts_mask.copy_(mask)
        results = run_pass(wrappers, 40)
        assert_equal_passes(results, expected_pass(folder, 40, 2, mask=mask))
