"""The header of a safetensors file: which tensors it holds.

Source of the format: https://github.com/huggingface/safetensors#format (eight bytes of header
length, a JSON header, then the tensors' bytes). This module parses headers, so that errors can name
sizes. The library `safetensors` reads the tensors' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cpumoe._base.tensors import dtype_name
from cpumoe.checkpoint.files import (
    HEADER_LIMIT,
    POINTER_START,
    CheckpointError,
    check_name,
    check_pointer,
    parse_object,
    shown,
    shown_value,
)
from cpumoe.formats.e2m1 import FLOAT4

# The dtype names of safetensors that expert checkpoints use.
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# The file counts FP4 values one by one. PyTorch and `TensorInfo.shape` count them in pairs.
FLOAT4_NAME = "F4"
if FLOAT4 is not None:
    TORCH_DTYPES[FLOAT4_NAME] = FLOAT4

_LENGTH_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in a shard's header. The shape is the one that PyTorch gives it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def __str__(self) -> str:
        """``float8_e8m0fnu [4096, 64]``, with PyTorch's name of the dtype if it has one."""
        dtype = TORCH_DTYPES.get(self.dtype)
        return f"{dtype_name(dtype) if dtype else shown(self.dtype)} {shown_value([*self.shape])}"


def read_header(file: BinaryIO, size: int, path: Path) -> Mapping[str, TensorInfo]:
    """Reads the header of a safetensors file, and checks the file's size against it.

    Args:
        file: the open file, at its start.
        size: bytes of the file.
        path: name of the file, for messages.

    Raises:
        CheckpointError: the file is truncated, too long, a Git LFS pointer, or no safetensors file.
    """
    start = file.read(len(POINTER_START))
    check_pointer(start, path)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if size >= _LENGTH_BYTES and length > HEADER_LIMIT:
        raise CheckpointError(
            f"{path}: not a safetensors file: expected a header of at most {HEADER_LIMIT} bytes, "
            f"got one of {length}; download it again"
        )
    if length > size - _LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file: expected at least "
            f"{_LENGTH_BYTES + length} bytes, got {size}; download it again"
        )
    file.seek(_LENGTH_BYTES)
    header = parse_object(file.read(length), path)
    header.pop(_METADATA, None)
    expected = _LENGTH_BYTES + length
    tensors = {}
    for name in list(header):
        check_name(name, path)
        # Each entry is dropped after reading, because there may be millions.
        tensors[name], end = _tensor_info(name, header.pop(name), path)
        expected = max(expected, _LENGTH_BYTES + length + end)
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise CheckpointError(
            f"{path}: {state}: expected {expected} bytes, got {size}; download it again"
        )
    return tensors


def _tensor_info(name: str, entry: Any, path: Path) -> tuple[TensorInfo, int]:
    """Returns an entry's content, and where the tensor's bytes end."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in shape)
        if dtype == FLOAT4_NAME:
            sound = sound and shape[-1] % 2 == 0
            shape = [*shape[:-1], shape[-1] // 2]
        if sound and type(start) is type(end) is int and 0 <= start <= end:
            return TensorInfo(dtype, tuple(shape), end - start), end
    except (IndexError, KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(
        f"{path}: malformed safetensors header: {shown(name)}: expected dtype, shape and two "
        f"data_offsets, got {shown_value(entry)}"
    )
