"""Arguments of a wrong kind, such as "no" for a bool, are refused wherever a user passes them."""

import copy
import pickle

import pytest
import torch
from checkpoint_tools import write_small
from moe_tools import inputs, layer, refused

import cpumoe
from cpumoe import Experts, ExpertsOptions, Runtime


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4", hidden=64, intermediate=96)


@pytest.fixture(scope="module")
def experts(weights):
    return weights.pack()


@pytest.fixture
def args(weights):
    return inputs(weights, tokens=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("checkpoint"), "v4-flash")


@pytest.mark.parametrize("value", ["no", None, 2])
def test_flags_of_calls(experts, args, value):
    out = torch.empty(args.hidden_states.shape)
    experts(*args, out=out, accumulate=True)  # what is kept of a call accepts no other flag
    for call in (experts, experts.submit):
        for options in ({}, {"out": out}):
            with refused(TypeError, f"accumulate: expected a bool, got {value!r}"):
                call(*args, **options, accumulate=value)
    with refused(TypeError, f"copy_inputs: expected a bool, got {value!r}"):
        experts.submit(*args, copy_inputs=value)


def test_sums_are_accumulated_in_fp32(experts, args):
    out = torch.zeros(args.hidden_states.shape)
    expected = experts(*args, out_dtype=torch.float32)
    with refused(
        TypeError,
        "out_dtype: expected torch.float32 with accumulate, which adds onto out in fp32, got "
        "torch.bfloat16; leave out_dtype out",
    ):
        experts(*args, out=out, out_dtype=torch.bfloat16, accumulate=True)
    assert torch.equal(experts(*args, out=out, out_dtype=torch.float32, accumulate=True), expected)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (
            torch.empty(3, 64),
            "out: expected a meta tensor like the inputs, got device cpu; pass an out on the "
            "device of the inputs",
        ),
        ("x", "out: expected a torch.Tensor, got str"),
    ],
)
def test_out_of_inputs_without_memory(experts, args, out, message):
    with refused(TypeError, message):
        experts(*(tensor.to("meta") for tensor in args), out=out)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("isa", 5, "isa: expected a variant's name, or None for the best one, got 5; known are"),
        ("batch_invariant", "yes", "batch_invariant: expected a bool, got 'yes'"),
        ("batch_invariant", None, "batch_invariant: expected a bool, got None"),
        ("runtime", 3, "runtime: expected a cpumoe.Runtime, or None for the shared one, got 3"),
        ("few_token_limit", True, "few_token_limit: expected an int, got True"),
    ],
)
def test_options(weights, option, value, message):
    for make in (ExpertsOptions, weights.pack):
        with pytest.raises(TypeError) as caught:
            make(**{option: value})
        assert str(caught.value).startswith(message)


def test_any_large_few_token_limit_is_accepted(weights, args):
    expected = weights.pack(few_token_limit=2**20)(*args)
    assert torch.equal(weights.pack(few_token_limit=10**30)(*args), expected)


def test_an_assigned_runtime(experts):
    runtime = experts.runtime
    with refused(
        TypeError, "runtime: expected a cpumoe.Runtime, or None for the shared one, got 3"
    ):
        experts.runtime = 3
    assert experts.runtime is runtime


def test_runtimes():
    with refused(TypeError, "Runtime: pin: expected a bool, got 'no'"):
        Runtime(pin="no")
    with Runtime(1) as runtime:
        for function in (pickle.dumps, copy.copy, copy.deepcopy):
            with refused(
                TypeError,
                "Runtime cannot be pickled or copied, because its threads belong to this process; "
                "make another one",
            ):
                function(runtime)


@pytest.mark.parametrize(
    ("argument", "value", "kind", "message"),
    [
        (
            "activation",
            "silu",
            TypeError,
            "activation: expected a cpumoe.SwiGLU, another cpumoe.GLU, or None for the default, "
            "got 'silu'",
        ),
        ("num_experts", "3", TypeError, "num_experts: expected an int, got '3'"),
        ("num_experts", True, TypeError, "num_experts: expected an int, got True"),
        ("hidden_size", 64.0, TypeError, "hidden_size: expected an int, got 64.0"),
        (
            "intermediate_size",
            10**30,
            ValueError,
            f"intermediate_size: expected at most {2**63 - 1}, got {10**30}",
        ),
        ("has_bias", "no", TypeError, "has_bias: expected a bool, got 'no'"),
        ("pack_masked", "False", TypeError, "pack_masked: expected a bool, got 'False'"),
    ],
)
def test_descriptions_of_a_layer(argument, value, kind, message):
    sizes = {"num_experts": 3, "hidden_size": 64, "intermediate_size": 64}
    with refused(kind, message):
        Experts([], format="mxfp4", **{**sizes, argument: value})


