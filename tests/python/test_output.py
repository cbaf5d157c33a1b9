"""The result of a call: its dtype, the caller's buffer, sums onto it, and copied inputs."""

import pytest
import torch
from moe_tools import EVERY_VARIANT, inputs, layer, refused
from test_tensors import WITHOUT_MEMORY, Marked
from torch._subclasses.fake_tensor import FakeTensorMode

from cpumoe import Runtime

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def called(experts, args, **options):
    return experts(*args, **options)


def submitted(experts, args, **options):
    return experts.submit(*args, **options).result()


def submitted_copies(experts, args, **options):
    return experts.submit(*args, **options, copy_inputs=True).result()


CALLS = pytest.mark.parametrize("call", [called, submitted, submitted_copies])


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4", bias=torch.bfloat16)


@pytest.fixture(scope="module")
def experts(weights):
    return weights.pack()


@EVERY_VARIANT
@EVERY_DTYPE
def test_the_result_is_the_fp32_sum_rounded_once_to_nearest_even(isa, fmt, dtype):
    experts = layer(fmt).pack(isa=isa)
    for tokens in (1, 3, 40):
        args = inputs(layer(fmt), tokens=tokens, dtype=dtype)
        exact = experts(*args, out_dtype=torch.float32)
        assert exact.dtype == torch.float32
        for narrow in DTYPES:
            assert torch.equal(experts(*args, out_dtype=narrow), exact.to(narrow))
        assert torch.equal(experts(*args), exact.to(dtype))


@CALLS
@EVERY_DTYPE
def test_a_callers_buffer_gets_the_result_and_is_returned(weights, experts, call, dtype):
    args = inputs(weights, tokens=5)
    whole = torch.full((7, weights.hidden), 3, dtype=dtype)
    out = whole[1:6]
    assert call(experts, args, out=out) is out
    assert torch.equal(out, experts(*args, out_dtype=dtype))
    assert (whole[[0, 6]] == 3).all()
    assert call(experts, args, out=out, out_dtype=dtype) is out


@CALLS
def test_accumulating_adds_the_finished_fp32_sum_with_one_rounding(weights, experts, call):
    args = inputs(weights, tokens=5)
    out = torch.randn(5, weights.hidden)
    expected = out + experts(*args, out_dtype=torch.float32)
    assert call(experts, args, out=out, accumulate=True) is out
    assert torch.equal(out, expected)


@EVERY_VARIANT
def test_two_halves_of_the_experts_add_up_to_all_of_them(isa, fmt):
    args = inputs(layer(fmt), tokens=5, top_k=3)
    mask = torch.tensor([True, False, False, True])
    halves = [layer(fmt).pack(isa=isa, expert_mask=m) for m in (mask, ~mask)]
    out = torch.zeros(5, layer(fmt).hidden)
    for half in halves:
        half(*args, out=out, accumulate=True)
    first, second = (half(*args, out_dtype=torch.float32) for half in halves)
    assert torch.equal(out, first + second)
    whole = layer(fmt).pack(isa=isa)(*args, out_dtype=torch.float32)
    # The sums have another order, so each addition may round differently.
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_skipped_tokens_keep_what_was_accumulated(weights, experts):
    x, ids, w = inputs(weights, tokens=3)
    out = torch.randn(3, weights.hidden)
    before = out.clone()
    experts(x, torch.full_like(ids, -1), w, out=out, accumulate=True)
    assert torch.equal(out, before)
    experts(x, torch.full_like(ids, -1), w, out=out)
    assert not out.any()


@CALLS
def test_no_tokens_need_no_buffer(weights, experts, call):
    x, ids, w = inputs(weights, tokens=3)
    args = (x[:0], ids[:0], w[:0])
    out = torch.empty(0, weights.hidden)
    assert call(experts, args, out=out) is out
    assert call(experts, args, out=out, accumulate=True) is out
    assert call(experts, args, out_dtype=torch.float32).dtype == torch.float32


def test_copied_inputs_may_be_overwritten_at_once(weights):
    with Runtime(1) as runtime:
        experts = weights.pack(runtime=runtime)
        x, ids, w = inputs(weights, tokens=300)
        wide = torch.cat((x, x), 1)
        expected = experts(x, ids, w)
        busy = experts.submit(x, ids, w)  # keeps the driver from starting the next calls
        futures = []
        for states in (x.clone(), wide[:, : weights.hidden]):
            given = (states, ids.clone(), w.clone())
            futures.append(experts.submit(*given, copy_inputs=True))
            for tensor in given:
                tensor.zero_()
        assert torch.equal(busy.result(), expected)
        for future in futures:
            assert torch.equal(future.result(), expected)


