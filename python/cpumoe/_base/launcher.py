"""What a launcher such as torchrun says of this process, without PyTorch, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping


def started_as_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or another launcher, has started several processes like this one."""
    return environment.get("WORLD_SIZE", "1") != "1" and "RANK" in environment


def own_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Returns this process' rank; 0 if it was started alone."""
    return int(environment["RANK"]) if started_as_rank(environment) else 0