@pytest.mark.parametrize("given", [None, 3])
def test_a_source_that_returns_no_weights(weights, given):
    mask = torch.ones(weights.num_experts, dtype=torch.bool)
    experts = weights.pack(expert_mask=mask, pack_masked=False)
    with refused(
        TypeError,
        f"expert 1: expected ExpertWeights from the source, got {type(given).__name__}; pass a "
        "source that returns them for each expert",
    ):
        experts.pack([1], lambda _: given)
    assert experts.packed_experts == []


def test_ids_of_experts(experts):
    with refused(TypeError, "experts: expected the ids of experts, got 5; pass a list"):
        experts.pack(5)
    for ids in ([True], {True}):
        with refused(TypeError, "experts: expected an int, got True"):
            experts.pack(ids)
    with refused(TypeError, "expert_id: expected an int, got True"):
        experts.export(True)


@pytest.mark.parametrize("bounds", [slice("a", "b"), slice(0, 1.5)])
def test_bounds_of_a_shard(experts, bounds):
    whole = experts.export(0)
    buffers = {"gate": whole.gate, "up": whole.up, "down": whole.down}
    with refused(TypeError, f"intermediate: expected bounds that are ints or None, got {bounds}"):
        experts.export_into(0, **buffers, intermediate=bounds)


@pytest.mark.parametrize("timeout", ["1", [1]])
def test_timeouts(experts, args, timeout):
    future = experts.submit(*args)
    with refused(
        TypeError, f"timeout: expected seconds as a number, or None for no limit, got {timeout!r}"
    ):
        future.result(timeout)
    assert torch.equal(future.result(60), experts(*args))


@pytest.mark.parametrize(
    ("path", "kind", "got"),
    [
        (None, TypeError, "expected a str or an os.PathLike of a folder, got None"),
        (5, TypeError, "expected a str or an os.PathLike of a folder, got 5"),
        (b"ck1", TypeError, "expected a str or an os.PathLike of a folder, got b'ck1'"),
        (
            "",
            ValueError,
            "expected a checkpoint's folder, got ''; pass '.' for the working directory",
        ),
    ],
)
def test_paths(path, kind, got):
    for opened in (cpumoe.open_checkpoint, lambda path: Experts.from_checkpoint(path, 0)):
        with refused(kind, f"path: {got}"):
            opened(path)


@pytest.mark.parametrize("index", ["0", None, True, 0.0])
def test_layers(checkpoint, index):
    with refused(TypeError, f"layer: expected an int, got {index!r}"):
        Experts.from_checkpoint(checkpoint, index)
    with (
        cpumoe.open_checkpoint(checkpoint) as reader,
        refused(TypeError, f"layer: expected an int, got {index!r}"),
    ):
        reader.expert(index, 0)
    with (
        cpumoe.open_checkpoint(checkpoint) as reader,
        refused(TypeError, f"index: expected an int, got {index!r}"),
    ):
        reader.expert(0, index)


NO_SEQUENCE = "experts: expected a sequence of ints, got {}; pass a list, whose order the layer's "


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({1, 2}, NO_SEQUENCE.format("set")),
        ({1: 2}, NO_SEQUENCE.format("dict")),
        ((i for i in (1, 2)), NO_SEQUENCE.format("generator")),
        ("12", NO_SEQUENCE.format("str")),
        (torch.tensor(1), NO_SEQUENCE.format("Tensor")),
        ([True], "experts[0]: expected an int, got True"),
        (torch.tensor([True]), "experts[0]: expected an int, got True"),
        (torch.tensor([1.0]), "experts[0]: expected an int, got 1.0"),
        (torch.tensor([[0, 1]]), "experts[0]: expected an int, got [0, 1]"),
    ],
)
def test_chosen_experts(checkpoint, experts, message):
    with pytest.raises(TypeError) as caught:
        Experts.from_checkpoint(checkpoint, 0, experts=experts, progress=False)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_sequences_choose_experts_in_their_order(checkpoint, kind):
    chosen = Experts.from_checkpoint(checkpoint, 0, experts=kind([2, 1, 0]), progress=False)
    reversed_range = Experts.from_checkpoint(
        checkpoint, 0, experts=range(2, -1, -1), progress=False
    )
    whole = Experts.from_checkpoint(checkpoint, 0, progress=False)
    for one in (chosen, reversed_range):
        assert torch.equal(one.export(0).gate.codes, whole.export(2).gate.codes)
