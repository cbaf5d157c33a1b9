"""Old names of arguments and attributes: they still work, and warn."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Old names, and what they are called now.
ARGUMENTS = {
    "compute": "precision",
    "computes": "precisions",
    "fused_tokens": "few_token_limit",
    "swiglu": "activation",
}


def renamed_message(old: str, new: str) -> str:
    """Returns the warning about a deprecated name."""
    return f"{old} is now called {new}; the old name will be removed in cpumoe 0.3"


def warn_renamed(old: str, new: str, *, stacklevel: int) -> None:
    """Warns that a name is deprecated; `stacklevel` counts from the caller of this function."""
    # Python hides a DeprecationWarning if the call comes from another package.
    warnings.warn(renamed_message(old, new), FutureWarning, stacklevel=stacklevel + 1)


def old_attribute(owner: str, old: str, new: str) -> property:
    """Returns a property for a class `owner` that reads the attribute `new` and warns."""

    def read(self: object) -> Any:
        warn_renamed(f"{owner}.{old}", f"{owner}.{new}", stacklevel=2)
        return getattr(self, new)

    return property(read, doc=f"The old name of `{new}`. Using it warns.")


def with_old_arguments(*old_names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes a function take keyword arguments by their old names as well.

    Args:
        old_names: keys of `ARGUMENTS`.

    Returns:
        A decorator. The decorated function warns if an old name is used, and raises TypeError if
        the new name is used as well.
    """
    renamed = {old: ARGUMENTS[old] for old in old_names}

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not renamed.keys().isdisjoint(kwargs):
                _rename(kwargs, renamed, function.__qualname__)
            return function(*args, **kwargs)

        return call

    return decorate


def _rename(arguments: dict[str, Any], renamed: Mapping[str, str], function: str) -> None:
    for old, new in renamed.items():
        if old not in arguments:
            continue
        if new in arguments:
            raise TypeError(f"{function}() got both {new} and {old}, its old name")
        warn_renamed(old, new, stacklevel=3)
        arguments[new] = arguments.pop(old)
