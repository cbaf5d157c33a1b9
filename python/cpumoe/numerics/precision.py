"""The lowest precision to which activations may be rounded before weights multiply them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The first is the default. "auto" stands for "bf16" or for fp32 accuracy: see `resolve_precision`.
PRECISIONS = ("auto", "bf16", "int8")


def check_precision(precision: str) -> None:
    """Refuses an unknown precision.

    Raises:
        ValueError: `precision` is not in `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def resolve_precision(precision: str, dtype: torch.dtype) -> str:
    """Returns the precision of a call with hidden states of `dtype`.

    Only "auto" depends on the dtype. It stands for "bf16", with one exception: fp32 hidden states
    keep fp32 accuracy unless PyTorch may compute its own fp32 matrix products on the CPU in bf16.
    PyTorch may do so after ``torch.set_float32_matmul_precision("medium")``.

    Returns:
        "bf16", "int8", or "auto", which then means fp32 accuracy.
    """
    import torch

    if precision != "auto":
        return precision
    return "auto" if dtype == torch.float32 and not _torch_allows_bf16() else "bf16"


def distinct_precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """Returns the distinct precisions for hidden states of `dtype`, the default one first."""
    return tuple(dict.fromkeys(resolve_precision(name, dtype) for name in PRECISIONS))


def _torch_allows_bf16() -> bool:
    import torch

    # PyTorch 2.9 brought a setting for the CPU alone. `set_float32_matmul_precision` sets it, too.
    # `get_float32_matmul_precision` does not see later changes of it.
    cpu = getattr(torch.backends.mkldnn, "matmul", None)
    if cpu is not None:
        precision: str = cpu.fp32_precision
        return precision == "bf16"
    return torch.get_float32_matmul_precision() == "medium"
