"""What a launcher such as torchrun says of this process, without PyTorch, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping

_GREATEST_PORT = 65535
_REMEDY = "a launcher such as torchrun sets this variable"

# The functions have no environment as a default, because help() would show its values.


def started_as_rank(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun, or another launcher, has started several processes like this one.

    Args:
        environment: the process' variables; None: those of this process.
    """
    given = os.environ if environment is None else environment
    return given.get("WORLD_SIZE", "1") not in ("", "1")


def own_rank(environment: Mapping[str, str] | None = None) -> int:
    """Returns this process' rank; 0 if it was started alone, or if RANK is no number.

    Args:
        environment: the process' variables; None: those of this process.
    """
    given = os.environ if environment is None else environment
    rank = given.get("RANK", "0")
    return int(rank) if started_as_rank(given) and rank.isdecimal() else 0


def check_launcher(environment: Mapping[str, str] | None = None) -> None:
    """Checks the variables with which a launcher tells ranks how to find each other.

    Args:
        environment: the process' variables; None: those of this process.

    Raises:
        ValueError: a variable is missing or has a wrong value.
    """
    given = os.environ if environment is None else environment
    world = _number(given, "WORLD_SIZE", 1, None, "the number of ranks")
    _number(given, "RANK", 0, world - 1, "this process' number among the ranks")
    if not given.get("MASTER_ADDR"):
        raise ValueError(f"MASTER_ADDR: expected the address of rank 0, got none; {_REMEDY}")
    _number(given, "MASTER_PORT", 1, _GREATEST_PORT, "a free port of rank 0's machine")


def _number(
    given: Mapping[str, str], name: str, least: int, greatest: int | None, what: str
) -> int:
    text = given.get(name, "")
    if text.isdecimal() and int(text) >= least and (greatest is None or int(text) <= greatest):
        return int(text)
    allowed = f"at least {least}" if greatest is None else f"{least} to {greatest}"
    got = repr(text) if name in given else "none"
    raise ValueError(f"{name}: expected {what}, {allowed}, got {got}; {_REMEDY}")
