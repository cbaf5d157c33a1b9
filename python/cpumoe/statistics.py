"""What a layer's experts have computed so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class ExpertsStatistics:
    """Sums over all calls of a layer since it was packed; `Experts.statistics` returns them.

    Attributes:
        calls: number of calls that succeeded.
        seconds: time that these calls computed, without the checks of their tensors and without
            waiting for other calls of the runtime.
        expert_tokens: int64 ``[experts]``, the tokens that each expert computed. A token that names
            an expert twice counts twice. Skipped experts count nothing.
        bytes_read: bytes of packed weights that were read. An expert's weights count once per call
            that has tokens for it, however many. Ids that share a copy count as one expert. Weights
            count again for each further part of a call with over 16384 (token, expert) pairs.
    """

    calls: int
    seconds: float
    expert_tokens: torch.Tensor
    bytes_read: int

    @property
    def gb_per_s(self) -> float:
        """Bytes of weights read per second of computing, in units of 10^9; 0 before any call."""
        return self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0
