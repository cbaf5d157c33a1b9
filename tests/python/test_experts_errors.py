"""Arguments that are refused: each error says what was expected and what it got."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from moe_tools import EVERY_VARIANT, Inputs, inputs, layer

import cpumoe
from cpumoe import Experts, QuantizedMatrix, Runtime
from cpumoe.formats import WEIGHT_FORMATS, dtype_name


def refused(kind, message):
    """A context in which exactly this message must be raised."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4", hidden=64, intermediate=96)


@pytest.fixture(scope="module")
def experts(weights):
    return weights.pack()


@pytest.fixture
def args(weights):
    return inputs(weights, tokens=3)


@pytest.mark.parametrize(
    ("argument", "change", "kind", "message"),
    [
        (
            "hidden_states",
            lambda x: x.numpy(),
            TypeError,
            "hidden_states: expected a torch.Tensor, got ndarray",
        ),
        (
            "hidden_states",
            lambda x: x.double(),
            TypeError,
            "hidden_states: expected bfloat16, float16 or float32, got float64 [3, 64]",
        ),
        (
            "hidden_states",
            lambda x: x[:, :32],
            ValueError,
            "hidden_states: expected [tokens, 64], got [3, 32]",
        ),
        (
            "hidden_states",
            lambda x: x[None],
            ValueError,
            "hidden_states: expected [tokens, 64], got [1, 3, 64]",
        ),
        (
            "hidden_states",
            lambda x: x.to("meta"),
            TypeError,
            "hidden_states: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
        (
            "hidden_states",
            lambda x: x.to_sparse(),
            TypeError,
            "hidden_states: expected a dense tensor, got layout torch.sparse_coo; pass .to_dense()",
        ),
        (
            "topk_ids",
            lambda ids: ids.tolist(),
            TypeError,
            "topk_ids: expected a torch.Tensor, got list",
        ),
        (
            "topk_ids",
            lambda ids: ids.short(),
            TypeError,
            "topk_ids: expected int32 or int64, got int16 [3, 2]",
        ),
        (
            "topk_ids",
            lambda ids: ids[:2],
            ValueError,
            "topk_ids: expected [3, top_k], got [2, 2]",
        ),
        (
            "topk_ids",
            lambda ids: ids[:, 0],
            ValueError,
            "topk_ids: expected [3, top_k], got [3]",
        ),
        (
            "topk_ids",
            lambda ids: ids.to("meta"),
            TypeError,
            "topk_ids: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
        (
            "topk_weights",
            lambda w: w.tolist(),
            TypeError,
            "topk_weights: expected a torch.Tensor, got list",
        ),
        (
            "topk_weights",
            lambda w: w.double(),
            TypeError,
            "topk_weights: expected float32, bfloat16 or float16, got float64 [3, 2]",
        ),
        (
            "topk_weights",
            lambda w: w[:, :1],
            ValueError,
            "topk_weights: expected [3, 2] like topk_ids, got [3, 1]",
        ),
        (
            "topk_weights",
            lambda w: w.to("meta"),
            TypeError,
            "topk_weights: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
    ],
)
def test_call(experts, args, argument, change, kind, message):
    arguments = {**vars(args), argument: change(getattr(args, argument).float())}
    if argument == "topk_ids":
        arguments[argument] = change(args.topk_ids)
    for call in (experts, experts.submit):
        with refused(kind, message):
            call(**arguments)


@EVERY_VARIANT
def test_ids_out_of_range(isa, fmt):
    experts = layer(fmt).pack(isa=isa)
    args = inputs(layer(fmt), tokens=5, top_k=3)
    good = experts(*args)
    for bad in (-2, 5, 2**31 - 1):
        ids = args.topk_ids.clone()
        ids[3, 1] = bad
        message = (
            f"topk_ids[3, 1]: expert ids must be in [0, 4), or -1 or 4 for an expert to skip; "
            f"got {bad}"
        )
        for given in (ids, ids.int()):
            call = Inputs(args.hidden_states, given, args.topk_weights)
            with refused(IndexError, message):
                experts(*call)
            future = experts.submit(*call)
            with refused(IndexError, message):
                future.result()
            with refused(IndexError, message):  # and again
                future.result()
            assert future.done()
    assert torch.equal(experts(*args), good)


def test_closed_runtime(weights, args):
    with Runtime(1) as runtime:
        experts = weights.pack(runtime=runtime)
    message = "this Runtime is closed; create a new one"
    for call in (
        lambda: experts(*args),
        lambda: experts.submit(*args),
        lambda: experts.export(0),
        lambda: weights.pack(runtime=runtime),
    ):
        with refused(RuntimeError, message):
            call()


def test_export_of_an_expert_that_is_not_there(experts):
    for index in (-1, 4):
        with refused(IndexError, f"expert_id: expected 0..3, got {index}"):
            experts.export(index)
    with refused(TypeError, "expert_id: expected an int, got 1.5"):
        experts.export(1.5)


def test_unknown_names(weights):
    with refused(
        ValueError,
        f"weight format 'fp3' is not supported; supported: {', '.join(cpumoe.WEIGHT_FORMATS)}",
    ):
        Experts.from_tensors(**{**weights.tensors, "format": "fp3"})
    with refused(ValueError, "precision: expected one of auto, bf16, int8, got 'fp7'"):
        weights.pack(precision="fp7")


def test_fused_tokens(weights):
    with refused(
        ValueError,
        "few_token_limit: expected 0 or more, or None for the variant's limit, got -1",
    ):
        weights.pack(few_token_limit=-1)
    with refused(TypeError, "few_token_limit: expected an int, got 2.5"):
        weights.pack(few_token_limit=2.5)
    weights.pack(few_token_limit=2**40)  # more than the kernels are built for


MXFP4_CODES = " or ".join(dtype_name(dtype) for dtype in WEIGHT_FORMATS["mxfp4"].code_dtypes)


def damaged(weights, name, codes=None, scales=None):
    matrix = getattr(weights, name)
    codes = matrix.codes if codes is None else codes(matrix.codes)
    scales = matrix.scales if scales is None else scales(matrix.scales)
    return {**weights.tensors, name: (codes, scales)}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"name": "gate", "codes": lambda c: c.float()},
            TypeError,
            f"gate codes: expected {MXFP4_CODES}, got float32 [4, 96, 32]",
        ),
        (
            {"name": "up", "scales": lambda s: s.float()},
            TypeError,
            "up scales: expected float8_e8m0fnu or uint8, got float32 [4, 96, 2]",
        ),
        (
            {"name": "up", "codes": lambda c: c[0], "scales": lambda s: s[0]},
            ValueError,
            "up codes: expected [experts, N, K/2], got [96, 32]",
        ),
        (
            {"name": "gate", "codes": lambda c: c[:, :, :8].contiguous()},
            ValueError,
            "mxfp4: gate: K must be a positive multiple of 32, got 16",
        ),
        (
            {"name": "gate", "scales": lambda s: s[:, :, :1]},
            ValueError,
            "gate scales: expected [4, 96, 2], got [4, 96, 1]",
        ),
        (
            {"name": "up", "codes": lambda c: c[:3], "scales": lambda s: s[:3]},
            ValueError,
            "up: expected [4, 96, 64], got [3, 96, 64]",
        ),
        (
            {"name": "down", "codes": lambda c: c[:, :32], "scales": lambda s: s[:, :32]},
            ValueError,
            "down: expected [4, 64, 96], got [4, 32, 96]",
        ),
        (
            {"name": "down", "codes": lambda c: c.mT.contiguous().mT},
            ValueError,
            "down codes: the last dimension must be contiguous, got uint8 [4, 64, 48] with strides "
            "[3072, 1, 64]; pass .contiguous()",
        ),
        (
            {"name": "down", "codes": lambda c: c.to("meta")},
            TypeError,
            "down codes: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
    ],
)
def test_weights(weights, changes, kind, message):
    with refused(kind, message):
        Experts.from_tensors(**damaged(weights, **changes))


