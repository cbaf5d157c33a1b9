"""How OpenMP's threads wait, which are PyTorch's.

cpumoe computes on threads of its own, and PyTorch on OpenMP's. An OpenMP thread that waits for
another one spins, by default for milliseconds. As long as the spinning thread has a core to itself,
this costs nothing. cpumoe's threads need the cores too, and other processes may. `bound_waiting`
lets a spin end soon, after the gap between two operations of a model.

The environment's variables, which the user sets, take precedence.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Rounds of GNU OpenMP's waiting loop, about 100 us. GNU OpenMP's default is 300,000.
_SPINS = "10000"
# Milliseconds that the OpenMP of LLVM and Intel spins. The default of both is 200.
_BLOCKTIME = "1"
_DEFAULTS = {"GOMP_SPINCOUNT": _SPINS, "KMP_BLOCKTIME": _BLOCKTIME}
# With any of these the user has decided how threads wait.
WAITING_VARIABLES = ("OMP_WAIT_POLICY", *_DEFAULTS)

# Names in a mapped library's file name, and the variable that bounds how long its threads spin.
_LIBRARIES = {
    "libgomp": ("GNU OpenMP", "GOMP_SPINCOUNT"),
    "libiomp5": ("Intel OpenMP", "KMP_BLOCKTIME"),
    "libomp": ("LLVM OpenMP", "KMP_BLOCKTIME"),
}

_set_by_cpumoe: set[str] = set()


def bound_waiting(environment: MutableMapping[str, str] | None = None) -> None:
    """Bounds how long OpenMP's threads spin, unless the user has decided.

    OpenMP reads the environment as it is loaded, which PyTorch does. The bound holds in processes
    that import PyTorch after this call: this one, or new ones that it starts.

    Args:
        environment: the process' variables; None: those of this process.
    """
    given = os.environ if environment is None else environment
    if any(name in given for name in WAITING_VARIABLES):
        return
    given.update(_DEFAULTS)
    _set_by_cpumoe.update(_DEFAULTS)


def inherited_environment() -> dict[str, str]:
    """Returns this process' variables as they were before `bound_waiting`, for other programs."""
    return {name: value for name, value in os.environ.items() if name not in _set_by_cpumoe}


def in_force() -> tuple[str | None, dict[str, str] | None]:
    """Returns the name of the OpenMP library in this process, and how long its threads spin.

    Returns:
        Two values. Each is None if it is not known. The second value has the variable that decides
        ("variable"), its value ("value"), and whether cpumoe or the environment set it ("set_by").
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            mapped = {line.rsplit("/", 1)[-1] for line in maps if "/" in line}
    except OSError:
        return None, None
    for prefix, (name, bound) in _LIBRARIES.items():
        if any(file.startswith(prefix) for file in mapped):
            return name, _waiting(bound)
    return None, None


def _waiting(bound: str) -> dict[str, str] | None:
    # A library's own variable takes precedence over OpenMP's general one.
    for name in (bound, "OMP_WAIT_POLICY"):
        if name in os.environ:
            origin = "cpumoe" if name in _set_by_cpumoe else "environment"
            return {"variable": name, "value": os.environ[name], "set_by": origin}
    return None
