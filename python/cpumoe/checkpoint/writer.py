"""Writes a sharded safetensors checkpoint whose tensors arrive piece by piece.

`safetensors.torch.save_file` needs every tensor of a shard in memory. This writer needs memory for
one piece only: all names, dtypes and shapes are declared first, the headers are written, and the
bytes follow in any order. `cpumoe.checkpoint.header` describes the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from cpumoe._base.tensors import describe, dtype_name
from cpumoe.checkpoint.header import DTYPE_NAMES
from cpumoe.checkpoint.weight_files import CONFIG_NAME, INDEX_NAME, SINGLE_NAME


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.dtype.itemsize * math.prod(self.shape)


class CheckpointWriter:
    """Streams tensors into the shards of a checkpoint folder.

    Args:
        folder: an existing folder.
        specs: every tensor of the checkpoint, in the order in which they fill the shards.
        config: content of config.json.
        max_shard_bytes: the most bytes of a shard; a larger tensor gets a shard of its own.
        progress: called with (bytes written, bytes in all) after each piece.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        config: Mapping[str, Any],
        *,
        max_shard_bytes: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Creates the shards, with their headers and full sizes."""
        self._folder = folder
        self._config = config
        self._progress = progress
        self._specs = {spec.name: spec for spec in specs}
        self._written = dict.fromkeys(self._specs, 0)
        self._total = sum(spec.nbytes for spec in specs)
        self._done = 0
        self._place: dict[str, tuple[str, int]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._outputs: list[Path] = []
        shards = _split(specs, max_shard_bytes)
        try:
            for number, shard in enumerate(shards, 1):
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                self._start_shard(file if len(shards) > 1 else SINGLE_NAME, shard)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> CheckpointWriter:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the shards, and writes index and config; after an error, deletes all files."""
        if kind is not None:
            self._discard()
            return
        try:
            for file in self._files.values():
                file.close()
            self._finish()
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Writes rows ``row, row + 1, ...`` (along the first dimension) of a declared tensor.

        A tensor without dimensions is one row.

        Raises:
            ValueError: dtype or row shape are not as declared, or there are too many rows.
        """
        spec = self._specs[name]
        rows, given = (shape[0] if shape else 1 for shape in (spec.shape, tensor.shape))
        fits = tensor.shape[1:] == spec.shape[1:] and row + given <= rows
        if tensor.dtype != spec.dtype or not fits:
            raise ValueError(
                f"{name}: expected rows of {dtype_name(spec.dtype)} {list(spec.shape)}, "
                f"got {describe(tensor)} at row {row}"
            )
        shard, start = self._place[name]
        file = self._files[shard]
        file.seek(start + row * (spec.nbytes // rows))
        data = tensor.contiguous().flatten().view(torch.uint8)
        file.write(data.numpy().data)
        self._written[name] += data.numel()
        self._done += data.numel()
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _start_shard(self, file_name: str, specs: Sequence[TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # With the widest elements first, every tensor is aligned to its element size.
        for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._outputs.append(self._folder / file_name)
        file = (self._folder / file_name).open("wb")
        self._files[file_name] = file
        file.write(len(text).to_bytes(8, "little") + text)
        data = 8 + len(text)
        file.truncate(data + offset)
        for spec in specs:
            self._place[spec.name] = (file_name, data + header[spec.name]["data_offsets"][0])

    def _finish(self) -> None:
        short = [name for name, spec in self._specs.items() if self._written[name] != spec.nbytes]
        if short:
            raise ValueError(
                f"{short[0]}: expected all declared bytes, got fewer ({len(short)} such tensors)"
            )
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self._total},
                "weight_map": {name: shard for name, (shard, _) in sorted(self._place.items())},
            }
            self._write_json(INDEX_NAME, index)
        self._write_json(CONFIG_NAME, self._config)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        path = self._folder / name
        self._outputs.append(path)
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def _discard(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # the disk may have no room for the buffered bytes
                file.close()
        for path in self._outputs:
            path.unlink(missing_ok=True)


def _split(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards
