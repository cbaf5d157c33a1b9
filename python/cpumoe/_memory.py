"""How PyTorch says that memory has run out."""

from __future__ import annotations

_NO_MEMORY = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, which PyTorch has no class for."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY in str(error)
    )
