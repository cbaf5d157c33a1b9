"""cpumoe for vLLM's CPU build: vLLM does everything but the routed experts, which cpumoe computes.

vLLM calls `register` in each of its processes, because cpumoe's metadata names it in the group
``vllm.general_plugins``. `register` replaces vLLM's classes of quantized checkpoints, by the
function that vLLM has for this, with subclasses that answer for routed experts alone. Attention,
routing, shared experts, loading and parallelism stay vLLM's.

Nothing of vLLM is imported unless vLLM asks. Nothing of cpumoe's transformers integration is
imported, because vLLM needs an older transformers.
"""

from __future__ import annotations

import importlib
import os
import re

from cpumoe._base import openmp

# Minor versions of vLLM's build for CPUs. Tests have run 0.32. 0.33 is expected to fit.
VERSIONS = ("0.32", "0.33")
SWITCH = "CPUMOE_VLLM"

_inactive: str | None = None


def register() -> None:
    """Makes vLLM compute routed experts with cpumoe in this process.

    It also bounds how long OpenMP's threads spin in vLLM's workers, which start later.

    vLLM stays as it is, after one line in its log, if its version is another one, if it is built
    for a GPU, or with ``CPUMOE_VLLM=0``.

    Raises:
        ValueError: ``CPUMOE_VLLM`` is neither 0 nor 1.
    """
    global _inactive
    log = importlib.import_module("vllm.logger").init_logger("vllm.plugins.cpumoe")
    reason = why_not(os.environ.get(SWITCH, ""))
    if reason is None:
        try:
            importlib.import_module("cpumoe.integrations.vllm.configs").register()
        except (ImportError, AttributeError) as error:
            reason = (
                f"this vLLM has other classes than those of vLLM {', '.join(VERSIONS)} ({error})"
            )
    _inactive = reason
    if reason is None:
        # vLLM's workers are new processes, which import PyTorch with these variables.
        openmp.bound_waiting()
        log.info("cpumoe computes routed experts in the formats that it has")
    else:
        log.info("cpumoe computes nothing here: %s", reason)


def inactive() -> str | None:
    """Returns why `register` has left this process's vLLM as it is; None: it has not done so."""
    return _inactive


def why_not(switch: str) -> str | None:
    """Returns why vLLM is left as it is, or None.

    Args:
        switch: the value of ``CPUMOE_VLLM``; empty: it is not set.

    Raises:
        ValueError: `switch` is neither 0 nor 1.
    """
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}: expected 0 or 1, got {switch!r}")
    if switch == "0":
        return f"{SWITCH}=0"
    version = str(importlib.import_module("vllm").__version__)
    minor = re.match(r"\d+\.\d+", version)
    if minor is None or minor[0] not in VERSIONS:
        return f"it knows vLLM {' and '.join(VERSIONS)}, and this is {version}"
    if not importlib.import_module("vllm.platforms").current_platform.is_cpu():
        return "this vLLM is not built for CPUs"
    return None


__all__ = ["SWITCH", "VERSIONS", "inactive", "register", "why_not"]
