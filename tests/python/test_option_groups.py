"""A dataclass as one parameter of a command stands for several options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from cpumoe.cli.option_groups import changed_options, with_groups
from cpumoe.cli.options import count_option, value_option


@dataclass(frozen=True)
class Size:
    width: Annotated[int, count_option("Columns.")] = 3
    row_count: Annotated[int | None, count_option("Rows.", "all")] = None
    flat: Annotated[bool, typer.Option("--flat", help="No depth.")] = False


def run(*arguments):
    """What a command with a group gets, and what it prints."""
    got = []

    def command(
        name: str, *, size: Size, colour: Annotated[str, value_option("C", "Colour.")] = "red"
    ) -> None:
        """Draw."""
        got.append((name, size, colour))

    app = typer.Typer()
    app.command()(with_groups(command))
    result = CliRunner().invoke(app, list(arguments))
    return got, result


def test_a_group_gets_the_values_of_its_options():
    got, result = run("a", "--row-count", "2", "--flat", "--colour", "blue")
    assert result.exit_code == 0, result.output
    assert got == [("a", Size(row_count=2, flat=True), "blue")]
    assert run("a")[0] == [("a", Size(), "red")]


def test_options_stand_where_their_group_does_in_the_help():
    _, result = run("--help")
    names = ("--width", "--row-count", "--flat", "--colour")
    places = [result.stdout.index(name) for name in names]
    assert places == sorted(places)
    assert "default: (all)" in result.stdout


def test_an_option_of_a_group_is_checked():
    got, result = run("a", "--width", "0")
    assert (got, result.exit_code) == ([], 2)


def test_changed_options_are_named_as_on_the_command_line():
    assert changed_options(Size()) == []
    assert changed_options(Size(row_count=1, flat=True)) == ["--row-count", "--flat"]


def test_a_command_gets_all_options_by_keyword_and_stays_callable():
    seen = []

    def command(*, size: Size) -> None:
        seen.append(size)

    with_groups(command)(width=1, row_count=None, flat=False)
    assert seen == [Size(width=1)]
    with pytest.raises(KeyError):
        with_groups(command)(width=1)
