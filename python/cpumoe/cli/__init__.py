"""The command line ``cpumoe``: one file per command, registered in `cpumoe.cli.app`."""

from cpumoe.cli.app import app, main

__all__ = ["app", "main"]
