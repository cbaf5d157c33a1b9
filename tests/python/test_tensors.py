"""Checks before C++: a tensor that is not in memory as it seems is refused by name."""

import re

import pytest
import torch
from moe_tools import inputs, layer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import cpumoe
from cpumoe import Experts, QuantizedMatrix
from cpumoe._base.tensors import address


class Wrapped(torch.Tensor):
    """A class that keeps its data elsewhere."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was computed")


class Marked(torch.Tensor):
    """A class that is a tensor like any other."""


def freed(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_behind_its_first_row(tensor):
    tensor = torch.cat((tensor[:1], tensor))[1:]
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_short(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


def zeros(tensor):
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


# Tensors of each kind, and the reason for refusing them.
WITHOUT_MEMORY = {
    "fake": (lambda t: FakeTensorMode().from_tensor(t), "with memory, got FakeTensor"),
    "wrapper": (Wrapped, "with memory, got Wrapped"),
    "meta": (lambda t: t.to("meta"), "a CPU tensor, got device meta"),
    "zeros": (zeros, "zeros that have none"),
    "functional": (torch._to_functional_tensor, "functionalized"),
    "freed": (freed, "freed or cut: it has 0 of"),
    "freed view": (freed_behind_its_first_row, "freed or cut: it has 0 of"),
    "cut short": (cut_short, "freed or cut: it has"),
    "nested": (
        lambda t: torch.nested.nested_tensor([t]),
        "a dense tensor, got layout torch.nested",
    ),
}
KINDS = pytest.mark.parametrize(("damage", "why"), WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)


def refused(name, why):
    return pytest.raises(TypeError, match=f"^{re.escape(name)}: expected .*{re.escape(why)}")


@pytest.fixture(scope="module")
def weights():
    return layer("mxfp4", bias=torch.bfloat16)


@pytest.fixture(scope="module")
def experts(weights):
    return weights.pack()


@KINDS
@pytest.mark.parametrize("argument", ["hidden_states", "topk_ids", "topk_weights"])
def test_a_call_refuses_what_is_not_in_memory(weights, experts, argument, damage, why):
    arguments = vars(inputs(weights, tokens=3))
    arguments = {**arguments, argument: damage(arguments[argument])}
    for call in (experts, experts.submit):
        with refused(argument, why):
            call(**arguments)


@KINDS
def test_a_mask_that_is_not_in_memory_does_not_mean_no_mask(weights, damage, why):
    mask = torch.ones(weights.num_experts, dtype=torch.bool)
    with refused("expert_mask", why):
        weights.pack(expert_mask=damage(mask))
    experts = weights.pack()
    with refused("expert_mask", why):
        experts.expert_mask = damage(mask)
    assert experts.expert_mask is None


def test_a_mask_that_is_freed_later_is_refused(weights):
    mask = torch.ones(weights.num_experts, dtype=torch.bool)
    experts = weights.pack(expert_mask=mask)
    mask.untyped_storage().resize_(0)
    with refused("expert_mask", "it has 0 of 4 bytes"):
        experts(*inputs(weights, tokens=3))


@KINDS
def test_weights_that_are_not_in_memory_are_refused(weights, damage, why):
    codes, scales = weights.up.codes, weights.up.scales
    for matrix, name in (
        (QuantizedMatrix(damage(codes), scales), "up codes"),
        (QuantizedMatrix(codes, damage(scales)), "up scales"),
    ):
        with refused(name, why):
            Experts.from_tensors(**{**weights.tensors, "up": matrix})
    with refused("down_bias", why):
        Experts.from_tensors(**{**weights.tensors, "down_bias": damage(weights.down_bias)})


@KINDS
@pytest.mark.parametrize("fmt", cpumoe.WEIGHT_FORMATS)
def test_quantizing_refuses_what_is_not_in_memory(fmt, damage, why):
    row = cpumoe.weight_format(fmt)
    matrix = QuantizedMatrix(*row.quantize(torch.ones(4, 64)))
    with refused("weights", why):
        row.quantize(damage(torch.ones(4, 64)))
    if "nested" not in why or matrix.codes.dtype != torch.float8_e4m3fn:  # PyTorch has none
        with refused("codes", why):
            row.dequantize(damage(matrix.codes), matrix.scales)
    scaled = matrix.scales is not None
    if scaled and ("nested" not in why or matrix.scales.dtype != torch.float8_e4m3fn):
        with refused("scales", why):
            row.dequantize(matrix.codes, damage(matrix.scales))


@pytest.mark.parametrize(
    "layout", [torch.sparse_coo, torch.sparse_csr, torch._mkldnn], ids=["coo", "csr", "mkldnn"]
)
def test_other_layouts_are_refused(weights, experts, layout):
    x, ids, w = inputs(weights, tokens=3, dtype=torch.float32)
    other = x.to_mkldnn() if layout is torch._mkldnn else x.to_sparse(layout=layout)
    with refused("hidden_states", f"a dense tensor, got layout {layout}"):
        experts(other, ids, w)


def test_quantized_tensors_are_refused_for_their_dtype(weights, experts):
    x, ids, w = inputs(weights, tokens=3, dtype=torch.float32)
    with refused("hidden_states", "got quint8 [3, 160]"):
        experts(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), ids, w)


def test_views_of_all_kinds_are_read_as_what_they_mean(weights, experts):
    x, ids, w = inputs(weights, tokens=3, dtype=torch.float32)
    expected = experts(x, ids, w)
    padded = torch.cat((x, x), 1)[:, : x.shape[1]]
    negative = torch.complex(x, -x).conj().imag
    assert negative.is_neg()
    wide = torch.stack((w, w), -1)[..., 0]
    for states in (padded, negative, x.T.contiguous().T, x.as_subclass(Marked)):
        for weight in (wide, w.as_subclass(Marked), torch.nn.Parameter(w)):
            with torch.no_grad():
                result = experts(states, ids.as_subclass(Marked), weight)
            assert type(result) is torch.Tensor
            assert torch.equal(result, expected)
    mask = torch.tensor([True, False, False, False])
    marked = weights.pack(expert_mask=mask.as_subclass(Marked))
    assert torch.equal(marked(x, ids, w), weights.pack(expert_mask=mask)(x, ids, w))
    tail = torch.cat((x, x))[3:]
    assert torch.equal(experts(tail, torch.cat((ids, ids))[3:], w), expected)


def test_no_tokens_need_no_memory(weights, experts):
    x, ids, w = inputs(weights, tokens=3)
    assert experts(x[:0], ids[:0], w[:0]).shape == (0, x.shape[1])


def test_the_address_of_a_lazy_minus_sign_is_refused():
    with refused("x", "a tensor without lazy negation"):
        address(torch.ones(3, dtype=torch.complex64).conj().imag, "x")


def test_submitting_and_exporting_weights_cannot_be_recorded(weights, experts):
    args = inputs(weights, tokens=3)
    for record in (torch.jit.trace, lambda call, given: make_fx(call)(*given)):
        with pytest.raises(TypeError, match=r"^hidden_states: \S+ cannot record"):
            record(lambda *given: experts.submit(*given).result(), tuple(args))
        with pytest.raises(TypeError, match=r"^export: \S+ cannot record"):
            record(lambda x: x + experts.export(0).gate.scales, (args.hidden_states,))


def test_a_mode_that_makes_fake_tensors_is_refused(weights, experts):
    args = inputs(weights, tokens=3)
    with FakeTensorMode():
        for call in (lambda: experts.submit(*args), lambda: experts.export(0), weights.pack):
            with pytest.raises(TypeError, match="FakeTensorMode cannot record"):
                call()


def test_modes_that_look_on_change_nothing(weights, experts):
    args = inputs(weights, tokens=3)
    expected = experts(*args)
    with FlopCounterMode(display=False), torch.device("meta"):
        assert torch.equal(experts(*args), expected)


TRANSFORMS = {
    "vmap": lambda call, x: torch.func.vmap(call)(torch.stack((x, x))),
    "grad": lambda call, x: torch.func.grad(lambda y: call(y).sum())(x),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "grad of something else": lambda call, x: torch.func.grad(lambda s: (s * call(x)).sum())(x[0]),
    "functionalize": lambda call, x: torch.func.functionalize(call)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms_are_refused(weights, experts, transform):
    x, ids, w = inputs(weights, tokens=3)
    with pytest.raises(TypeError, match=r"^hidden_states: expected .*(torch\.func|functionali)"):
        transform(lambda states: experts(states, ids, w), x)
