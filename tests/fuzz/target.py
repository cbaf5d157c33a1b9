"""The interface of targets: how to draw inputs, and what must hold for each."""

import abc
import traceback
from pathlib import Path

import cpumoe

_PACKAGE = str(Path(cpumoe.__file__).parent)
_LONGEST_MESSAGE = 4000


class Target(abc.ABC):
    """A reader of input from outside."""

    @abc.abstractmethod
    def strategy(self):
        """Returns Hypothesis' strategy for inputs."""

    @abc.abstractmethod
    def check(self, data):
        """Reads one input; raises an exception that a caller must never see."""

    def close(self):  # noqa: B027  most hold nothing
        """Releases the target's resources."""


def in_one_line(error):
    """Checks an error of a documented type: cpumoe raises it, in one line that a person can read.

    Raises:
        AssertionError: it is none of our own, or its message is not fit to be shown.
    """
    message = str(error)
    assert message.isprintable(), f"not one printable line: {message!r}"
    _of_ours(error, message)


def in_one_line_for_terminals(error):
    """Like `in_one_line`, of an error that is only printed, without its control characters."""
    message = str(error)
    assert len(message.splitlines()) == 1, f"not one line: {message!r}"
    _of_ours(error, message)


def _of_ours(error, message):
    frames = traceback.extract_tb(error.__traceback__)
    assert frames[-1].filename.startswith(_PACKAGE), f"raised elsewhere: {error!r}"
    assert message, f"an empty message: {error!r}"
    assert len(message) <= _LONGEST_MESSAGE, f"{len(message)} characters: {message[:300]}"
