"""Fuzzes input from outside: files, requests, servers. See __main__.py for the command."""

import sys
from pathlib import Path

# For the tests' small checkpoints and fake model.
sys.path.append(str(Path(__file__).parents[1] / "python"))