@pytest.mark.parametrize(
    ("gate", "kind"),
    [
        (lambda matrix: matrix.codes, "Tensor"),
        (lambda matrix: (matrix.codes,), "a tuple of 1"),
        (lambda matrix: (matrix.codes, matrix.scales, None), "a tuple of 3"),
    ],
)
def test_weights_that_are_no_pair(weights, gate, kind):
    message = f"gate: expected a QuantizedMatrix or a tuple (codes, scales), got {kind}"
    with refused(TypeError, message):
        Experts.from_tensors(**{**weights.tensors, "gate": gate(weights.gate)})


def test_no_experts(weights):
    none = {
        name: QuantizedMatrix(matrix.codes[:0], matrix.scales[:0])
        for name, matrix in (("gate", weights.gate), ("up", weights.up), ("down", weights.down))
    }
    with refused(ValueError, "num_experts must be positive, got 0"):
        Experts.from_tensors(**none, format="mxfp4")


@EVERY_VARIANT
def test_scales_that_are_not_finite(isa, fmt):
    weights = layer(fmt)
    bad = 255 if fmt == "mxfp4" else float("nan")

    def damage(scales):
        scales = scales.clone()
        scales[2, 5, 1] = bad
        return scales

    for name in ("gate", "up", "down"):
        message = (
            f"expert 2: {name}: scale [5, 1] is nan; {fmt} scales must be finite: "
            "the checkpoint is damaged"
        )
        with refused(ValueError, message):
            Experts.from_tensors(**damaged(weights, name, scales=damage), isa=isa)


