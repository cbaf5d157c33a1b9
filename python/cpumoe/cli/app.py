"""The application: its commands and what they have in common.

Command modules import PyTorch, and what needs it, inside functions: help must not wait for it.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cpumoe import __version__
from cpumoe._base import openmp
from cpumoe.cli import (
    bench,
    bench_model,
    chat,
    demo,
    evaluate,
    generate,
    help_text,
    info,
    inspect_model,
    placement,
    renamed_options,
    serve,
    sglang,
    synth,
    validate,
)
from cpumoe.cli.console import print_error
from cpumoe.cli.errors import BAD_INPUT
from cpumoe.cli.option_groups import with_groups
from cpumoe.cli.ranks import ranks_end
from cpumoe.cli.streams import OutputError, standard_streams

app = typer.Typer(
    name="cpumoe",
    cls=help_text.Group,
    help="Compute Mixture-of-Experts layers on the CPU from low-precision checkpoints.",
    epilog="Start with: `cpumoe demo`",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# In the order of the help.
for _name, _module in {
    "info": info,
    "inspect": inspect_model,
    "synth": synth,
    "validate": validate,
    "bench": bench,
    "bench-model": bench_model,
    "generate": generate,
    "eval": evaluate,
    "chat": chat,
    "serve": serve,
    "sglang": sglang,
    "placement": placement,
    "demo": demo,
}.items():
    app.command(
        _name,
        cls=renamed_options.Command,
        epilog=_module.EXAMPLE,
        context_settings=getattr(_module, "CONTEXT", None),
    )(with_groups(_module.command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cpumoe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; the entry point of the ``cpumoe`` script."""
    openmp.bound_waiting()
    try:
        with standard_streams(), ranks_end():
            app()
    except OutputError as error:
        print_error(str(error))
        sys.exit(BAD_INPUT)
