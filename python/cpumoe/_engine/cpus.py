"""The CPUs on which a runtime's threads may be placed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cpumoe._base.scalars import integer

# Linux numbers no more CPUs than this on any architecture.
_MAX_CPUS = 8192


def checked_cpus(cpus: object) -> tuple[int, ...]:
    """Returns the CPUs that `cpumoe.Runtime` gets, if threads can be placed on each of them.

    Raises:
        TypeError: `cpus` is no sequence of ints.
        ValueError: it is empty, has a CPU twice, or has one that this process may not use.
        OSError: the system refuses to place threads on CPUs.
    """
    if not isinstance(cpus, Sequence) or isinstance(cpus, (str, bytes)):
        raise TypeError(f"Runtime: cpus must be a sequence of ints, got {cpus!r}")
    numbers = tuple(_cpu_number(cpu) for cpu in cpus)
    if not numbers:
        raise ValueError("Runtime: cpus must name at least one CPU, got none")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"Runtime: cpus must name each CPU once, got {list(numbers)}")
    usable = _usable_cpus()
    if missing := [cpu for cpu in numbers if cpu not in usable]:
        raise ValueError(
            f"Runtime: cpus must be CPUs that are online and in this process's cpuset, "
            f"{_ranges(usable)}; got {missing}"
        )
    return numbers


def _cpu_number(cpu: object) -> int:
    try:
        return integer(cpu, "cpus")
    except TypeError:
        raise TypeError(f"Runtime: cpus must be a sequence of ints, got {cpu!r} in it") from None


def _usable_cpus() -> list[int]:
    """Returns the CPUs on which the system lets this process place threads, in ascending order.

    The affinity mask of the caller may be narrower. The system removes from any mask the CPUs that
    are offline or outside the process's cpuset, so a thread that asks for all CPUs sees the rest.
    """

    def ask() -> list[int]:
        os.sched_setaffinity(0, range(_MAX_CPUS))  # of this thread alone
        return sorted(os.sched_getaffinity(0))

    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(ask).result()
        except OSError as error:
            raise OSError(
                error.errno, f"Runtime: the system refuses to place threads on CPUs: {error}"
            ) from error


def _ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers in Linux's list format, e.g. ``"0-3,8"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
