"""SGLang's records of which experts tokens use, and the experts that the GPU should have.

SGLang counts while it is told to record (``/start_expert_distribution_record``), and writes a file
(``/dump_expert_distribution_record``).
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from cpumoe._base.tensors import describe, dtype_name
from cpumoe.integrations.sglang.checks import integer_in
from cpumoe.integrations.sglang.placement import generate_gpu_experts_masks

_COUNTS = "logical_count"
_DTYPES = (
    *(torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8),
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
)
_MOST = 2**62  # sums below it, rounded to float64, are sums of int64, too
_MODE = "--expert-distribution-recorder-mode stat"


@dataclass(frozen=True)
class Placement:
    """The experts of each layer that the GPU should have.

    Attributes:
        counts: how often each expert was used, int64 ``[layers, experts]``. Layers without routed
            experts have zeros.
        gpu_experts: number of experts per layer that the GPU has.
        physical_to_logical: int64 ``[layers, experts]``, for SGLang. The first `gpu_experts` slots
            of a layer, which are the GPU's, have its most used experts, in falling order. The
            others have the layer's other experts, in rising order.
        masks: bool ``[layers, experts]``, for sglang-kt; True: the GPU has the expert. The GPU
            has as many experts as with the map, but the most used ones of all layers together.
    """

    counts: torch.Tensor
    gpu_experts: int
    physical_to_logical: torch.Tensor
    masks: torch.Tensor

    def unplaced_share(self) -> float:
        """Returns the share of routed tokens whose expert is one of the first of its layer."""
        return _share(self.counts[:, : self.gpu_experts], self.counts)

    def mapped_share(self) -> float:
        """Returns the share of routed tokens that the GPU computes with `physical_to_logical`."""
        placed = self.physical_to_logical[:, : self.gpu_experts]
        return _share(self.counts.gather(1, placed), self.counts)

    def masked_share(self) -> float:
        """Returns the share of routed tokens that the GPU computes with `masks`."""
        return _share(self.counts[self.masks], self.counts)

    def write_map(self, path: str | os.PathLike[str]) -> None:
        """Writes `physical_to_logical`, for ``--init-expert-location`` of SGLang.

        Raises:
            OSError: the file cannot be written. An older file of this name stays as it was.
        """
        document = {"physical_to_logical_map": self.physical_to_logical.tolist()}
        _replace(path, (json.dumps(document) + "\n").encode())

    def write_counts(self, path: str | os.PathLike[str]) -> None:
        """Writes `counts`, from which sglang-kt makes `masks`, and `masks` beside them.

        Raises:
            OSError: the file cannot be written. An older file of this name stays as it was.
        """
        write_counts(self.counts, path, gpu_experts_masks=self.masks)


def read_counts(path: str | os.PathLike[str]) -> torch.Tensor:
    """Returns how often each expert was used: int64 ``[layers, experts]``.

    Args:
        path: a file that `write_counts` has written, or SGLang or sglang-kt in the mode ``stat``.
            Only tensors and plain values are read from it, and none of its code is run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else, or nothing was recorded.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # A damaged file may raise anything.
        raise ValueError(
            f"{path}: expected a file that `cpumoe eval --record` or SGLang's "
            "/dump_expert_distribution_record wrote, got something else, or a damaged file"
        ) from error
    if isinstance(content, dict) and "records" in content and _COUNTS not in content:
        raise ValueError(
            f"{path}: expected counts, got the records of single passes; start SGLang with {_MODE}"
        )
    counts = content.get(_COUNTS) if isinstance(content, dict) else content
    if not isinstance(counts, torch.Tensor):
        raise ValueError(
            f"{path}: {_COUNTS}: expected a tensor, got {type(counts).__name__}; start SGLang with "
            f"{_MODE}"
        )
    return _summed(counts, path)


def write_counts(counts: torch.Tensor, path: str | os.PathLike[str], **more: torch.Tensor) -> None:
    """Writes how often each expert was used, as SGLang's recorder does.

    Args:
        counts: int64 ``[layers, experts]``.
        path: the file, which `read_counts` reads.
        **more: further tensors for the file.

    Raises:
        OSError: the file cannot be written. An older file of this name stays as it was.
    """
    content = io.BytesIO()
    torch.save({_COUNTS: counts[None], **more}, content)
    _replace(path, content.getvalue())


def place(counts: torch.Tensor, gpu_experts: int) -> Placement:
    """Chooses the most used experts for the GPU.

    Args:
        counts: how often each expert was used, int64 ``[layers, experts]``.
        gpu_experts: number of experts per layer that the GPU has. Among equally used experts,
            those that come first are taken.

    Raises:
        TypeError, ValueError: `gpu_experts` is no integer from 0 to the number of experts.
    """
    experts = counts.shape[1]
    chosen = integer_in(gpu_experts, "gpu_experts", 0, experts)
    hottest = counts.argsort(dim=1, descending=True, stable=True)
    order = torch.cat([hottest[:, :chosen], hottest[:, chosen:].sort(dim=1).values], dim=1)
    used = counts.sum(dim=1) > 0
    # A layer without routed experts has nothing to place.
    order[~used] = torch.arange(experts, device="cpu")
    masks = generate_gpu_experts_masks(counts, chosen * int(used.sum()))
    return Placement(counts, chosen, order, masks)


def _summed(counts: torch.Tensor, path: object) -> torch.Tensor:
    """The counts of all recorded passes together."""
    subject = f"{path}: {_COUNTS}"
    if counts.is_nested or counts.layout is not torch.strided:
        layout = "torch.nested" if counts.is_nested else counts.layout
        raise ValueError(
            f"{subject}: expected a dense tensor, got layout {layout}; save it with .to_dense()"
        )
    if counts.device.type != "cpu":
        raise ValueError(
            f"{subject}: expected a tensor with values, got device {counts.device}; record again"
        )
    if counts.dim() not in (2, 3) or counts.numel() == 0:
        raise ValueError(
            f"{subject}: expected numbers [passes, layers, experts], got {describe(counts)}"
        )
    if counts.dtype not in _DTYPES:
        names = ", ".join(dtype_name(dtype) for dtype in _DTYPES)
        raise ValueError(
            f"{subject}: expected one of {names}, got {describe(counts)}; save it with .long()"
        )
    passes = counts if counts.dim() == 3 else counts[None]
    if passes.is_floating_point() and not bool(passes.isfinite().all()):
        raise ValueError(f"{subject}: expected finite numbers, got NaN or infinity")
    if bool((passes < 0).any()):
        raise ValueError(f"{subject}: expected numbers from 0 on, got negative ones")
    routed = float(passes.double().sum())  # An integer's sum would wrap around.
    if routed >= _MOST:
        raise ValueError(
            f"{subject}: expected a sum below 2^62, got {routed:.3g}; the file is damaged: record "
            "again"
        )
    total = passes.to(torch.int64).sum(dim=0)
    if not bool(total.any()):
        raise ValueError(
            f"{path}: expected counts of routed tokens, got zeros; send requests between "
            "/start_expert_distribution_record and /dump_expert_distribution_record"
        )
    return total


def _replace(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file wholly, or leaves an older file of this name as it is.

    Raises:
        OSError: the file cannot be written. The error names `path`, whatever the system refused.
    """
    target = Path(os.path.realpath(path))  # A link stays a link.
    beside = target.with_name(f".cpumoe-{secrets.token_hex(8)}.tmp")
    try:
        try:
            with beside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, beside)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _share(part: torch.Tensor, counts: torch.Tensor) -> float:
    return int(part.sum()) / int(counts.sum())
