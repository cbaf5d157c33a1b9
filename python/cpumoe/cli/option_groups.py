"""Groups of options: one parameter of a command, a dataclass, stands for several options.

Typer reads a command's options from its signature. `with_groups` shows Typer a signature that has
the fields of each dataclass in place of the parameter, and makes the dataclass of their values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import Any, get_type_hints


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command for Typer, each of whose groups of options is spread out.

    Args:
        command: a function. Parameters whose type is a dataclass are groups. The fields of a group
            are options, with a default each. The dataclass must not raise: a command reports errors
            itself.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    def parameters() -> Iterator[Parameter]:
        for parameter in inspect.signature(command).parameters.values():
            name = parameter.name
            if name in groups:
                yield from _options(groups[name])
            else:
                yield parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name])

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            taken = {field.name: values.pop(field.name) for field in fields(group)}
            values[name] = group(**taken)
        command(**values)

    spread = list(parameters())
    call.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in spread}
    return call


def changed_options(group: Any) -> list[str]:
    """Returns the options of a group whose values are not the defaults, as ``--name``."""
    changed = [field.name for field in fields(group) if getattr(group, field.name) != field.default]
    return [f"--{name.replace('_', '-')}" for name in changed]


def _options(group: type[Any]) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        assert field.default is not MISSING, f"{group.__name__}.{field.name} has no default"
        yield Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
