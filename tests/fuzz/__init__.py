"""Fuzzing of what comes from outside: files, requests, servers. See __main__.py for the command."""

import sys
from pathlib import Path

# What the tests have: small checkpoints, a fake model.
sys.path.append(str(Path(__file__).parents[1] / "python"))
