"""The experts of a layer that one rank has, and what the rank computes for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpumoe.experts import Experts

# How the results of a token's experts are added up.
SUMS = ("fixed", "plain")


def check_sums(sums: str) -> None:
    """Raises ValueError unless there are such sums."""
    if sums not in SUMS:
        raise ValueError(f"sums: expected {' or '.join(map(repr, SUMS))}, got {sums!r}")


class Part:
    """Some of a layer's experts.

    Attributes:
        experts: the packed experts.
    """

    def __init__(self, experts: Experts) -> None:
        """Takes the packed experts, whose ids are the rank's own numbers."""
        self.experts = experts
        self._ones = torch.ones((0, 1), dtype=torch.float32, device="cpu")

    @classmethod
    def from_checkpoint(cls, path: Any, layer: int, experts: Sequence[int], **options: Any) -> Part:
        """Packs these experts of a checkpoint's layer; see `cpumoe.Experts.from_checkpoint`."""
        return cls(Experts.from_checkpoint(path, layer, experts=experts, **options))

    def terms(
        self, x: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the result of each pair, without its weight.

        Args:
            x: hidden states ``[tokens, hidden]``.
            ids: int32 ``[tokens, top_k]``, the rank's own numbers, -1 for none.
            out: float32 ``[pairs, hidden]``, where the results go; default: a new tensor.

        Returns:
            float32 ``[pairs, hidden]``, in order of token, then slot.
        """
        # Each pair is a call's token of its own, so that nothing is added. An expert has as many
        # tokens as in a call of all pairs, and so the same kernel.
        flat = ids.reshape(-1)
        if len(ids) == 1:
            chosen = flat[flat >= 0]
            rows = x.expand(len(chosen), x.shape[1])
        else:
            pairs = (flat >= 0).nonzero()[:, 0]
            chosen, rows = flat[pairs], x[pairs // ids.shape[1]]
        count = len(chosen)
        if len(self._ones) < count:
            self._ones = torch.ones((count, 1), dtype=torch.float32, device="cpu")
        weights = self._ones[:count]
        if out is None:
            return self.experts(rows, chosen.unsqueeze(1), weights, out_dtype=torch.float32)
        return self.experts(rows, chosen.unsqueeze(1), weights, out=out)

    def sums(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns the weighted sum ``[tokens, hidden]`` of this rank's experts, in float32.

        Args:
            x: see `terms`.
            ids: see `terms`.
            weights: float32 ``[tokens, top_k]``.
        """
        return self.experts(x, ids, weights, out_dtype=torch.float32)
