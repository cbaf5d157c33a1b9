"""Options by their old names: they still work, and warn."""

from __future__ import annotations

from typing import Any

from cpumoe.cli import help_text
from cpumoe.cli.console import print_warning

_OPTIONS = {"--compute": "--precision"}


class Command(help_text.Command):
    """A command that takes options by their old names as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses a command line; warns for each old name in it."""
        return super().parse_args(ctx, [_renamed(argument) for argument in args])


def _renamed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    new = _OPTIONS.get(name)
    if new is None:
        return argument
    print_warning(f"{name} is now called {new}; the old name will be removed in cpumoe 0.3")
    return f"{new}{equals}{value}"
