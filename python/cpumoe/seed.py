"""Seeds of everything random."""

from __future__ import annotations


def check_seed(seed: int) -> None:
    """Refuses what is no seed.

    Raises:
        ValueError: it is not from 0 to 2**63 - 1.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
