"""How commands end: one line for an error that the user can correct, a traceback for a bug."""

from __future__ import annotations

import importlib.util
import traceback as tracebacks
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer

from cpumoe._base.memory import is_out_of_memory
from cpumoe._core import VariantError
from cpumoe.cli.console import print_error, print_warning
from cpumoe.text.generation import ModelError

VALIDATION_FAILED = 1
BAD_INPUT = 2


class InputError(ValueError):
    """The user asked for something that cannot be done."""


def require_package(package: str, extra: str, purpose: str) -> None:
    """Refuses to go on without an optional package.

    Raises:
        InputError: the package is missing; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f'{purpose} needs {package}, which is not installed: pip install "cpumoe[{extra}]"'
        )


@contextmanager
def reported(traceback: bool) -> Iterator[None]:
    """Turns bad input (ValueError, OSError) into one line on standard error and exit code 2.

    Too little memory counts as bad input, and so do faults of a model's files and of a variant's
    library. If the reader of the output has gone away (``| head``), the command ends without a
    message. Other exceptions are bugs and keep their traceback. Warnings become one line as well.

    Args:
        traceback: whether to print the traceback too.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except BrokenPipeError:
            raise  # Click ends the program without a message
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            message = _worded(error)
            if isinstance(error, RuntimeError):
                if is_out_of_memory(error):
                    message = ""
                elif not isinstance(error, (ModelError, VariantError)):
                    raise
            if traceback:
                tracebacks.print_exc()
            print_error(message or "not enough memory")
            raise typer.Exit(BAD_INPUT) from None


def _worded(error: Exception) -> str:
    # The system's own errors begin with "[Errno 2]", which tells a user nothing.
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print_warning(str(message))