def biases(**changes):
    zeros = {
        "gate_bias": torch.zeros(4, 96),
        "up_bias": torch.zeros(4, 96),
        "down_bias": torch.zeros(4, 64),
    }
    return {**zeros, **changes}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"up_bias": None, "down_bias": None},
            ValueError,
            "gate_bias, up_bias, down_bias: expected all three or none, got no up_bias, down_bias",
        ),
        (
            {"down_bias": torch.zeros(4, 96)},
            ValueError,
            "down_bias: expected [4, 64], got [4, 96]",
        ),
        (
            {"up_bias": torch.zeros(4, 96, dtype=torch.int64)},
            TypeError,
            "up_bias: expected bfloat16, float16 or float32, got int64 [4, 96]",
        ),
        (
            {"gate_bias": torch.zeros(4, 96, device="meta")},
            TypeError,
            "gate_bias: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
        (
            {"gate_bias": [[0.0] * 96] * 4},
            TypeError,
            "gate_bias: expected a torch.Tensor, got list",
        ),
    ],
)
def test_biases(weights, changes, kind, message):
    with refused(kind, message):
        Experts.from_tensors(**{**weights.tensors, **biases(**changes)})


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.zeros(4), TypeError, "expert_mask: expected bool, got float32 [4]"),
        (torch.zeros(5, dtype=torch.bool), ValueError, "expert_mask: expected [4], got [5]"),
        (
            torch.zeros(8, dtype=torch.bool)[::2],
            ValueError,
            "expert_mask: expected a contiguous tensor; pass .contiguous()",
        ),
        (
            torch.zeros(4, dtype=torch.bool, device="meta"),
            TypeError,
            "expert_mask: expected a CPU tensor, got device meta; move it with .cpu()",
        ),
        ([True] * 4, TypeError, "expert_mask: expected a torch.Tensor, got list"),
    ],
)
def test_mask(weights, mask, kind, message):
    with refused(kind, message):
        weights.pack(expert_mask=mask)
    experts = weights.pack()
    with refused(kind, message):
        experts.expert_mask = mask
    assert experts.expert_mask is None


def _packed(weights, **changes):
    """Packs expert by expert, like the experts of a reader."""
    first = cpumoe.ExpertWeights(weights.gate[0], weights.up[0], weights.down[0])
    options = {
        "format": weights.fmt,
        "num_experts": 1,
        "hidden_size": weights.down.shape[1],
        "intermediate_size": weights.gate.shape[1],
    }
    return Experts([dataclasses.replace(first, **changes)], **options)


def test_single_experts_are_checked_like_stacks(weights):
    gate = weights.gate[0]
    with refused(ValueError, "expert 0: gate scales: expected [96, 2], got [1, 1]"):
        _packed(weights, gate=QuantizedMatrix(gate.codes, gate.scales[:1, :1]))
    with pytest.raises(TypeError, match=r"^expert 0: gate scales: expected .* got float32"):
        _packed(weights, gate=QuantizedMatrix(gate.codes, gate.scales.float()))
    bias = torch.zeros(1)
    with refused(ValueError, "gate_bias: expected [96], got [1]"):
        _packed(weights, gate_bias=bias, up_bias=bias, down_bias=bias)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ({"num_experts": 1 << 40}, ValueError, "num_experts must be at most 65536"),
        ({"hidden_size": 1 << 40}, ValueError, "hidden_size must be at most"),
        (
            {"num_experts": 65536, "hidden_size": 1 << 21, "intermediate_size": 1 << 21},
            MemoryError,
            r"cannot allocate .* MiB for 65536 experts of .* MiB each",
        ),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(sizes, kind, message):
    options = {"num_experts": 1, "hidden_size": 64, "intermediate_size": 64} | sizes
    with pytest.raises(kind, match=message):
        Experts([], format="mxfp4", **options)


@pytest.mark.parametrize("threads", [2.5, "8", True])
def test_threads_that_are_no_number_are_refused(threads):
    with refused(TypeError, f"Runtime: threads must be an int, got {threads!r}"):
        Runtime(threads)


def test_timeouts(experts, args):
    future = experts.submit(*args)
    with refused(ValueError, "timeout: expected seconds, got nan"):
        future.result(timeout=float("nan"))
    assert future.result(timeout=1e300).shape == args.hidden_states.shape


def test_packed_experts_cannot_be_pickled(experts):
    with pytest.raises(TypeError, match=r"^Experts cannot be pickled or copied"):
        pickle.dumps(experts)
    with pytest.raises(TypeError, match=r"^Experts cannot be pickled or copied"):
        copy.deepcopy(experts)


def test_a_mask_resized_behind_our_back_is_refused(weights, args):
    mask = torch.zeros(weights.gate.shape[0], dtype=torch.bool)
    experts = weights.pack(expert_mask=mask)
    mask.resize_(1)
    with refused(ValueError, f"expert_mask: expected [{weights.gate.shape[0]}], got [1]"):
        experts(*args)
