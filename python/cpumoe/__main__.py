"""Runs the command line: ``python -m cpumoe``."""

from cpumoe.cli import main

if __name__ == "__main__":
    main()
