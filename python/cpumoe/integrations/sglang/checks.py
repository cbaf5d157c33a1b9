"""Checks of plain values that a host passes."""

from __future__ import annotations

import math

from cpumoe._base.scalars import integer


def integer_in(value: object, name: str, least: int, most: int | None = None) -> int:
    """Returns an integer of any type as an int.

    Raises:
        TypeError: `value` is no integer.
        ValueError: it is less than `least` or greater than `most`.
    """
    number = integer(value, name)
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {wanted}, got {number}")
    return number


def number_or_none(value: object, name: str) -> float | None:
    """Returns a positive, finite float; None for None and for 0, which hosts pass for "none".

    Raises:
        TypeError: `value` is no number.
        ValueError: it is negative, infinite or NaN.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float or None, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a positive number, or 0 for none, got {value}")
    return float(value) or None
