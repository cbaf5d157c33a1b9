"""Arguments of layers and calls that are refused: errors say what was expected and got."""

import copy
import pickle

import pytest
import torch
from moe_tools import EVERY_VARIANT, Inputs, inputs, layer, refused

import cpumoe
from cpumoe import Experts, Runtime


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


def test_few_token_limit(weights):
    with refused(
        ValueError,
        "few_token_limit: expected 0 or more, or None for the variant's limit, got -1",
    ):
        weights.pack(few_token_limit=-1)
    with refused(TypeError, "few_token_limit: expected an int, got 2.5"):
        weights.pack(few_token_limit=2.5)
    weights.pack(few_token_limit=2**40)  # more than the kernels are built for


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.zeros(4), TypeError, "expert_mask: expected bool, got float32 [4]"),
        (torch.zeros(5, dtype=torch.bool), ValueError, "expert_mask: expected [4], got [5]"),
        (
            torch.zeros(8, dtype=torch.bool)[::2],
            ValueError,
            "expert_mask: expected a contiguous tensor, got strides [2]; pass .contiguous()",
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


@pytest.mark.parametrize("threads", [2.5, "8", True])
def test_threads_that_are_no_number_are_refused(threads):
    with refused(TypeError, f"Runtime: threads: expected an int, got {threads!r}"):
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
