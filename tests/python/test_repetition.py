"""Calls like an earlier one skip most checks, and are still refused whatever is wrong."""

import warnings

import pytest
import torch
from moe_tools import inputs, layer
from test_tensors import TRANSFORMS, WITHOUT_MEMORY, Marked
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from cpumoe import Runtime
from cpumoe._engine.calls import Calls

LAYOUTS = {
    "coo": (lambda t: t.to_sparse(), "got layout torch.sparse_coo"),
    "csr": (lambda t: t.to_sparse_csr(), "got layout torch.sparse_csr"),
    "mkldnn": (lambda t: t.float().to_mkldnn(), "got layout torch._mkldnn"),
}
DAMAGES = WITHOUT_MEMORY | LAYOUTS
ARGUMENTS = ("hidden_states", "topk_ids", "topk_weights", "out")


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4", bias=torch.bfloat16)


@pytest.fixture
def experts(weights):
    return weights.pack()


def arguments(weights, dtype=torch.float32, **kinds):
    return vars(inputs(weights, tokens=3, dtype=dtype)) | kinds


def primed(experts, given):
    """Makes a call, so that the next one like it is a repetition."""
    experts(**given)
    assert experts._calls._repetition[-1] is not None
    return experts


def repeats(monkeypatch):
    """From here on, a call that is no repetition is an error."""

    def checked(*_):
        raise AssertionError("the call was checked anew")

    monkeypatch.setattr(Calls, "_checked", checked)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_out", [False, True])
def test_calls_that_differ_in_memory_alone_are_repetitions(
    weights, experts, monkeypatch, mode, dtype, with_out
):
    with mode():
        first, second = (inputs(weights, tokens=3, dtype=dtype, seed=seed) for seed in (1, 2))
        expected = experts(*second, out_dtype=torch.float32)
        out = torch.empty(3, weights.hidden) if with_out else None
        primed(experts, vars(first) | {"out": out})
        repeats(monkeypatch)
        out = torch.empty(3, weights.hidden) if with_out else None
        result = experts(*second, out=out)
        assert out is None or result is out
        assert torch.equal(result, expected.to(result.dtype))
        assert result.dtype == (torch.float32 if with_out else dtype)
        assert torch.equal(experts.submit(*second, out=out).result(), result)


def test_views_of_rows_are_repetitions(weights, experts, monkeypatch):
    x, ids, w = inputs(weights, tokens=3)
    expected = experts(x, ids, w)
    wide = torch.cat((x, x), 1)
    primed(experts, {"hidden_states": wide[:, :160], "topk_ids": ids, "topk_weights": w})
    repeats(monkeypatch)
    assert torch.equal(experts(wide[:, 160:], ids, w), expected)
    tail = torch.cat((torch.zeros(1, 320, dtype=x.dtype), wide))[1:, 160:]
    assert torch.equal(experts(tail, ids, w), expected)


