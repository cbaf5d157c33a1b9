"""The choice of the ISA variant, and errors if it cannot run."""

import os
import re

import pytest
from moe_tools import (
    EVERY_FORMAT,
    EVERY_ISA,
    inputs,
    layer,
    output_with_torch,
    python,
    why_unsupported,
)

import cpumoe
from cpumoe import _core
from cpumoe.isa import ENVIRONMENT_VARIABLE

REPORT = """
import torch
import cpumoe
codes, scales = torch.zeros(1, 32, 16, dtype=torch.uint8), torch.zeros(1, 32, 1, dtype=torch.uint8)
matrix = (codes, scales)
experts = cpumoe.Experts.from_tensors(gate=matrix, up=matrix, down=matrix, format="mxfp4")
experts(torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
print(cpumoe.isa(), experts.isa)
"""


def missing_text(isa):
    return ", ".join(cpumoe.missing_features(isa))


def test_supported_variants_lack_nothing():
    supported = cpumoe.supported_isas()
    built = [row.name for row in _core.known_isas() if row.built]
    assert supported == [isa for isa in built if not cpumoe.missing_features(isa)]
    assert set(supported) <= set(cpumoe.known_isas())


def test_best_variant_is_the_default(monkeypatch):
    for unset in (None, ""):
        if unset is None:
            monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(ENVIRONMENT_VARIABLE, unset)
        assert cpumoe.isa() == cpumoe.supported_isas()[-1]


@EVERY_ISA
def test_forced_variant_reports_itself(isa):
    env = {**os.environ, ENVIRONMENT_VARIABLE: isa}
    assert output_with_torch(REPORT, env=env).split() == [isa, isa]


@EVERY_ISA
def test_argument_goes_before_environment(isa, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, cpumoe.supported_isas()[0])
    assert layer("mxfp4").pack(isa=isa).isa == isa


@EVERY_FORMAT
def test_all_variants_work_in_one_process(fmt):
    weights = layer(fmt)
    args = inputs(weights, tokens=3)
    outputs = [weights.pack(isa=isa)(*args).float() for isa in cpumoe.supported_isas()]
    for output in outputs:
        assert (output - outputs[0]).norm() < 0.02 * outputs[0].norm()


def test_variants_have_the_same_formats():
    for isa in cpumoe.supported_isas():
        rows = {row.name: row for row in _core.formats(isa, "tests")}
        assert list(rows) == list(cpumoe.WEIGHT_FORMATS)
        for name, row in rows.items():
            described = cpumoe.weight_format(name)
            assert row.code_bits == described.code_bits
            assert row.scale_depth == described.group_size
            scale = described.scale_dtype
            assert row.scale_bytes == (0 if scale is None else scale.itemsize)


@pytest.mark.parametrize("isa", cpumoe.known_isas())
def test_forced_variant_that_the_cpu_lacks(isa, monkeypatch):
    if not cpumoe.missing_features(isa):
        pytest.skip(f"this CPU has all that {isa} needs")
    if why_unsupported(isa) == f"{isa}: not installed":
        pytest.skip(f"{isa} is not installed")
    supports = ", ".join(cpumoe.supported_isas())
    text = f"={isa}: this CPU lacks {missing_text(isa)}; it supports {supports}"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, isa)
    for call in (cpumoe.isa, layer("mxfp4").pack):
        with pytest.raises(ValueError, match=f"^{re.escape(ENVIRONMENT_VARIABLE + text)}$"):
            call()
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    with pytest.raises(ValueError, match=f"^isa{re.escape(text)}$"):
        layer("mxfp4").pack(isa=isa)


def test_unknown_variant(monkeypatch):
    text = (
        f"=sse9: unknown ISA; known are {', '.join(cpumoe.known_isas())}; "
        f"this CPU supports {', '.join(cpumoe.supported_isas())}"
    )
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "sse9")
    with pytest.raises(ValueError, match=f"^{re.escape(ENVIRONMENT_VARIABLE + text)}$"):
        cpumoe.isa()
    with pytest.raises(ValueError, match=f"^isa{re.escape(text)}$"):
        layer("mxfp4").pack(isa="sse9")
    known = re.escape(f"unknown ISA 'sse9'; known are {', '.join(cpumoe.known_isas())}")
    with pytest.raises(ValueError, match=f"^{known}$"):
        cpumoe.missing_features("sse9")


def test_import_loads_no_command_line_or_host_library():
    script = "import sys, cpumoe; print(*sys.modules); cpumoe.Experts; print(*sys.modules)"
    done = python(script)
    assert (done.returncode, done.stderr) == (0, "")
    package, engine = (set(line.split()) for line in done.stdout.splitlines())
    unwanted = {"typer", "rich", "transformers", "cpumoe.cli"}
    assert package.isdisjoint({*unwanted, "torch", "cpumoe.experts"})
    assert engine.isdisjoint(unwanted)
    assert {"torch", "cpumoe.experts"} <= engine