def test_copied_inputs_may_lie_where_the_result_goes(weights, experts):
    x, ids, w = inputs(weights, tokens=5)
    expected = experts(x, ids, w)
    assert experts.submit(x, ids, w, out=x, copy_inputs=True).result() is x
    assert torch.equal(x, expected)


def test_a_buffer_of_another_class_gets_the_result(weights, experts):
    args = inputs(weights, tokens=3)
    expected = experts(*args, out_dtype=torch.float32)
    for out in (
        torch.empty_like(expected).as_subclass(Marked),
        torch.nn.Parameter(torch.empty_like(expected)),
    ):
        with torch.no_grad():
            assert experts(*args, out=out) is out
        assert torch.equal(out.detach().as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd_do_not_matter_if_nothing_requires_a_gradient(weights, experts, mode):
    args = inputs(weights, tokens=3)
    expected = experts(*args)
    with mode():
        inside = torch.empty_like(expected)
        assert torch.equal(experts(*args, out=inside), expected)
    assert experts(*args, out=inside.zero_() if mode is torch.no_grad else inside) is inside
    assert torch.equal(inside, expected)


def test_autocast_changes_neither_values_nor_dtypes(weights, experts):
    for dtype in DTYPES:
        args = inputs(weights, tokens=3, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = experts(*args)
            out = experts(*args, out=torch.empty(3, weights.hidden))
        assert result.dtype == dtype
        assert torch.equal(result, experts(*args))
        assert torch.equal(out, experts(*args, out_dtype=torch.float32))


@CALLS
@pytest.mark.parametrize("which", ["hidden_states", "topk_weights", "out"])
def test_a_buffer_is_refused_if_something_requires_a_gradient(weights, experts, call, which):
    x, ids, w = inputs(weights, tokens=3, dtype=torch.float32)
    out = torch.zeros_like(x)
    tensors = {"hidden_states": x, "topk_weights": w, "out": out}
    tensors[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^out: expected no tensor that requires a gradient;"):
        call(experts, (x, ids, w), out=out)
    assert not out.any()
    with torch.no_grad():
        assert call(experts, (x, ids, w), out=out) is out
    assert out.any()


def test_a_buffer_is_refused_in_forward_mode_differentiation(weights, experts):
    x, ids, w = inputs(weights, tokens=3, dtype=torch.float32)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        experts(x, ids, w, out=torch.empty_like(x))
        for states, out in (
            (forward_ad.make_dual(x, x), torch.empty_like(x)),
            (x, forward_ad.make_dual(torch.empty_like(x), x)),
        ):
            with pytest.raises(RuntimeError, match=r"^cpumoe's layers compute no gradients"):
                experts(states, ids, w, out=out)


def test_autograd_notices_that_a_saved_tensor_was_overwritten(weights, experts):
    args = inputs(weights, tokens=3)
    leaf = torch.ones(3, weights.hidden, requires_grad=True)
    out = torch.ones(3, weights.hidden)
    product = leaf * out
    experts(*args, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"out": [1.0]},
            TypeError,
            "out: expected a torch.Tensor, got list",
        ),
        (
            {"out": torch.empty(3, 160, dtype=torch.float64)},
            TypeError,
            "out: expected bfloat16, float16 or float32, got float64 [3, 160]",
        ),
        (
            {"out": torch.empty(2, 160)},
            ValueError,
            "out: expected [3, 160], got [2, 160]",
        ),
        (
            {"out": torch.empty(160, 3).T},
            ValueError,
            "out: expected a contiguous tensor, got strides [1, 3]; pass a contiguous tensor and "
            "copy from it",
        ),
        (
            {"out": torch.empty(3, 320)[:, :160]},
            ValueError,
            "out: expected a contiguous tensor, got strides [320, 1]; pass a contiguous tensor and "
            "copy from it",
        ),
        (
            {"out": torch.empty(1, 160).expand(3, 160)},
            ValueError,
            "out: expected a contiguous tensor, got strides [0, 1]; pass a contiguous tensor and "
            "copy from it",
        ),
        (
            {"out": torch.complex(torch.empty(3, 160), torch.empty(3, 160)).conj().imag},
            TypeError,
            "out: expected a tensor without lazy negation; pass a new tensor",
        ),
        (
            {"out": torch.empty(3, 160), "out_dtype": torch.bfloat16},
            TypeError,
            "out: expected bfloat16 like out_dtype, got float32 [3, 160]; leave out_dtype out",
        ),
        (
            {"out_dtype": torch.float64},
            TypeError,
            "out_dtype: expected torch.bfloat16, torch.float16 or torch.float32, got torch.float64",
        ),
        (
            {"out_dtype": "float32"},
            TypeError,
            "out_dtype: expected torch.bfloat16, torch.float16 or torch.float32, got 'float32'",
        ),
        (
            {"accumulate": True},
            ValueError,
            "accumulate: expected out=, the tensor to add onto, got None",
        ),
        (
            {"accumulate": True, "out_dtype": torch.float32},
            ValueError,
            "accumulate: expected out=, the tensor to add onto, got None",
        ),
        (
            {"accumulate": True, "out": torch.empty(3, 160, dtype=torch.bfloat16)},
            TypeError,
            "out: expected float32 to accumulate onto, got bfloat16 [3, 160]",
        ),
    ],
)
def test_options_that_do_not_fit(weights, experts, options, kind, message):
    args = inputs(weights, tokens=3)
    for call in (called, submitted, submitted_copies):
        with refused(kind, message):
            call(experts, args, **options)


