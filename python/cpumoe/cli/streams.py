"""Standard streams that may be closed, full, or without an encoding.

A character that an encoding lacks is written as a backslash escape. An answer that cannot be
written is an error, and is reported once. A message that cannot be written is dropped.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_OUTPUT_LOST = 1


class OutputError(Exception):
    """Standard output cannot be written.

    This is not an OSError, which callers would take for a fault of a file.
    """


@contextmanager
def standard_streams() -> Iterator[None]:
    """Makes ``sys.stdin``, ``sys.stdout`` and ``sys.stderr`` usable, and writes all out at the end.

    Raises:
        OutputError: standard output did not take all that was written.
        SystemExit: the reader of standard output has gone away.
    """
    _open_closed_descriptors()
    _prepare_input()
    output = _Output()
    sys.stdout = _text_writer(output, sys.stdout, line_buffering=output.isatty())
    sys.stderr = _text_writer(_Messages(2, "w", closefd=False), sys.stderr, line_buffering=True)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(_OUTPUT_LOST) from None


def _open_closed_descriptors() -> None:
    """Occupies those of descriptors 0, 1 and 2 that are free, so that no other file gets them.

    Writing to a descriptor that was closed still fails.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # os.open returns the lowest free descriptor, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def _prepare_input() -> None:
    if sys.stdin is None:
        raw = io.FileIO(0, closefd=False)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8")
    elif isinstance(sys.stdin, io.TextIOWrapper):
        # ASCII is a subset of UTF-8, so valid input is read as before.
        encoding = codecs.lookup(sys.stdin.encoding).name
        sys.stdin.reconfigure(
            encoding="utf-8" if encoding == "ascii" else encoding, errors="strict"
        )


def _text_writer(raw: io.FileIO, replaced: TextIO | None, *, line_buffering: bool) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if replaced is None else replaced.encoding,
        errors="backslashreplace",
        line_buffering=line_buffering,
        write_through=bool(getattr(replaced, "write_through", False)),
    )


class _Patient(io.FileIO):
    """Waits where a non-blocking descriptor, which another program left, is full."""

    def write(self, data: ReadableBuffer, /) -> int:
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


class _Output(_Patient):
    """Standard output. The first error is raised, and all later output is dropped."""

    def __init__(self) -> None:
        super().__init__(1, "w", closefd=False)
        self._lost = False

    def write(self, data: ReadableBuffer, /) -> int:
        if self._lost:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._lost = True
            if isinstance(error, BrokenPipeError):
                raise
            if error.errno == errno.EBADF:
                raise OutputError(
                    "standard output is closed and cannot take the result; redirect it to a file, "
                    "or to /dev/null"
                ) from None
            raise OutputError(f"standard output: {error.strerror}") from None


class _Messages(_Patient):
    """Standard error. Output that cannot be written is dropped: no stream is left to report it."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes
