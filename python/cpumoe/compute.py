"""The compute paths: what an expert's weights are multiplied with."""

from __future__ import annotations

# The default is the first.
COMPUTE_PATHS = ("bf16", "int8")


def check_compute(compute: str) -> None:
    """Refuses what is no compute path.

    Raises:
        ValueError: it is none of `COMPUTE_PATHS`.
    """
    if compute not in COMPUTE_PATHS:
        raise ValueError(f"compute: expected one of {', '.join(COMPUTE_PATHS)}, got {compute!r}")
