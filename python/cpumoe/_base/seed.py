"""The range of seeds of random numbers."""

from __future__ import annotations


def check_seed(seed: int) -> None:
    """Refuses a seed that is out of range.

    Raises:
        ValueError: `seed` is not from 0 to 2**63 - 1.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
