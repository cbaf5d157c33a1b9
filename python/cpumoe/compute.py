"""The compute paths: what an expert's weights are multiplied with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The default is the first. "auto" is one of the two others, or fp32: see `resolve_compute`.
COMPUTE_PATHS = ("auto", "bf16", "int8")


def check_compute(compute: str) -> None:
    """Refuses what is no compute path.

    Raises:
        ValueError: it is none of `COMPUTE_PATHS`.
    """
    if compute not in COMPUTE_PATHS:
        raise ValueError(f"compute: expected one of {', '.join(COMPUTE_PATHS)}, got {compute!r}")


def resolve_compute(compute: str, dtype: torch.dtype) -> str:
    """Returns the compute path that a call with hidden states of `dtype` takes.

    It is `compute`, but "auto" stands for "bf16" unless hidden states are fp32 and PyTorch's own
    fp32 matrix products on the CPU are not to be computed in bf16. "auto" then keeps fp32 accuracy.
    The rule of PyTorch is ``torch.set_float32_matmul_precision``, "highest" unless set: only
    "medium" allows bf16.
    """
    import torch

    if compute != "auto":
        return compute
    return "auto" if dtype == torch.float32 and not _torch_allows_bf16() else "bf16"


def distinct_computes(dtype: torch.dtype) -> tuple[str, ...]:
    """Returns the compute paths that differ for hidden states of `dtype`, the default's first."""
    return tuple(dict.fromkeys(resolve_compute(path, dtype) for path in COMPUTE_PATHS))


def _torch_allows_bf16() -> bool:
    import torch

    # PyTorch 2.9 brought a setting for the CPU alone. `set_float32_matmul_precision` sets it, too,
    # but does not notice when it is changed afterwards.
    cpu = getattr(torch.backends.mkldnn, "matmul", None)
    if cpu is not None:
        precision: str = cpu.fp32_precision
        return precision == "bf16"
    return torch.get_float32_matmul_precision() == "medium"
