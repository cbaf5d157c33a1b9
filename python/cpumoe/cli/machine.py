"""The CPU and the versions that results were got with."""

from __future__ import annotations

import platform
from pathlib import Path

from cpumoe import __version__

_CPUINFO = Path("/proc/cpuinfo")
# Where /proc/cpuinfo names the CPU on x86-64, and on other architectures.
_MODEL_KEYS = ("model name", "Model", "cpu model", "Hardware")


def cpu_model() -> str:
    """Returns what the CPU calls itself, or "unknown"."""
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
