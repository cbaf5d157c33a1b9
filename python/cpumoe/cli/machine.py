"""The CPU and the software versions of a measurement."""

from __future__ import annotations

import platform
from pathlib import Path

from cpumoe import __version__

_CPUINFO = Path("/proc/cpuinfo")
# Keys of the CPU's name in /proc/cpuinfo: x86-64's first, then those of other architectures.
_MODEL_KEYS = ("model name", "Model", "cpu model", "Hardware")


def cpu_model() -> str:
    """Returns the name of the CPU, or "unknown"."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    fields = dict(
        reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line])
    )
    return next((fields[key] for key in _MODEL_KEYS if fields.get(key)), "unknown")


def versions() -> dict[str, str]:
    """Returns the versions of cpumoe, PyTorch and Python."""
    import torch

    return {
        "cpumoe": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
