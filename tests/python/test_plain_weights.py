"""bf16 and fp16: formats whose codes are the weights."""

import re

import pytest
import torch
from moe_tools import EVERY_ISA, layer

import cpumoe
from cpumoe import QuantizedMatrix
from cpumoe.reference import experts_forward

EVERY_PLAIN_FORMAT = pytest.mark.parametrize("fmt", ["bf16", "fp16"])


def with_up(weights, codes):
    return cpumoe.Experts.from_tensors(
        gate=weights.gate, up=QuantizedMatrix(codes), down=weights.down, format=weights.fmt
    )


@EVERY_PLAIN_FORMAT
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused_by_place(fmt, value):
    weights = layer(fmt)
    codes = weights.up.codes.clone()
    codes[1, 7, 33] = value
    message = (
        f"expert 1: up: weight [7, 33] is {value}; {fmt} weights must be finite: the checkpoint "
        "is damaged"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        with_up(weights, codes)


@EVERY_PLAIN_FORMAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_format_takes_its_own_dtype_alone(fmt, dtype):
    weights = layer(fmt)
    codes = weights.up.codes.to(dtype)
    if dtype in cpumoe.weight_format(fmt).code_dtypes:
        with_up(weights, codes)
        return
    own = str(cpumoe.weight_format(fmt).code_dtypes[0]).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"up codes: expected {own}, got "):
        with_up(weights, codes)


@EVERY_ISA
def test_subnormal_fp16_weights_are_exact(isa):
    """Weights below 2^-14 are neither flushed nor rounded, whatever the ISA multiplies."""
    generator = torch.Generator().manual_seed(0)

    def tiny(*shape):
        steps = torch.randint(-1023, 1024, shape, generator=generator)
        return QuantizedMatrix((steps * 2.0**-24).half())

    gate, up, down = tiny(2, 64, 32), tiny(2, 64, 32), tiny(2, 32, 64)
    x = 2.0**14 * torch.randn(3, 32, generator=generator)
    call = (x, torch.tensor([[0, 1]] * 3), torch.rand(3, 2, generator=generator))
    actual = cpumoe.Experts.from_tensors(gate=gate, up=up, down=down, format="fp16", isa=isa)(*call)
    expected = experts_forward(*call, gate, up, down, format="fp16")
    assert (actual - expected).norm() < 1e-6 * expected.norm()
