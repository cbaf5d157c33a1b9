"""Matches module names with the names and patterns of a quantization_config, in bounded time.

Patterns come from the checkpoint, and a short regular expression can take arbitrarily long. So
patterns are compiled under limits, and matched by `regex`, which has a time limit, unlike `re`. RE2
would need no time limit, but lacks look-ahead and back-references, so it would refuse patterns that
compressed-tensors accepts.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

import regex

from cpumoe.checkpoint.files import CheckpointError, shown, shown_value

_PREFIX = "re:"
_LENGTH_LIMIT = 500
# `regex` copies a repeated part as often as the product of nested counts.
_REPEAT_LIMIT = 100
_SECONDS = 2.0

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class ModulePatterns:
    """Matches modules with a checkpoint's patterns, within a time limit for all matches together.

    As in compressed-tensors, a target is a module's whole name, or ``re:`` and a Python regular
    expression that must match at the start of the name.
    """

    def __init__(self) -> None:
        """Starts with the whole time limit."""
        self._compiled: dict[str, Any] = {}
        self._seconds = _SECONDS

    def checked(self, targets: Any, key: str) -> list[str]:
        """Returns `targets`, the value of `key` in config.json, if it is a list of targets.

        Raises:
            CheckpointError: `targets` is something else, or a pattern is invalid or too costly.
        """
        if not isinstance(targets, list) or not all(isinstance(item, str) for item in targets):
            raise CheckpointError(
                f"config.json: {key}: expected a list of strings, got {shown_value(targets)}"
            )
        for target in targets:
            if target.startswith(_PREFIX) and target not in self._compiled:
                start = time.thread_time()
                try:
                    self._compiled[target] = _compile(target.removeprefix(_PREFIX))
                except ValueError as error:
                    raise CheckpointError(
                        f"config.json: {key}: {shown_value(target)} {shown(str(error))}"
                    ) from error
                self._spend(time.thread_time() - start, key)
        return targets

    def is_pattern(self, target: str) -> bool:
        """Whether a checked target is a pattern."""
        return target in self._compiled

    def matches(self, target: str, module: str) -> bool:
        """Whether a checked target names a module.

        Raises:
            CheckpointError: the time limit is exceeded.
        """
        pattern = self._compiled.get(target)
        if pattern is None:
            return target == module
        start = time.thread_time()
        try:
            return pattern.match(module, timeout=self._seconds) is not None
        except TimeoutError:
            self._seconds = 0
            return False
        finally:
            self._spend(time.thread_time() - start, target)

    def _spend(self, seconds: float, what: str) -> None:
        self._seconds -= seconds
        if self._seconds <= 0:
            raise CheckpointError(
                f"config.json: {shown(what)}: expected patterns that take less than {_SECONDS:g} s "
                f"for all modules, got slower ones"
            )


def _compile(pattern: str) -> Any:
    """Compiles a pattern, or raises ValueError with its fault."""
    if len(pattern) > _LENGTH_LIMIT:
        raise ValueError(f"has {len(pattern)} characters, expected at most {_LENGTH_LIMIT}")
    try:
        re.compile(pattern)  # `regex` accepts patterns that `re` does not
        repeats = _repeats(pattern)
        if repeats > _REPEAT_LIMIT:
            raise ValueError(f"repeats {repeats} times, expected at most {_REPEAT_LIMIT}")
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"is no regular expression: {error}") from error


def _repeats(pattern: str) -> int:
    """Returns the product of all counts in braces; ValueError for braces without a count."""
    text = _ESCAPED.sub("", pattern)
    counts = [int(number) for pair in _COUNT.findall(text) for number in pair if number]
    if text.count("{") != len(_COUNT.findall(text)):
        # `regex` would take them for approximate matching.
        raise ValueError("has braces without a count; write \\{ for a brace")
    return math.prod(max(count, 1) for count in counts)
