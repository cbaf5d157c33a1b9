"""Reads and checks a checkpoint's files, whose content may be anything.

A file's size is compared with a limit before its content is read. Whatever a file holds, the
outcome is a value, or a `CheckpointError` of one line with the file's name.
"""

from __future__ import annotations

import json
import os
import reprlib
import weakref
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

# The most bytes of a JSON file. Published configs have up to 2 MB, mostly names of modules.
CONFIG_LIMIT = 16 << 20
# The limit of the safetensors format itself. An index has the names of all headers. The index of
# Kimi-K2, with 200,000 tensors, has 24 MB.
HEADER_LIMIT = INDEX_LIMIT = 100_000_000
# The most characters of a tensor's name. Published names have at most 150.
NAME_LIMIT = 1000

POINTER_START = b"version https://git-lfs.github.com/spec/"
_SHOWN_CHARACTERS = 120

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = _SHOWN_CHARACTERS


class CheckpointError(ValueError):
    """A checkpoint's content is wrong. The message says what was expected."""


def shown(text: str, room: int = _SHOWN_CHARACTERS) -> str:
    """Returns text from a file on one line, cut to `room` characters."""
    cut = text if len(text) <= room else f"{text[: room - 1]}…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def shown_value(value: object) -> str:
    """Returns the ``repr`` of a value from a file, shortened to fit into a message."""
    return shown(_short.repr(value))


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: a regular file.
        limit: the most bytes that the file may have.

    Raises:
        CheckpointError: the file is too large, a Git LFS pointer, malformed, or no object, or has
            duplicate names.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        _check_size(file, limit, path)
        content = file.read(limit)  # the file may have grown since
    check_pointer(content, path)
    return parse_object(content, path)


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """Parses the JSON object in a file's content.

    Raises:
        CheckpointError: the text is malformed, not UTF-8, or no object, or has duplicate names.
    """
    try:
        # Decoded here, as transformers does, because `json` would accept UTF-16 as well.
        value = json.loads(text.decode(), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        problem = shown(str(error)) if text.strip() else "the file is empty; download it again"
        raise CheckpointError(f"{path}: malformed JSON: {problem}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def check_pointer(start: bytes, path: Path) -> None:
    """Refuses a Git LFS pointer, which stands for a file that was not downloaded.

    Args:
        start: the first bytes of the file.
        path: the name of the file, for the message.

    Raises:
        CheckpointError: the file is a pointer.
    """
    if start.startswith(POINTER_START):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, expected the file itself: run `git lfs pull` in "
            f"{path.parent}, or download it again"
        )


def check_content(path: Path, limit: int) -> None:
    """Refuses a file that is too large or a Git LFS pointer, before another library reads it.

    Args:
        path: a regular file.
        limit: the most bytes that the file may have.

    Raises:
        CheckpointError: the file is too large or a pointer.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        _check_size(file, limit, path)
        check_pointer(file.read(len(POINTER_START)), path)


def check_name(name: str, path: Path) -> None:
    """Refuses a tensor's name that is so long that matching it would be slow.

    Raises:
        CheckpointError: the name is longer than `NAME_LIMIT`.
    """
    if len(name) > NAME_LIMIT:
        raise CheckpointError(
            f"{path}: expected tensor names of at most {NAME_LIMIT} characters, got {len(name)}: "
            f"{shown(name)}"
        )


class FileState:
    """Detects that an open file has been written to.

    If a mapped file shrinks, its last pages vanish, and the system kills a process that touches
    them. Check shortly before an access. Nothing protects the time between check and access.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Notes the state of `file`, and keeps a descriptor of it."""
        self._path = path
        self._descriptor = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._state = self._now()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._state[0]

    @property
    def stamp(self) -> tuple[int, int]:
        """Bytes of the file, and its modification time in nanoseconds."""
        return self._state

    def check(self) -> None:
        """Raises CheckpointError if the file has changed."""
        now = self._now()
        if now != self._state:
            sizes = "" if now[0] == self.size else f": it had {self.size} bytes and has {now[0]}"
            raise CheckpointError(
                f"{self._path}: changed while it was read{sizes}; load the checkpoint again when "
                f"nothing writes to it"
            )

    def check_is(self, path: Path) -> None:
        """Raises CheckpointError if `path` is now another file."""
        if not os.path.samestat(os.fstat(self._descriptor), path.stat()):
            raise CheckpointError(
                f"{path}: replaced while it was opened; load the checkpoint again when nothing "
                f"writes to it"
            )

    def close(self) -> None:
        """Closes the descriptor."""
        self._close()

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


def _check_size(file: BinaryIO, limit: int, path: Path) -> None:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise CheckpointError(f"{path}: expected at most {limit} bytes, got {size}")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate name {shown_value(counts.most_common(1)[0][0])}")
    return result
