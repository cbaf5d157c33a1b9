"""Lazy, zero-copy access to the tensors of a safetensors checkpoint folder.

`safetensors.safe_open` reads the tensors. They are views of the mapped file.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch

from cpumoe._base.tensors import dtype_name
from cpumoe.checkpoint.files import CONFIG_LIMIT, CheckpointError, FileState, read_json, shown
from cpumoe.checkpoint.header import FLOAT4_NAME, TORCH_DTYPES, TensorInfo, read_header
from cpumoe.checkpoint.weight_files import (
    CONFIG_NAME,
    SHARD_SUFFIX,
    is_index,
    read_index,
    weights_file,
)

# The hub's cache has a folder for each model, which has a checkpoint's folder for each commit.
_SNAPSHOTS = "snapshots"
_NO_MEMORY = os.strerror(errno.ENOMEM)


@dataclass(frozen=True)
class _Shard:
    tensors: Mapping[str, TensorInfo]
    handle: Any  # safetensors.safe_open has no public type
    state: FileState


class SafetensorsFolder:
    """A checkpoint folder: config.json and one or several safetensors files.

    A shard is opened at the first access to one of its tensors. Methods may be called from several
    threads. `close` (or leaving a ``with`` block) closes the shards. A tensor keeps its file mapped
    as long as it lives.

    Args:
        path: the folder.
        variant: the weights' variant, as in transformers' `from_pretrained`.
        files: the safetensors files that hold the weights, instead of those that transformers would
            choose. They are opened at once, because only they say which tensors they hold.

    Attributes:
        path: the folder.
        variant: the weights' variant; None: none.
        files: the files that were given.
        config: the content of config.json.
        index: the index of the shards; None: it was not needed.
        index_metadata: the index's ``metadata``.

    Raises:
        FileNotFoundError: the folder does not exist, or it has no config.json, or no safetensors
            file or index.
        NotADirectoryError: `path` is a file.
        TypeError: `path` is no str and no path.
        ValueError: `path` is empty.
        CheckpointError: JSON is malformed, names are duplicate, or a file is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        files: Sequence[str | os.PathLike[str]] | None = None,
    ) -> None:
        """Reads config.json and the index, and opens shards only if there is no index."""
        self.path = _checked_path(path)
        self.variant = variant
        self.files = files
        self.config = read_config(self.path)
        self.index: Path | None = None
        self.index_metadata: Any = None
        self._shards: dict[Path, _Shard] | None = {}
        self._lock = threading.Lock()
        self._shard_of: Mapping[str, Path]
        if files is not None:
            self._shard_of = self._tensors_of([Path(file) for file in files])
            return
        file = weights_file(self.path, self.config, variant)
        if is_index(file):
            self.index = self.path / file
            weight_map, self.index_metadata = read_index(self.path, file)
            paths = {shard: self.path / shard for shard in set(weight_map.values())}
            self._shard_of = {name: paths[shard] for name, shard in weight_map.items()}
        else:
            self._shard_of = self._tensors_of([self.path / file])

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
        """Closes the shards. Further reads raise ValueError."""
        with self._lock:
            shards, self._shards = self._shards, None
        for shard in (shards or {}).values():
            shard.state.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._shards is None

    def stamps(self) -> dict[Path, tuple[int, int]]:
        """Returns size and modification time of each shard that was opened, as they were then.

        The keys are absolute paths.
        """
        with self._lock:
            shards = self._shards or {}
            return {path.absolute(): shard.state.stamp for path, shard in shards.items()}

    def __contains__(self, name: str) -> bool:
        """Whether the index lists a tensor of this name."""
        return name in self._shard_of

    def names(self) -> Iterable[str]:
        """Returns the names of all tensors."""
        return self._shard_of.keys()

    def shard_files(self) -> list[Path]:
        """Returns the files that hold the tensors, existing or not."""
        return sorted(set(self._shard_of.values()))

    def missing_shards(self) -> list[str]:
        """Returns the names of shard files that the index lists but the folder does not have."""
        return [os.path.relpath(p, self.path) for p in self.shard_files() if not p.is_file()]

    def check_shards(self) -> None:
        """Opens all shards, before another library reads them.

        Raises:
            FileNotFoundError, CheckpointError, ValueError: see `tensor`.
        """
        wanted = {shard: name for name, shard in self._shard_of.items()}
        for shard in sorted(wanted):
            self._open(shard, wanted[shard])

    def check_unchanged(self) -> None:
        """Raises CheckpointError if an open shard has been written to."""
        with self._lock:
            shards = list((self._shards or {}).values())
        for shard in shards:
            shard.state.check()

    def info(self, name: str) -> TensorInfo:
        """Returns a tensor's dtype and shape, from the header of its shard.

        Raises:
            FileNotFoundError, CheckpointError, ValueError: see `tensor`.
        """
        return self._shard(name).tensors[name]

    def check(self, name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...]) -> None:
        """Makes the checks of `tensor`, from the shard's header alone."""
        self._checked(name, dtypes, shape)

    def tensor(
        self, name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Returns a tensor as a view of its mapped file, without copying or reading it.

        Args:
            name: the tensor's name.
            dtypes: accepted dtypes.
            shape: required shape.

        Raises:
            FileNotFoundError: the tensor's shard is missing.
            OSError: the shard cannot be read or mapped.
            CheckpointError: the shard is truncated or malformed or has changed since it was opened,
                or the tensor is missing or has another dtype or shape.
            ValueError: the folder is closed.
        """
        shard = self._checked(name, dtypes, shape)
        shard.state.check()
        tensor: torch.Tensor = shard.handle.get_tensor(name)
        return tensor

    def _checked(
        self, name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...]
    ) -> _Shard:
        shard = self._shard(name)
        info = shard.tensors[name]
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None and info.dtype == FLOAT4_NAME:
            raise CheckpointError(
                f"{shown(name)}: {FLOAT4_NAME} needs PyTorch 2.8 or newer, got {torch.__version__}"
            )
        if dtype is None or dtype not in dtypes or info.shape != shape:
            expected = " or ".join(dtype_name(accepted) for accepted in dtypes)
            raise CheckpointError(f"{shown(name)}: expected {expected} {list(shape)}, got {info}")
        return shard

    def _tensors_of(self, files: Sequence[Path]) -> Mapping[str, Path]:
        """Opens files, and returns the file of each tensor."""
        found: dict[str, Path] = {}
        for path in files:
            if path.suffix != SHARD_SUFFIX:
                raise CheckpointError(
                    f"{path}: expected a {SHARD_SUFFIX} file; cpumoe reads no other kind"
                )
            for name in self._open(path).tensors:
                other = found.setdefault(name, path)
                if other != path:
                    raise _held_twice(name, other, path)
        return found

    def _shard(self, name: str) -> _Shard:
        path = self._shard_of.get(name)
        if path is None:
            raise CheckpointError(f"{shown(name)}: no such tensor in {self.path}")
        shard = self._open(path, name)
        if name not in shard.tensors:
            raise CheckpointError(
                f"{shown(name)}: no such tensor in {path}, where the index puts it"
            )
        return shard

    def _open(self, path: Path, wanted: str | None = None) -> _Shard:
        with self._lock:
            if self._shards is None:
                raise ValueError(f"{self.path}: the checkpoint is closed")
            shard = self._shards.get(path)
            if shard is None:
                shard = _open_shard(path, wanted)
                if self.index is not None:
                    self._check_against_index(path, shard)
                self._shards[path] = shard
            return shard

    def _check_against_index(self, path: Path, shard: _Shard) -> None:
        # transformers reads all tensors of all shards, whatever the index says, and keeps the last.
        for name in shard.tensors:
            other = self._shard_of.get(name, path)
            if other != path:
                shard.state.close()
                raise _held_twice(name, path, other)


def _checked_path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or an os.PathLike of a folder, got {path!r}")
    if not os.fspath(path):
        raise ValueError(
            "path: expected a checkpoint's folder, got ''; pass '.' for the working directory"
        )
    return Path(path)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder does not exist, or it has no config.json.
        NotADirectoryError: `folder` is a file.
        CheckpointError: the JSON is malformed.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a checkpoint folder, got a file")
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: not a checkpoint: it has no {CONFIG_NAME}{_hint(folder)}"
        )
    return read_json(path, CONFIG_LIMIT)


def _hint(folder: Path) -> str:
    """Returns a hint at the checkpoint if `folder` is a model's folder in the hub's cache."""
    snapshots = folder if folder.name == _SNAPSHOTS else folder / _SNAPSHOTS
    found = [path.parent for path in snapshots.glob(f"*/{CONFIG_NAME}")]
    if not found:
        return ""
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return f"; it is a folder of the hub's cache, whose snapshot is {newest}"


def _held_twice(name: str, first: Path, second: Path) -> CheckpointError:
    return CheckpointError(
        f"{shown(name)}: expected one file that holds it, got two: {first} and {second}"
    )


def _open_shard(path: Path, wanted: str | None) -> _Shard:
    if not path.is_file():
        holds = "" if wanted is None else f"; it holds {shown(wanted)} (and others)"
        raise FileNotFoundError(f"{path}: missing shard{holds}")
    with path.open("rb") as file:
        state = FileState(file, path)
        tensors = read_header(file, state.size, path)
    try:
        handle = safetensors.safe_open(path, framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: {shown(str(error), 240)}") from error
    except (MemoryError, RuntimeError) as error:  # PyTorch raises a RuntimeError
        raise _not_mapped(path, state.size, error) from error
    state.check_is(path)
    return _Shard(tensors, handle, state)


def _not_mapped(path: Path, size: int, error: Exception) -> OSError:
    # PyTorch maps a file such that its pages could be written, so that the system counts its bytes.
    remedy = (
        "; raise the limit of virtual memory (`ulimit -v`), set the system's vm.overcommit_memory "
        "to 1, or split the checkpoint into smaller shards"
    )
    why = shown(str(error).rpartition(">: ")[2], 240)  # without PyTorch's "<FILE>: "
    return OSError(
        f"{path}: expected a file that can be mapped, got an error for its {size} bytes: {why}"
        f"{remedy if _NO_MEMORY in why else ''}"
    )
