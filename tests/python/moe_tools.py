"""Expert layers for the engine's tests, and the comparison with the PyTorch reference."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_process

import cpumoe
from cpumoe import Experts, QuantizedMatrix, SwiGLU, _core
from cpumoe.numerics.precision import PRECISIONS, distinct_precisions

# tests/full.sh sets it: tests then try what takes long and is rarely wrong.
EVERYTHING = "CPUMOE_TEST_EVERYTHING" in os.environ
IN_FULL_RUNS = pytest.mark.skipif(not EVERYTHING, reason="in full runs; see tests/full.sh")

PLAIN = SwiGLU()
DEEPSEEK_V4 = SwiGLU(limit=10.0)
GPT_OSS = SwiGLU(alpha=1.702, limit=7.0, up_offset=1.0)
SWIGLUS = pytest.mark.parametrize(
    "activation", [PLAIN, DEEPSEEK_V4, GPT_OSS], ids=["plain", "deepseek_v4", "gpt_oss"]
)
# The beginning of scripts that measure memory: `PeakMemory` from the benchmarks.
PEAK_MEMORY = (
    Path(__file__).parents[2] / "asv_benchmarks" / "benchmarks" / "peak_memory.py"
).read_text()


def features(isa: str) -> list[str]:
    """The CPU features that a variant needs, from the table of variants."""
    return next(row.features for row in _core.known_isas() if row.name == isa)


def why_unsupported(isa: str) -> str | None:
    """Why a variant cannot run here, or None."""
    if isa in cpumoe.supported_isas():
        return None
    if not any(row.built for row in _core.known_isas() if row.name == isa):
        return f"{isa}: not installed"
    return f"{isa}: this CPU lacks {', '.join(cpumoe.missing_features(isa))}"


def _row(*values: str) -> Any:
    reason = why_unsupported(values[0])
    marks = () if reason is None else pytest.mark.skip(reason=reason)
    return pytest.param(*values, id="-".join(values), marks=marks)


def formats(isa: str) -> list[str]:
    """Returns a variant's weight formats, from a variant that can run here if it cannot."""
    opened = isa if why_unsupported(isa) is None else cpumoe.supported_isas()[-1]
    return [row.name for row in _core.formats(opened, "tests")]


EVERY_ISA = pytest.mark.parametrize("isa", [_row(isa) for isa in cpumoe.known_isas()])
EVERY_VARIANT = pytest.mark.parametrize(
    ("isa", "fmt"), [_row(isa, fmt) for isa in cpumoe.known_isas() for fmt in formats(isa)]
)
# The variants with the formats that have two codes in a byte and a scale per 32 of them. The byte
# paths multiply them.
EVERY_QUANTIZED_VARIANT = pytest.mark.parametrize(
    ("isa", "fmt"),
    [
        _row(isa, fmt)
        for isa in cpumoe.known_isas()
        for fmt in formats(isa)
        if cpumoe.weight_format(fmt).group_size == 32
    ],
)
BF16_PRECISIONS = distinct_precisions(torch.bfloat16)
EVERY_PRECISION = pytest.mark.parametrize("precision", BF16_PRECISIONS)
# For fp32 hidden states, all precisions differ.
EVERY_FP32_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)
EVERY_FORMAT = pytest.mark.parametrize("fmt", formats(cpumoe.supported_isas()[-1]))


@dataclass(frozen=True)
class Layer:
    """A layer's experts as a checkpoint stores them."""

    fmt: str
    gate: QuantizedMatrix
    up: QuantizedMatrix
    down: QuantizedMatrix
    activation: SwiGLU = PLAIN
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]

    @property
    def hidden(self) -> int:
        return self.gate.shape[2]

    @property
    def tensors(self) -> dict[str, Any]:
        """The common keyword arguments of `Experts.from_tensors` and `cpumoe.reference`."""
        matrices = {"gate": self.gate, "up": self.up, "down": self.down}
        biases = {name: getattr(self, name) for name in ("gate_bias", "up_bias", "down_bias")}
        return {**matrices, **biases, "format": self.fmt, "activation": self.activation}

    def with_activation(self, activation: SwiGLU) -> Layer:
        return replace(self, activation=activation)

    def pack(self, **options: Any) -> Experts:
        """Packs the layer, and checks that the requested variant is used."""
        experts = Experts.from_tensors(**self.tensors, **options)
        assert experts.isa == (options.get("isa") or cpumoe.isa())
        assert experts.format == self.fmt
        return experts


