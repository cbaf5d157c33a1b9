"""Checks arguments that are numbers or flags."""

from __future__ import annotations

import math
import operator


def integer(value: object, name: str) -> int:
    """Returns an integer of any type as an int; raises TypeError for anything else.

    A bool is no integer: where an int is expected, it is a mistake.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an int, got {value!r}")


def number(value: object, name: str) -> float:
    """Returns a real number of any type as a float; raises TypeError for anything else.

    A bool is no number, as for `integer`. An int that no float can hold becomes infinite.
    """
    if not isinstance(value, bool) and (hasattr(value, "__float__") or hasattr(value, "__index__")):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            return math.inf
        except (TypeError, ValueError, RuntimeError):  # of tensors with several elements
            pass
    raise TypeError(f"{name}: expected a number, got {value!r}")


def boolean(value: object, name: str) -> bool:
    """Returns a bool; raises TypeError for anything else, such as "no", which counts as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value
