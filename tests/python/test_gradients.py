"""Experts compute no gradients: the forward pass may be recorded, its derivative is an error."""

import pytest
import torch
from moe_tools import inputs, layer
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

REMEDY = r"^cpumoe's layers compute no gradients; call them under torch\.no_grad\(\).*own layers$"


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4")


@pytest.fixture(scope="module")
def experts(weights):
    return weights.pack()


@pytest.fixture
def args(weights):
    return tuple(inputs(weights, tokens=3, dtype=torch.float32))


def refused():
    return pytest.raises(RuntimeError, match=REMEDY)


def called(experts, args):
    return experts(*args)


def submitted(experts, args):
    return experts.submit(*args).result()


CALLS = pytest.mark.parametrize("call", [called, submitted])


@CALLS
@pytest.mark.parametrize("argument", [0, 2], ids=["hidden_states", "topk_weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_is_refused(experts, args, call, argument, dtype):
    args = tuple(t.to(dtype) if t.is_floating_point() else t for t in args)
    expected = call(experts, args)
    args[argument].requires_grad_()
    result = call(experts, args)
    assert torch.equal(result, expected)
    assert result.requires_grad
    with refused():
        result.sum().backward()
    with refused():
        torch.autograd.grad(call(experts, args).sum(), args[argument], create_graph=True)
    assert args[argument].grad is None


@CALLS
def test_what_is_computed_before_the_experts_gets_no_gradient(experts, args, call):
    x, ids, w = args
    embedding = x.clone().requires_grad_()
    result = 2 * call(experts, (embedding * 3, ids, w)) + embedding
    with refused():
        result.sum().backward()
    assert embedding.grad is None


@CALLS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(experts, args, call, mode):
    args[0].requires_grad_()
    with mode():
        assert not call(experts, args).requires_grad
    args[0].requires_grad_(False)
    assert not call(experts, args).requires_grad


def test_tensors_of_inference_mode_may_be_inputs(experts, args):
    x, ids, w = args
    with torch.inference_mode():
        states = x * 1
    assert torch.equal(experts(states, ids, w.requires_grad_()), experts(x, ids, w.detach()))


@CALLS
def test_results_may_be_changed_in_place(experts, args, call):
    x, ids, w = args
    expected = call(experts, args) + 1
    result = call(experts, (x.requires_grad_(), ids, w))
    result += 1
    assert torch.equal(result, expected)
    with refused():
        result.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_ends_in_the_same_error(experts, args, reentrant):
    x, ids, w = args

    def block(states):
        return experts(states.sin(), ids, w).sin()

    result = checkpoint(block, x.requires_grad_(), use_reentrant=reentrant)
    with refused():
        result.sum().backward()


@CALLS
def test_forward_mode_is_refused_at_once(experts, args, call):
    x, ids, w = args
    expected = call(experts, args)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with refused():
            call(experts, (dual, ids, w))
        with torch.no_grad(), refused():
            call(experts, (x, ids, forward_ad.make_dual(w, w)))
        assert torch.equal(call(experts, args), expected)


def test_a_result_can_be_asked_for_twice(experts, args):
    x, ids, w = args
    future = experts.submit(x.requires_grad_(), ids, w)
    assert future.result() is future.result()
    with refused():
        future.result().sum().backward()
