"""What all ranks must have in common before they compute together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpumoe import __version__, _core
from cpumoe.checkpoint.shards import SafetensorsFolder

if TYPE_CHECKING:
    import torch

_LENGTH_BYTES = 8  # of the header's length, at the beginning of a safetensors file
_SAMPLES, _SAMPLE_BYTES = 16, 256
_DIGITS = 12

# What to do about a difference, by what differs.
_REMEDIES = {
    "cpumoe": "install one build of cpumoe on all machines",
    "PyTorch": "install one version of PyTorch on all machines",
    "checkpoint": "give all ranks copies of one checkpoint",
    "variant": "choose one that all CPUs have (CPUMOE_ISA)",
}
_OPTIONS = "start all ranks with the same options"


class RanksError(ValueError):
    """Ranks cannot compute together, or one of them has ended."""


class UnreachableError(RanksError):
    """This rank has not found the others, so that none of them knows of the error."""


def software() -> dict[str, str]:
    """Returns the versions that results and messages between ranks depend on."""
    import torch

    return {
        "cpumoe": f"{__version__}, build {_core.build_id()[:_DIGITS]}",
        "PyTorch": str(torch.__version__).split("+")[0],
    }


def fingerprint(folder: SafetensorsFolder) -> str:
    """Returns a short text that differs between different checkpoints.

    It depends on config.json, on the names, sizes and headers of the weight files, and on samples
    of their content. Reading whole files would take as long as loading them.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(repr(folder.config).encode())
    for path in folder.shard_files():
        _add_file(digest, path)
    return digest.hexdigest()[:_DIGITS]


def digest(numbers: torch.Tensor) -> str:
    """Returns a short text that differs between tensors with different numbers."""
    text = f"{list(numbers.shape)} {numbers.double().flatten().tolist()}"
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        header = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        digest.update(file.read(min(header, size)))
        for i in range(_SAMPLES):
            file.seek(size * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))


def difference(facts: Sequence[Mapping[str, str]], names: Sequence[str]) -> str | None:
    """Returns how a rank differs from rank 0; None: all agree.

    Args:
        facts: what each rank has, by the name of the fact.
        names: what to call each rank.
    """
    first = facts[0]
    for name, other in zip(names, facts, strict=True):
        for fact in dict.fromkeys((*first, *other)):
            expected, got = first.get(fact), other.get(fact)
            if expected != got:
                remedy = _REMEDIES.get(fact, _OPTIONS)
                return f"{name}: {fact}: expected {expected}, as rank 0 has, got {got}; {remedy}"
    return None


def worded(error: Exception) -> str:
    """Returns an error in one line, without the number of an error of the system."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def host_name() -> str:
    """Returns this machine's name."""
    return os.uname().nodename
