"""The extension module refuses addresses that point nowhere, by the name of the argument."""

import pytest
import torch
from moe_tools import layer

import cpumoe
from cpumoe import QuantizedMatrix, Runtime, _core
from cpumoe._arguments import matrix_view

CALL = {
    "hidden_states": 64,
    "hidden_stride": 32,
    "tokens": 3,
    "element": _core.DType.BF16,
    "ids": 64,
    "ids_are_64_bit": True,
    "weights": 64,
    "top_k": 2,
    "mask": 0,
    "output": 64,
}
MATRIX = {
    "name": "gate",
    "rows": 32,
    "columns": 32,
    "codes": 64,
    "codes_stride": 16,
    "scales": 64,
    "scales_stride": 1,
}


@pytest.mark.parametrize("name", ["hidden_states", "ids", "weights", "output"])
def test_a_call_needs_its_tensors(name):
    with pytest.raises(ValueError, match=f"^{name}: expected an address, got a null pointer$"):
        _core.ForwardTensors(**{**CALL, name: 0})


def test_a_call_of_nothing_needs_none():
    nowhere = {"hidden_states": 0, "ids": 0, "weights": 0, "output": 0}
    _core.ForwardTensors(**{**CALL, **nowhere, "tokens": 0})
    _core.ForwardTensors(**{**CALL, "ids": 0, "weights": 0, "top_k": 0})
    _core.ForwardTensors(**CALL)


@pytest.mark.parametrize("name", ["codes", "scales"])
def test_a_matrix_needs_its_bytes(name):
    with pytest.raises(ValueError, match=f"^gate {name}: expected an address, got a null pointer$"):
        _core.Matrix(**{**MATRIX, name: 0})
    _core.Matrix(**{**MATRIX, name: 0, "rows": 0})


@pytest.mark.parametrize(
    ("make", "arguments"), [(_core.ForwardTensors, CALL), (_core.Matrix, MATRIX)]
)
def test_sizes_are_not_negative(make, arguments):
    for name in ("tokens", "top_k", "rows", "columns"):
        if name in arguments:
            with pytest.raises(ValueError, match=f"{name}: expected 0 or more, got -1$"):
                make(**{**arguments, name: -1})


@pytest.mark.parametrize(
    ("missing", "name"), list(enumerate(("gate_bias", "up_bias", "down_bias")))
)
def test_an_expert_needs_its_biases(missing, name):
    sizes = {"num_experts": 4, "hidden_size": 32, "intermediate_size": 32}
    formula = {"alpha": 1.0, "limit": None, "up_offset": 0.0, "has_bias": True}
    kernels = {"precision": _core.Precision.BF16, "batch_invariant": False, "few_token_limit": -1}
    isa = cpumoe.supported_isas()[0]
    moe = _core.Moe(isa, "test", "mxfp4", _core.MoeConfig(**sizes, **formula, **kernels))
    weights = layer("mxfp4", experts=1, hidden=32, intermediate=32, bias=torch.float32)
    views = [
        matrix_view(QuantizedMatrix(stack.codes[0], stack.scales[0]), key)
        for key, stack in (("gate", weights.gate), ("up", weights.up), ("down", weights.down))
    ]
    biases = [b.data_ptr() for b in (weights.gate_bias, weights.up_bias, weights.down_bias)]
    biases[missing] = 0
    message = f"^expert 3: {name}: expected an address, got a null pointer$"
    with Runtime(1) as runtime, pytest.raises(ValueError, match=message):
        moe.pack(runtime.core, 3, [(views, biases)])
