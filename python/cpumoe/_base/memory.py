"""Recognizes errors that mean that memory has run out."""

from __future__ import annotations

_NO_MEMORY = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means too little memory. PyTorch has no exception class for that."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY in str(error)
    )
