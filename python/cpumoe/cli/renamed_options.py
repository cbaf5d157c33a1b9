"""Options by their old names: they still work, and warn."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from cpumoe._base.renamed import renamed_message
from cpumoe.cli import help_text
from cpumoe.cli.console import print_warning

_OPTIONS = {"--compute": "--precision"}


class Command(help_text.Command):
    """A command that takes options by their old names as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses a command line; warns for each old name in it."""
        known = {name for parameter in self.params for name in parameter.opts}
        return super().parse_args(ctx, [_renamed(argument, known) for argument in args])


def _renamed(argument: str, known: Container[str]) -> str:
    name, equals, value = argument.partition("=")
    new = _OPTIONS.get(name)
    if new is None or new not in known:
        return argument
    print_warning(renamed_message(name, new))
    return f"{new}{equals}{value}"
