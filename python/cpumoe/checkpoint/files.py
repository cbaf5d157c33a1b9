"""Reading a checkpoint's files before anything in them is believed.

Limits are checked against a file's size before its content is read. Whatever a file holds, the
outcome is a value or one `CheckpointError` of one line with the file's name.
"""

from __future__ import annotations

import json
import os
import reprlib
import weakref
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

# Bytes of a JSON file. Published configs have up to 2 MB, mostly names of unquantized modules.
CONFIG_LIMIT = 16 << 20
# The limit that the safetensors format sets itself. An index names what headers name: Kimi-K2's,
# 200,000 tensors, has 24 MB.
HEADER_LIMIT = INDEX_LIMIT = 100_000_000
# Characters of a tensor's name. Published names have at most 150.
NAME_LIMIT = 1000

POINTER_START = b"version https://git-lfs.github.com/spec/"
_SHOWN_CHARACTERS = 120

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = _SHOWN_CHARACTERS


class CheckpointError(ValueError):
    """A checkpoint's content is not what it must be; the message says what was expected."""


def shown(text: str, room: int = _SHOWN_CHARACTERS) -> str:
    """Returns text that came from a file on one line, cut to the characters there is room for."""
    cut = text if len(text) <= room else f"{text[: room - 1]}…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def shown_value(value: object) -> str:
    """Returns the ``repr`` of a value that came from a file, without what a message cannot hold."""
    return shown(_short.repr(value))


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: a regular file.
        limit: of its size in bytes.

    Raises:
        CheckpointError: too large, a Git LFS pointer, malformed, another type, duplicate names.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _check_size(file, limit, path)
        content = file.read(limit)  # no more, should it grow meanwhile
    check_pointer(content, path)
    return parse_object(content, path)


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object of a file.

    Raises:
        CheckpointError: malformed, no UTF-8, another type, duplicate names.
    """
    try:
        # Decoded here, as the host does: `json` would take UTF-16 as well.
        value = json.loads(text.decode(), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        problem = shown(str(error)) if text.strip() else "the file is empty; download it again"
        raise CheckpointError(f"{path}: malformed JSON: {problem}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def check_pointer(start: bytes, path: Path) -> None:
    """Refuses a file that only says what Git LFS would put in its place.

    Args:
        start: its first bytes.
        path: its name, for the message.

    Raises:
        CheckpointError: a pointer.
    """
    if start.startswith(POINTER_START):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, expected the file itself: run `git lfs pull` in "
            f"{path.parent}, or download it again"
        )


def check_content(path: Path, limit: int) -> None:
    """Refuses a file that is too large or a pointer, for a file that others will read.

    Args:
        path: a regular file.
        limit: of its size in bytes.

    Raises:
        CheckpointError: so it is.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _check_size(file, limit, path)
        check_pointer(file.read(len(POINTER_START)), path)


def check_name(name: str, path: Path) -> None:
    """Refuses a tensor's name that is so long that searching it would take long.

    Raises:
        CheckpointError: longer than `NAME_LIMIT`.
    """
    if len(name) > NAME_LIMIT:
        raise CheckpointError(
            f"{path}: expected tensor names of at most {NAME_LIMIT} characters, got {len(name)}: "
            f"{shown(name)}"
        )


class FileState:
    """What tells whether a file that is open has been written to since.

    A mapped file that shrinks takes its pages along, and a process that touches them is killed. Ask
    shortly before: between the question and the touch nothing can protect it.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Notes the state of `file`, of which it keeps a descriptor."""
        self._path = path
        self._descriptor = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._state = self._now()

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._state[0]

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
        """Raises CheckpointError if `path` is another file by now."""
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
