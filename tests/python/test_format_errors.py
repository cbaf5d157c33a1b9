"""Every format refuses tensors that do not fit, by one line: tensor, expected, got, remedy."""

import dataclasses
import re

import pytest
import torch

from cpumoe import Experts, ExpertWeights, QuantizedMatrix
from cpumoe._base.tensors import dtype_name
from cpumoe.formats import WEIGHT_FORMATS

EXPERTS, HIDDEN, INTERMEDIATE = 2, 384, 256
PROJECTIONS = ("gate", "up", "down")
FORMATS = pytest.mark.parametrize("fmt", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
# No format stores these.
NO_CODES, NO_SCALES = torch.float64, torch.int64


def layer(fmt):
    """The arguments of `Experts.from_tensors`."""

    def matrices(n, k):
        generator = torch.Generator().manual_seed(n)
        weights = torch.empty(EXPERTS, n, k).normal_(0, 0.1, generator=generator)
        return QuantizedMatrix(*fmt.quantize(weights))

    gate, up = matrices(INTERMEDIATE, HIDDEN), matrices(INTERMEDIATE, HIDDEN)
    return {"gate": gate, "up": up, "down": matrices(HIDDEN, INTERMEDIATE), "format": fmt.name}


def has_scales(fmt):
    return bool(fmt.scale_dtypes)


def has_factors(fmt):
    return fmt.factor_for is not None


def names(dtypes):
    return " or ".join(map(dtype_name, dtypes))


def wrong_codes(_fmt, matrix):
    return dataclasses.replace(matrix, codes=matrix.codes.to(NO_CODES))


def wrong_scales(_fmt, matrix):
    return dataclasses.replace(matrix, scales=matrix.scales.float().to(NO_SCALES))


def too_few_scales(_fmt, matrix):
    return dataclasses.replace(matrix, scales=matrix.scales[..., :-1])


def too_few_rows_of_scales(_fmt, matrix):
    return dataclasses.replace(matrix, scales=matrix.scales[..., :-1, :])


def missing_scales(_fmt, matrix):
    return dataclasses.replace(matrix, scales=None)


def superfluous_scales(_fmt, matrix):
    return dataclasses.replace(matrix, scales=torch.ones(*matrix.codes.shape[:-1], 1))


def wrong_factor(_fmt, matrix):
    return dataclasses.replace(matrix, factor=matrix.factor.double())


def no_factor(_fmt, matrix):
    return dataclasses.replace(matrix, factor=None)


def too_many_factors(_fmt, matrix):
    return dataclasses.replace(matrix, factor=torch.ones(EXPERTS + 1))


def superfluous_factor(_fmt, matrix):
    return dataclasses.replace(matrix, factor=torch.ones(matrix.codes.shape[:-2]))


def codes_alone(_fmt, matrix):
    return matrix.codes


def parts_of_another_number(_fmt, matrix):
    return (matrix.codes,) * 4


# What is done to a matrix, and: the formats to which it is done, the error, the part that the error
# names, and what it says was expected (None: any text).
ANY, SCALED, PLAIN = (lambda _fmt: True), has_scales, (lambda fmt: not has_scales(fmt))
CASES = {
    wrong_codes: (ANY, TypeError, "codes", lambda fmt: names(fmt.code_dtypes)),
    wrong_scales: (SCALED, TypeError, "scales", lambda fmt: names(fmt.scale_dtypes)),
    too_few_scales: (SCALED, ValueError, "scales", None),
    too_few_rows_of_scales: (SCALED, ValueError, "scales", None),
    missing_scales: (SCALED, TypeError, "scales", lambda fmt: names(fmt.scale_dtypes)),
    superfluous_scales: (PLAIN, TypeError, "scales", lambda fmt: f"none in {fmt.name}"),
    wrong_factor: (has_factors, TypeError, "factor", lambda _fmt: "float32"),
    no_factor: (has_factors, TypeError, "factor", lambda _fmt: "float32"),
    too_many_factors: (has_factors, ValueError, "factor", None),
    superfluous_factor: (
        lambda fmt: not has_factors(fmt),
        TypeError,
        "factor",
        lambda fmt: f"none in {fmt.name}",
    ),
    codes_alone: (SCALED, TypeError, None, lambda _fmt: "a QuantizedMatrix or a tuple"),
    parts_of_another_number: (ANY, TypeError, None, lambda _fmt: "a QuantizedMatrix or "),
}


def cases(*chosen):
    """Each format with each of the cases that it allows."""
    return pytest.mark.parametrize(
        ("fmt", "damage"),
        [
            pytest.param(fmt, case, id=f"{fmt.name}-{case.__name__}")
            for fmt in WEIGHT_FORMATS.values()
            for case in chosen
            if CASES[case][0](fmt)
        ],
    )


def check_line(error, name, expected):
    """The message is one line of the form: name: expected this, got that; remedy."""
    line = re.compile(rf"{name}: expected (?P<expected>.+), got (?P<got>.+); (?P<remedy>pass .+)")
    parts = line.fullmatch(str(error.value))
    assert parts, str(error.value)
    if expected is not None:
        assert parts["expected"].startswith(expected)


@pytest.mark.parametrize("name", PROJECTIONS)
@cases(*CASES)
def test_stacks_that_do_not_fit(fmt, damage, name):
    _, kind, part, expected = CASES[damage]
    arguments = layer(fmt)
    arguments[name] = damage(fmt, arguments[name])
    with pytest.raises(kind) as error:
        Experts.from_tensors(**arguments)
    check_line(error, f"{name} {part}" if part else name, expected and expected(fmt))


@cases(*(case for case in CASES if case not in (codes_alone, parts_of_another_number)))
def test_single_experts_that_do_not_fit(fmt, damage):
    _, kind, part, expected = CASES[damage]
    arguments = layer(fmt)
    gate, up, down = (arguments[name][1] for name in PROJECTIONS)
    source = [ExpertWeights(damage(fmt, gate), up, down)]
    sizes = {"num_experts": 1, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    with pytest.raises(kind) as error:
        Experts(source, format=fmt.name, **sizes)
    check_line(error, f"expert 0: gate {part}", expected and expected(fmt))


@FORMATS
def test_scales_that_are_missing_or_superfluous_are_never_dequantized(fmt):
    damage = missing_scales if has_scales(fmt) else superfluous_scales
    matrix = damage(fmt, layer(fmt)["gate"])
    with pytest.raises(TypeError) as error:
        fmt.dequantize(matrix.codes, matrix.scales)
    check_line(error, f"{fmt.name} scales", None)


@FORMATS
def test_shapes_that_do_not_fit_together(fmt):
    arguments = layer(fmt)
    shape = [EXPERTS, HIDDEN, INTERMEDIATE]
    with pytest.raises(ValueError, match=re.escape(f"down: expected {shape}, got ")) as error:
        Experts.from_tensors(**{**arguments, "down": arguments["gate"]})
    assert str(error.value).endswith("and down is [experts, hidden, intermediate]")
    single = dataclasses.replace(arguments["gate"], codes=arguments["gate"].codes[0])
    with pytest.raises(ValueError, match=r"^gate codes: expected \[experts, N, K") as error:
        Experts.from_tensors(**{**arguments, "gate": single})
    assert str(error.value).endswith("; stack the experts' matrices")


@FORMATS
@pytest.mark.parametrize("k", [1, 33, 2889])
def test_rows_of_codes_are_whole_bytes(fmt, k):
    if fmt.code_bits >= 8:
        assert fmt.quantize(torch.ones(4, k))[0].shape == (4, k)
        return
    message = f"{fmt.name}: K must be a multiple of 2, because a byte has 2 codes, got {k}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        fmt.quantize(torch.ones(4, k))


@FORMATS
@pytest.mark.parametrize("weights", [torch.ones(64), torch.ones(4, 64, dtype=torch.int32)])
def test_only_floating_point_matrices_are_quantized(fmt, weights):
    with pytest.raises(ValueError, match=r"^weights: expected floating point \[..., N, K\], got "):
        fmt.quantize(weights)


@FORMATS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(fmt, bad):
    weights = torch.ones(4, 64)
    weights[2, 3] = bad
    with pytest.raises(ValueError, match=r"^expert 3: weights must be finite, got NaN or Inf$"):
        fmt.quantized(weights, name="expert 3")
    with pytest.raises(ValueError, match=r"^weights must be finite, got NaN or Inf$"):
        fmt.quantized(weights)


@FORMATS
@pytest.mark.parametrize("shape", [(0, 32), (0, 4, 32), (2, 0, 32)])
def test_no_weights_are_refused(fmt, shape):
    with pytest.raises(ValueError, match=r"^weights: expected at least one weight, got float32 \["):
        fmt.quantize(torch.zeros(shape))


def test_weights_that_a_format_does_not_hold_are_named():
    weights = torch.ones(4, 64)
    weights[2, 3] = -1e6
    fp16, bf16 = WEIGHT_FORMATS["fp16"], WEIGHT_FORMATS["bf16"]
    message = r"^weights must be at most 65504, the greatest number of fp16, got 1e\+06; choose "
    with pytest.raises(ValueError, match=message):
        fp16.quantize(weights)
    bf16.quantize(weights)
    with pytest.raises(ValueError, match="the greatest number of bf16, got 1e"):
        bf16.quantize(weights.double() * 1e294)