@pytest.mark.parametrize(("damage", "why"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_is_not_in_memory_is_refused(weights, experts, argument, damage, why):
    given = arguments(weights, out=torch.empty(3, weights.hidden))
    if argument != "out":
        del given["out"]
    primed(experts, given)
    damaged = given | {argument: damage(given[argument].clone())}
    for call in (experts, experts.submit):
        with pytest.raises(TypeError) as error:
            call(**damaged)
        assert str(error.value).startswith(f"{argument}: expected ")
        assert why in str(error.value)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_other_classes_shapes_and_dtypes_are_checked_anew(weights, experts, argument):
    given = arguments(weights, out=torch.empty(3, weights.hidden))
    primed(experts, given)
    tensor = given[argument]
    for other in (tensor.tolist(), None if argument != "out" else 3, tensor[:2], tensor.short()):
        with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected|^topk_"):
            experts(**given | {argument: other})


def test_results_of_calls_that_are_not_alike_are_right(weights, experts):
    given = arguments(weights)
    expected = primed(experts, given)(**given)
    x = given["hidden_states"]
    for other in (
        x.T.contiguous().T,
        torch.cat((x, x), 1)[:, : weights.hidden],
        x.as_subclass(Marked),
        torch.nn.Parameter(x, requires_grad=False),
        torch.complex(x, -x).conj().imag,
    ):
        primed(experts, given)
        assert torch.equal(experts(**given | {"hidden_states": other}), expected)
    for tokens in (1, 2, 0, 3):
        rows = {name: tensor[:tokens] for name, tensor in given.items()}
        torch.testing.assert_close(experts(**rows), expected[:tokens])
    assert torch.equal(experts(**given | {"topk_ids": given["topk_ids"].int()}), expected)
    assert experts(**given, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert experts(**given).dtype == torch.float32


def test_an_overlapping_buffer_is_refused(weights, experts):
    given = arguments(weights, out=torch.empty(3, weights.hidden))
    primed(experts, given)
    with pytest.raises(ValueError, match=r"^out: expected memory that hidden_states does not use"):
        experts(**given | {"out": given["hidden_states"]})


@pytest.mark.parametrize("argument", ["hidden_states", "topk_weights"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_gradients_are_refused(weights, experts, argument, mode):
    given = arguments(weights)
    wanted = given | {argument: given[argument].clone().requires_grad_()}
    with torch.no_grad():
        experts(**wanted)
    with mode():
        primed(experts, given)
    result = experts(**wanted)
    with pytest.raises(RuntimeError, match=r"^cpumoe's layers compute no gradients"):
        result.sum().backward()
    primed(experts, given)
    x = given["hidden_states"]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="compute no gradients"):
        experts(**given | {"hidden_states": forward_ad.make_dual(x, x)})


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_are_refused(weights, experts, transform):
    given = arguments(weights)
    primed(experts, given)
    x = given.pop("hidden_states")
    with pytest.raises(TypeError, match=r"^hidden_states: expected .*(torch\.func|functionali)"):
        transform(lambda states: experts(states, **given), x)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracers_record_the_operator(weights, experts, mode, pre_dispatch):
    given = arguments(weights)
    primed(experts, given)
    trace = make_fx(lambda *args: experts(*args), tracing_mode=mode, pre_dispatch=pre_dispatch)
    assert "cpumoe.experts.default" in trace(*given.values()).code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(experts.__call__, tuple(given.values()))
    assert "cpumoe::experts" in str(traced.graph)
    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensorMode cannot record"):
        experts(**given)


def test_modes_that_look_on_change_nothing_and_are_not_taken_for_none(weights, experts):
    given = arguments(weights)
    expected = primed(experts, given)(**given)
    with FlopCounterMode(display=False), torch.device("meta"):
        assert torch.equal(experts(**given), expected)
        assert torch.equal(experts(**given), expected)
    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensorMode cannot record"):
        experts(**given)
    primed(experts, given)
    with torch.device("meta"):
        assert torch.equal(experts(**given), expected)


def test_the_setting_for_fp32_is_read_each_time(weights, experts):
    given = arguments(weights)
    primed(experts, given)
    before = experts._prepare(*given.values()).engine
    assert experts._prepare(*given.values()).engine is before
    torch.set_float32_matmul_precision("medium")
    try:
        assert experts._prepare(*given.values()).engine is not before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_mask_and_another_runtime_take_effect(weights, experts):
    given = arguments(weights)
    expected = primed(experts, given)(**given)
    experts.expert_mask = torch.ones(weights.num_experts, dtype=torch.bool)
    assert not experts(**given).any()
    experts.expert_mask = None
    primed(experts, given)
    with Runtime(1) as runtime:
        experts.runtime = runtime
        assert torch.equal(primed(experts, given)(**given), expected)
    with pytest.raises(RuntimeError, match="this Runtime is closed"):
        experts(**given)
    experts.runtime = None
    assert torch.equal(experts(**given), expected)


@pytest.mark.parametrize("guards", [None, lambda *tensors: None], ids=["none", "of another kind"])
def test_without_guards_every_call_is_checked(weights, experts, monkeypatch, guards):
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", guards)
    given = arguments(weights)
    assert torch.equal(experts(**given), experts(**given))
    assert experts._calls._repetition[-1] is None
