"""What the user asks for, and which CPUs vLLM gives a worker."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from cpumoe._base.scalars import boolean
from cpumoe.options import ExpertsOptions
from cpumoe.runtime import Runtime, default_runtime

KEY = "cpumoe"
_OPTIONS = ("isa", "precision", "batch_invariant", "few_token_limit")
# Variables by which vLLM tells the OpenMP library of a worker its CPUs, and how each lists them.
_BINDINGS = {
    "GOMP_CPU_AFFINITY": re.compile(r"([\d ]+)"),
    "KMP_AFFINITY": re.compile(r".*proclist=\[([\d,]+)\].*"),
    "OMP_PLACES": re.compile(r"\{([\d,]+)\}"),
}


class Settings:
    """The key "cpumoe" of vLLM's ``--additional-config``, checked.

    Attributes:
        enabled: whether cpumoe computes experts.
    """

    def __init__(self, given: object) -> None:
        """Checks the settings; None: there are none.

        Raises:
            TypeError: they are no dict, or a value is of another type.
            ValueError: a key or value is unknown.
        """
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"additional config: {KEY}: expected an object with options, got {given!r}"
            )
        values: dict[str, Any] = dict(given or {})
        values.pop("version", None)
        self.enabled = boolean(values.pop("enabled", True), f"additional config: {KEY}: enabled")
        unknown = [name for name in values if name not in _OPTIONS]
        if unknown:
            raise ValueError(
                f"additional config: {KEY}: expected options of enabled, {', '.join(_OPTIONS)}, "
                f"got {unknown[0]!r}"
            )
        ExpertsOptions(**values)  # which refuses wrong values before weights are loaded
        self._values = values

    def options(self) -> ExpertsOptions:
        """Returns how experts are computed in this process."""
        return ExpertsOptions(runtime=worker_runtime(), **self._values)


def bound_cpus(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the CPUs to which vLLM binds a worker's threads; None: it does not."""
    for variable, pattern in _BINDINGS.items():
        match = pattern.fullmatch(environment.get(variable, "").strip())
        if match is not None:
            return sorted({int(cpu) for cpu in re.findall(r"\d+", match[1])})
    return None


_runtime: Runtime | None = None


def worker_runtime() -> Runtime:
    """Returns the runtime of this process, with one thread on each CPU that vLLM gives it."""
    global _runtime
    if _runtime is None or _runtime.closed:
        cpus = bound_cpus(os.environ)
        # OpenMP has bound the main thread to one of these CPUs, so its mask says too little.
        _runtime = default_runtime() if cpus is None else Runtime(cpus=cpus)
    return _runtime


def _forget_runtime() -> None:
    global _runtime
    _runtime = None


os.register_at_fork(after_in_child=_forget_runtime)
