"""Results do not depend on threads or runs, nor, if promised, on the rest of a batch."""

import pytest
import torch
from moe_tools import (
    EVERY_PRECISION,
    EVERY_VARIANT,
    check,
    features,
    inputs,
    layer,
)

from cpumoe import Runtime, _core
from cpumoe.measure import tuning

pytestmark = pytest.mark.filterwarnings("ignore:Runtime. . threads asked for:RuntimeWarning")


@EVERY_VARIANT
@EVERY_PRECISION
def test_results_depend_neither_on_threads_nor_on_the_run(isa, fmt, precision):
    weights = layer(fmt, experts=3, hidden=96, intermediate=64)
    calls = [inputs(weights, tokens) for tokens in (1, 5, 33)]
    expected = None
    for threads in (1, 2, 5):
        with Runtime(threads) as runtime:
            experts = weights.pack(isa=isa, precision=precision, runtime=runtime)
            for _ in range(2):
                got = [experts(*args) for args in calls]
                futures = [experts.submit(*args) for args in calls]
                expected = expected or got
                for a, b, future in zip(expected, got, futures, strict=True):
                    assert torch.equal(a, b)
                    assert torch.equal(a, future.result())


@EVERY_VARIANT
def test_few_token_limit_chooses_the_kernels(isa, fmt):
    weights = layer(fmt)
    args = inputs(weights, tokens=6)
    outputs = {}
    own = _core.few_tokens(isa, "tests", fmt).crossover
    for few_token_limit in (None, own, 0, 1000):
        outputs[few_token_limit] = weights.pack(isa=isa, few_token_limit=few_token_limit)(*args)
        check(outputs[few_token_limit], weights, args)
    assert torch.equal(outputs[None], outputs[own])
    # Kernels that take any number of tokens need not change to be batch-invariant.
    invariant = None if own == tuning.ANY_TOKENS else 0
    assert torch.equal(outputs[invariant], weights.pack(isa=isa, batch_invariant=True)(*args))


@EVERY_VARIANT
@EVERY_PRECISION
@pytest.mark.parametrize("tokens", [50, 150])
def test_batch_invariant_rows_never_depend_on_the_batch(isa, fmt, precision, tokens):
    weights = layer(fmt)
    experts = weights.pack(isa=isa, precision=precision, batch_invariant=True)
    x, ids, w = args = inputs(weights, tokens=tokens)
    whole = experts(*args)
    check(whole, weights, args, precision=precision)
    for rows in (slice(0, 1), slice(11, 14), slice(20, 50), slice(30, 140)):
        assert torch.equal(experts(x[rows], ids[rows], w[rows]), whole[rows])


@EVERY_VARIANT
def test_int8_rows_never_depend_on_the_batch(isa, fmt):
    weights = layer(fmt)
    experts = weights.pack(isa=isa, precision="int8")
    # A variant with tiles promises this for up to six tokens of an expert.
    tiles = "amx-tile" in features(isa)
    tokens = 6 if tiles else 50
    x, ids, w = args = inputs(weights, tokens=tokens)
    whole = experts(*args)
    for rows in (slice(0, 1), slice(1, 4), slice(tokens // 3, tokens)):
        assert torch.equal(experts(x[rows], ids[rows], w[rows]), whole[rows])
    if not tiles:
        assert torch.equal(
            whole, weights.pack(isa=isa, precision="int8", batch_invariant=True)(*args)
        )
