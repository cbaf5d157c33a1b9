"""Commands whose help shows a type only for options that take a value."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class _WithoutTypesOfFlags:
    def get_params(self, ctx: Any) -> list[Any]:
        """Returns the parameters, including the option for help."""
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            # Some versions of typer show "<bool>" beside a flag, as if the flag expected a value.
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return found


class Command(_WithoutTypesOfFlags, TyperCommand):
    """A command whose flags are shown without a type."""


class Group(_WithoutTypesOfFlags, TyperGroup):
    """A group of commands whose flags are shown without a type."""
