"""The extension module refuses addresses that point nowhere, by the name of the argument."""

import pytest
import torch
from moe_tools import layer

import cpumoe
from cpumoe import QuantizedMatrix, Runtime, _core
from cpumoe._engine.arguments import matrix_view

# What a call has fixed, and what may differ each time.
FIXED = {
    "input_dtype": _core.DType.BF16,
    "output_dtype": _core.DType.BF16,
    "top_k": 2,
    "ids_are_64_bit": True,
}
ADDRESSES = {
    "hidden_states": 64,
    "hidden_stride": 32,
    "tokens": 3,
    "ids": 64,
    "weights": 64,
    "output": 64,
}
NOWHERE = {"hidden_states": 0, "ids": 0, "weights": 0, "output": 0}
MATRIX = {
    "name": "gate",
    "rows": 32,
    "columns": 32,
    "codes": 64,
    "codes_stride": 16,
    "scales": 64,
    "scales_stride": 1,
}


def empty_layer(**options):
    sizes = {"num_experts": 4, "hidden_size": 32, "intermediate_size": 32}
    formula = {"alpha": 1.0, "limit": None, "up_offset": 0.0, "has_bias": False}
    formula["glu_function"] = _core.GluFunction.SILU
    kernels = {"precision": _core.Precision.BF16, "batch_invariant": False, "few_token_limit": -1}
    config = _core.MoeConfig(**sizes, **{**formula, **kernels, **options})
    isa = cpumoe.supported_isas()[0]
    return _core.Layer(isa=isa, origin="test", format="mxfp4", config=config)


@pytest.fixture(scope="module")
def runtime():
    with Runtime(1) as runtime:
        yield runtime.core


@pytest.fixture
def make_call(runtime):
    return lambda **changes: _core.Call(
        runtime=runtime, layer=empty_layer(), **{**FIXED, **changes}
    )


@pytest.mark.parametrize("name", ["hidden_states", "ids", "weights", "output"])
def test_a_call_needs_its_tensors(make_call, name):
    message = f"^{name}: expected an address, got a null pointer$"
    call = make_call()
    with pytest.raises(ValueError, match=message):
        call.run(**{**ADDRESSES, name: 0})
    with pytest.raises(ValueError, match=message):
        call.submit(**{**ADDRESSES, name: 0}, owned=None)


def test_a_call_of_nothing_needs_none(make_call):
    make_call().run(**{**ADDRESSES, **NOWHERE, "tokens": 0})
    output = torch.full((3, 32), 7.0, dtype=torch.bfloat16)
    places = {**ADDRESSES, **NOWHERE, "hidden_states": 64, "output": output.data_ptr()}
    make_call(top_k=0).run(**places)
    assert output.eq(0).all()


def test_results_are_added_onto_fp32_only(make_call):
    with pytest.raises(ValueError, match=r"^accumulate: results can be added onto an fp32 output"):
        make_call(accumulate=True)
    make_call(accumulate=True, output_dtype=_core.DType.FP32)


def test_a_matrix_needs_its_codes():
    with pytest.raises(ValueError, match=r"^gate codes: expected an address, got a null pointer$"):
        _core.Matrix(**{**MATRIX, "codes": 0})
    _core.Matrix(**{**MATRIX, "codes": 0, "rows": 0})


def test_a_matrix_has_scales_of_some_depth():
    with pytest.raises(ValueError, match=r"^gate: scale_depth must be positive, got 0$"):
        _core.Matrix(**{**MATRIX, "scale_depth": 0})


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_a_matrix_has_no_negative_size(name):
    with pytest.raises(ValueError, match=f"{name}: expected 0 or more, got -1$"):
        _core.Matrix(**{**MATRIX, name: -1})


def test_a_call_has_no_negative_size(make_call):
    with pytest.raises(ValueError, match=r"^tokens: expected 0 or more, got -1$"):
        make_call().run(**{**ADDRESSES, "tokens": -1})
    with pytest.raises(ValueError, match=r"^top_k: expected 0 or more, got -1$"):
        make_call(top_k=-1)


@pytest.mark.parametrize(
    ("missing", "name"), list(enumerate(("gate_bias", "up_bias", "down_bias")))
)
def test_an_expert_needs_its_biases(runtime, missing, name):
    weights = layer("mxfp4", experts=1, hidden=32, intermediate=32, bias=torch.float32)
    views = [
        matrix_view(QuantizedMatrix(stack.codes[0], stack.scales[0]), key)
        for key, stack in (("gate", weights.gate), ("up", weights.up), ("down", weights.down))
    ]
    biases = [b.data_ptr() for b in (weights.gate_bias, weights.up_bias, weights.down_bias)]
    biases[missing] = 0
    message = f"^expert 3: {name}: expected an address, got a null pointer$"
    with pytest.raises(ValueError, match=message):
        empty_layer(has_bias=True).pack(runtime=runtime, experts=[3], weights=[(views, biases)])