@pytest.mark.parametrize(("damage", "why"), WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
def test_a_buffer_that_is_not_in_memory_is_refused(weights, experts, damage, why):
    args = inputs(weights, tokens=3)
    for call in (called, submitted):
        with pytest.raises(TypeError, match=rf"^out: expected .*{why.replace('[', '.')}"):
            call(experts, args, out=damage(torch.empty(3, weights.hidden)))


def test_a_buffer_in_an_inputs_memory_is_refused(weights, experts):
    x, ids, w = inputs(weights, tokens=3, dtype=torch.float32)
    both = torch.cat((x, x))
    wide = torch.cat((x, x), 1)
    room = torch.zeros(3 * weights.hidden)
    room_for_ids = room.view(torch.int64)[-ids.numel() :].view_as(ids).copy_(ids)
    room_for_weights = room[2 : 2 + w.numel()].view_as(w).copy_(w)
    for name, args, out in (
        ("hidden_states", (x, ids, w), x),
        ("hidden_states", (both[:3], ids, w), both[2:5]),
        ("hidden_states", (wide[:, : weights.hidden], ids, w), wide.view(6, -1)[3:]),
        ("topk_ids", (x, room_for_ids, w), room.view_as(x)),
        ("topk_weights", (x, ids, room_for_weights), room.view_as(x)),
    ):
        with refused(
            ValueError,
            f"out: expected memory that {name} does not use, got a tensor that overlaps it; pass a "
            "tensor with memory of its own",
        ):
            experts(*args, out=out)
    assert experts(both[:3], ids, w, out=both[3:]).data_ptr() == both[3:].data_ptr()


def test_a_buffer_in_the_masks_memory_is_refused(weights):
    args = inputs(weights, tokens=3, dtype=torch.float32)
    buffer = torch.zeros(3, weights.hidden)
    mask = buffer.view(-1)[:2].view(torch.bool)[:4]
    experts = weights.pack(expert_mask=mask)
    for _ in range(2):  # the second call is like the first one
        with pytest.raises(ValueError, match="out: expected memory that expert_mask does not use"):
            experts(*args, out=buffer)
    assert torch.equal(experts(*args, out=buffer.clone()), experts(*args))


def test_tracers_record_the_operator_with_a_buffer_too(weights, experts):
    args = inputs(weights, tokens=3)
    out = torch.empty(3, weights.hidden)
    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensorMode"):
        experts(*args, out=out)
    traced = torch.jit.trace(lambda *given: experts(*given, out=out), tuple(args))
    assert "cpumoe::experts" in str(traced.graph)
    assert torch.equal(traced(*args), experts(*args, out_dtype=torch.float32))


def test_an_id_out_of_range_is_reported_with_a_buffer_too(weights, experts):
    x, ids, w = inputs(weights, tokens=3)
    out = torch.zeros(3, weights.hidden)
    with pytest.raises(IndexError, match=r"^topk_ids\[0, 0\]"):
        experts(x, torch.full_like(ids, 77), w, out=out, accumulate=True)
    assert torch.equal(experts(x, ids, w, out=out), experts(x, ids, w, out_dtype=out.dtype))
