"""Computes one tiny layer of experts through an installed host's own class.

``python -c SCRIPT NAME`` does so in a process of its own, because a host may fail or crash. The
last line of standard output begins with `MARK`, and the rest of it is a JSON object: the fields of
`Answer`, or ``{"inactive": REASON}``, or ``{"failed": REASON}``.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import NamedTuple

import torch

from cpumoe.checkpoint import ExpertWeights, open_checkpoint
from cpumoe.embedded import model_path
from cpumoe.formats import weight_format
from cpumoe.numerics.glu import SwiGLU
from cpumoe.reference import experts_forward

SCRIPT = "import sys, cpumoe.integrations.host_check as host; host.main(sys.argv[1])"
MARK = "cpumoe.host_check "
# Relative to the norm of the result: the host rounds to bf16 what it passes and what it gets.
TOLERANCE = 2e-2
TOKENS, TOP_K = 3, 2


class InactiveError(Exception):
    """The host would run without cpumoe; the text says why."""


class Answer(NamedTuple):
    """What a host did.

    Attributes:
        plugin: what of cpumoe is active in the host.
        host_class: the host's class that computed the layer.
        isa: the variant with which cpumoe computed it.
    """

    plugin: str
    host_class: str
    isa: str


class TinyLayer:
    """A layer of the embedded model, with inputs.

    Attributes:
        folder: the checkpoint, whose experts are in MXFP4.
        index: the layer's number.
        experts: the experts, as stored.
        hidden: width of the hidden states.
        intermediate: inner width of an expert.
        hidden_states: bf16 ``[TOKENS, hidden]``.
        topk_ids: int64 ``[TOKENS, TOP_K]``.
        topk_weights: fp32 ``[TOKENS, TOP_K]``.
    """

    def __init__(self) -> None:
        """Reads the experts."""
        self.folder = model_path()
        with open_checkpoint(self.folder) as reader:
            self.index = reader.layers()[0]
            self.hidden, self.intermediate = reader.hidden_size, reader.intermediate_size
            self.experts: list[ExpertWeights] = [
                reader.expert(self.index, expert) for expert in range(reader.num_experts)
            ]
            self.activation = reader.known_activation()
            self._format = reader.format
        generator = torch.Generator().manual_seed(1)
        count = len(self.experts)
        shape = (TOKENS, self.hidden)
        normal = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        self.hidden_states = normal.bfloat16()
        scores = torch.rand(TOKENS, count, generator=generator, dtype=torch.float32, device="cpu")
        self.topk_weights, self.topk_ids = scores.softmax(-1).topk(TOP_K)

    def dense(self, projection: str) -> torch.Tensor:
        """Returns the weights ``[experts, N, K]`` of a projection, which are bf16 numbers."""
        fmt = weight_format(self._format)
        return torch.stack(
            [fmt.dense(getattr(expert, projection), torch.bfloat16) for expert in self.experts]
        )

    def verify(self, output: torch.Tensor, *, limited: bool = True) -> None:
        """Compares a host's result with the reference.

        Args:
            output: the weighted sums ``[TOKENS, hidden]``.
            limited: whether the host applies the limit of the model's activation.

        Raises:
            RuntimeError: the result is wrong.
        """
        expected = experts_forward(
            self.hidden_states,
            self.topk_ids,
            self.topk_weights,
            [expert.gate for expert in self.experts],
            [expert.up for expert in self.experts],
            [expert.down for expert in self.experts],
            format=self._format,
            activation=self.activation if limited else SwiGLU(),
        )
        error = float((output.double() - expected).norm() / expected.norm())
        if not error <= TOLERANCE:  # nor NaN
            raise RuntimeError(
                f"the layer's result: expected a relative error of at most {TOLERANCE}, got "
                f"{error:.2g}"
            )


def check(name: str) -> dict[str, str]:
    """Returns the JSON object for a host."""
    try:
        compute = importlib.import_module(f"cpumoe.integrations.{name}.host_layer").compute
        with torch.no_grad():
            answer: Answer = compute(TinyLayer())
        return answer._asdict()
    except InactiveError as reason:
        return {"inactive": str(reason)}
    except Exception as error:  # whatever a host raises is its answer
        lines = str(error).strip().splitlines() or [""]
        return {"failed": f"{type(error).__name__}: {lines[0]}"}


def main(name: str) -> None:
    """Prints what `check` returns."""
    sys.stdout.write(f"\n{MARK}{json.dumps(check(name))}\n")
