"""Which scales quantizing makes, where a format leaves a choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The names that hosts and commands give to types of scales.
SCALE_NAMES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "e8m0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class ScaleChoice:
    """The type of scales, and how many weights share one.

    Attributes:
        dtype: the scales' dtype, one of the format's `scale_dtypes`; None: the usual one.
        group_size: successive weights of a row that share a scale; None: the format's usual number.
        by_row: whether a row shares a scale, whatever its length. `group_size` is None then.
    """

    dtype: torch.dtype | None = None
    group_size: int | None = None
    by_row: bool = False

    def group_of(self, k: int) -> int | None:
        """Returns the group size of rows of `k` weights; None: the format's usual one."""
        return k if self.by_row else self.group_size


# What a format usually has.
USUAL_SCALES = ScaleChoice()
