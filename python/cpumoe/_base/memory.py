"""Recognizes errors that mean that memory has run out."""

from __future__ import annotations

import sys

_NO_MEMORY = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory, of the CPU or of another device."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # without an import: only PyTorch raises PyTorch's errors
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # PyTorch's allocator of CPU memory has no exception class.
    return isinstance(error, RuntimeError) and _NO_MEMORY in str(error)
