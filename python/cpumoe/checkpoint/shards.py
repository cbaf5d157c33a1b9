"""Lazy, zero-copy access to the tensors of a safetensors checkpoint folder.

Source of the file format: https://github.com/huggingface/safetensors#format (eight bytes of header
length, a JSON header, then the tensors' bytes). Headers are parsed here, for checks and clear
errors; the bytes come from `safetensors.safe_open`, whose torch tensors are views of the mapped
file.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch

from cpumoe.formats import dtype_name

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

# safetensors' dtype names, as far as expert checkpoints use them.
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


class CheckpointError(ValueError):
    """A checkpoint's content is not what it must be; the message says what was expected."""


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def __str__(self) -> str:
        """``float8_e8m0fnu [4096, 64]``, with torch's name of the dtype where there is one."""
        dtype = TORCH_DTYPES.get(self.dtype)
        return f"{dtype_name(dtype) if dtype else self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class _Shard:
    tensors: Mapping[str, TensorInfo]
    handle: Any  # safetensors.safe_open has no public type


class SafetensorsFolder:
    """A checkpoint folder: config.json and one or several safetensors files.

    Shards are opened when a tensor of theirs is first asked for. Methods may be called from several
    threads. `close` (or leaving a ``with`` block) drops the handles; a tensor keeps its own file
    mapped for as long as it lives.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: no such folder, no config.json, or no safetensors file or index.
        NotADirectoryError: `path` is a file.
        CheckpointError: malformed JSON, duplicate names.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads config.json and the index; opens no shard."""
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such checkpoint folder")
        if not self.path.is_dir():
            raise NotADirectoryError(f"{self.path}: expected a checkpoint folder, got a file")
        self.config = _read_config(self.path)
        self._shard_of = self._read_index()
        self._shards: dict[str, _Shard] | None = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SafetensorsFolder:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the folder."""
        self.close()

    def close(self) -> None:
        """Drops the open shards; further reads raise ValueError."""
        with self._lock:
            self._shards = None

    def __contains__(self, name: str) -> bool:
        """Whether the index lists a tensor of this name."""
        return name in self._shard_of

    def names(self) -> Iterable[str]:
        """Returns the names of all tensors."""
        return self._shard_of.keys()

    def missing_shards(self) -> list[str]:
        """Returns the names of shard files that the index lists and the folder lacks."""
        shards = sorted(set(self._shard_of.values()))
        return [shard for shard in shards if not (self.path / shard).is_file()]

    def info(self, name: str) -> TensorInfo:
        """Returns dtype, shape and size of a tensor; reads no more than its shard's header.

        Raises:
            FileNotFoundError, CheckpointError, ValueError: as `tensor`.
        """
        return self._shard(name).tensors[name]

    def check(self, name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...]) -> None:
        """Checks a tensor as `tensor` does, and raises as it does, from its shard's header."""
        self._checked(name, dtypes, shape)

    def tensor(
        self, name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Returns a tensor as a view of its mapped file: no copy, no read until touched.

        Args:
            name: the tensor's name.
            dtypes: accepted dtypes.
            shape: required shape.

        Raises:
            FileNotFoundError: its shard is missing.
            CheckpointError: the shard is truncated or malformed, the tensor is missing, or its
                dtype or shape differ.
            ValueError: the folder is closed.
        """
        tensor: torch.Tensor = self._checked(name, dtypes, shape).handle.get_tensor(name)
        return tensor

    def _checked(
        self, name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...]
    ) -> _Shard:
        shard = self._shard(name)
        info = shard.tensors[name]
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None or dtype not in dtypes or info.shape != shape:
            expected = " or ".join(dtype_name(accepted) for accepted in dtypes)
            raise CheckpointError(f"{name}: expected {expected} {list(shape)}, got {info}")
        return shard

    def _read_index(self) -> Mapping[str, str]:
        index_path = self.path / INDEX_NAME
        if index_path.is_file():
            weight_map = _read_json(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(shard, str) and Path(shard).name == shard
                for shard in weight_map.values()
            ):
                raise CheckpointError(
                    f"{index_path}: expected a weight_map of tensor names to file names"
                )
            return weight_map
        if (self.path / SINGLE_NAME).is_file():
            tensors = _read_header(self.path / SINGLE_NAME)
            return dict.fromkeys(tensors, SINGLE_NAME)
        raise FileNotFoundError(
            f"{self.path}: not a checkpoint: it has neither {INDEX_NAME} nor {SINGLE_NAME}"
        )

    def _shard(self, name: str) -> _Shard:
        file = self._shard_of.get(name)
        if file is None:
            raise CheckpointError(f"{name}: no such tensor in {self.path}")
        with self._lock:
            if self._shards is None:
                raise ValueError(f"{self.path}: the checkpoint is closed")
            shard = self._shards.get(file)
            if shard is None:
                shard = self._shards[file] = _open_shard(self.path / file, name)
        if name not in shard.tensors:
            raise CheckpointError(
                f"{name}: no such tensor in {self.path / file}, where the index puts it"
            )
        return shard


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not a checkpoint: it has no {CONFIG_NAME}")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_object(path.read_bytes(), str(path))


def _parse_object(text: bytes, subject: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{subject}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{subject}: expected a JSON object, got {type(value).__name__}")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate name {counts.most_common(1)[0][0]!r}")
    return result


def _open_shard(path: Path, wanted: str) -> _Shard:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing shard; it holds {wanted} (and others)")
    tensors = _read_header(path)
    try:
        handle = safetensors.safe_open(path, framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return _Shard(tensors, handle)


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads a shard's header and checks the file's size against it."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if actual < 8 or length > actual - 8:
            raise CheckpointError(
                f"{path}: truncated, or not a safetensors file: expected at least {8 + length} "
                f"bytes, got {actual}; download it again"
            )
        header = _parse_object(file.read(length), str(path))
    header.pop("__metadata__", None)
    try:
        spans = [entry["data_offsets"] for entry in header.values()]
        expected = 8 + length + max((int(end) for _, end in spans), default=0)
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), end - start)
            for (name, entry), (start, end) in zip(header.items(), spans, strict=True)
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header: {error!r}") from error
    if actual != expected:
        state = "truncated" if actual < expected else "too long"
        raise CheckpointError(
            f"{path}: {state}: expected {expected} bytes, got {actual}; download it again"
        )
    return tensors