@functools.cache
def layer(
    fmt: str,
    *,
    experts: int = 4,
    hidden: int = 160,
    intermediate: int = 96,
    activation: SwiGLU = PLAIN,
    bias: torch.dtype | None = None,
    std: float = 0.1,
    seed: int = 0,
) -> Layer:
    """Random normal weights, quantized to nearest; the same object for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    row = cpumoe.weight_format(fmt)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0, std, generator=generator)

    def matrices(n: int, k: int) -> QuantizedMatrix:
        return QuantizedMatrix(*row.quantize(normal(experts, n, k)))

    gate, up = matrices(intermediate, hidden), matrices(intermediate, hidden)
    down = matrices(hidden, intermediate)
    widths = () if bias is None else (intermediate, intermediate, hidden)
    return Layer(
        fmt, gate, up, down, activation, *((10 * normal(experts, n)).to(bias) for n in widths)
    )


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call."""

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    def __iter__(self):
        return iter((self.hidden_states, self.topk_ids, self.topk_weights))


def inputs(
    layer: Layer,
    tokens: int,
    top_k: int = 2,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Inputs:
    """Random hidden states; each token's experts are distinct, its weights add up to one."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, layer.num_experts, generator=generator)
    return Inputs(
        torch.randn(tokens, layer.hidden, generator=generator).to(dtype),
        scores.topk(top_k).indices,
        torch.rand(tokens, top_k, generator=generator).softmax(-1),
    )


def mask(*masked: int, experts: int = 4) -> torch.Tensor:
    """Returns an `expert_mask` that skips the experts given."""
    result = torch.zeros(experts, dtype=torch.bool)
    result[list(masked)] = True
    return result


def check(
    actual: torch.Tensor,
    layer: Layer,
    args: Inputs,
    mask: torch.Tensor | None = None,
    *,
    precision: str = PRECISIONS[0],
) -> None:
    """Compares an output with the reference, each element against its own error bound."""
    expected, bound = cpumoe.reference.experts_forward_with_bound(
        *args,
        **layer.tensors,
        expert_mask=mask,
        output_dtype=args.hidden_states.dtype,
        precision=precision,
    )
    limits = torch.finfo(actual.dtype)  # fp16 overflows to infinity
    overflown = actual.isinf() & (expected * actual.sign() + bound > limits.max)
    assert actual.dtype == args.hidden_states.dtype
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    error = (actual.double() - expected).abs()
    ratio = (error / bound).nan_to_num(nan=torch.inf).masked_fill(overflown, 0)
    place = divmod(int(ratio.argmax()), actual.shape[1])
    assert float(ratio[place]) <= 1, (
        f"worst element {list(place)}: expected {float(expected[place]):.9g}, got "
        f"{float(actual[place]):.9g}, error {float(error[place]):.3g}, bound "
        f"{float(bound[place]):.3g}; {int((ratio > 1).sum())} of {ratio.numel()} over their bound"
    )


def python(
    script: str, *arguments: str, env: dict[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a script in its own process; after `timeout` seconds it counts as hanging."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=timeout,
        check=False,
    )


def output_of(script: str, *arguments: str, **options: Any) -> str:
    """Returns what a script prints; fails with the script's traceback if it fails."""
    return _output(python(script, *arguments, **options))


def output_with_torch(script: str, *arguments: str, **options: Any) -> str:
    """Returns what a script prints in a process that has PyTorch already, which is faster."""
    return _output(warm_process.run(script, *arguments, **options))


def _output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def refused(kind: type[Exception], message: str) -> Any:
    """A context in which exactly this message must be raised."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")
