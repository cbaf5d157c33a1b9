"""PyTorch's threads in commands: how many there are, and how they wait for each other.

When another process takes one of the cores, spinning threads (see `cpumoe._base.openmp`) keep the
others busy, and each of a token's hundreds of parallel regions waits for the system's scheduler.
Decoding becomes ten to forty times slower.

Two decisions bound this loss:

- Spins are short.
- If the weights that PyTorch multiplies are small (`_SMALL_BYTES`), PyTorch decodes on one thread,
  which waits for no other. A barrier costs more than a second thread saves. Weights are small when
  cpumoe computes dense layers as well. Prompts are read on all threads.

The environment's variables, which the user sets, take precedence over both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cpumoe._base import openmp

if TYPE_CHECKING:
    import torch

# With any of these the user has decided how many threads there are.
_COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
# A call of fewer tokens counts as decoding.
_PROMPT_TOKENS = 32
# One core reads 16 MiB in about a millisecond, less than Python takes for the same token.
_SMALL_BYTES = 16 << 20


def choose_threads(
    asked: int | None,
    model: torch.nn.Module | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Sets the number of PyTorch's threads, and lets it follow a model's calls.

    Args:
        asked: the number that the command line gives; None: as the environment says, or else as
            many as this process has physical cores, within its CPU quota.
        model: a model that decodes; None: the number stays the same for all calls.
        environment: the variables with which the user may decide; None: this process' own.
    """
    import torch

    given = os.environ if environment is None else environment
    if asked is None and any(name in given for name in _COUNT_VARIABLES):
        return
    most = asked or _default_threads()
    if model is None or not is_small(model):
        torch.set_num_threads(most)
        return
    torch.set_num_threads(1)
    if most > 1:
        model.register_forward_pre_hook(_ThreadsOfCall(most), with_kwargs=True)


class _ThreadsOfCall:
    """Gives PyTorch one thread for a few tokens, and more for a prompt, in the calling thread."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        import torch

        ids = kwargs.get("input_ids", args[0] if args else None)
        threads = self._most if ids is not None and ids.numel() >= _PROMPT_TOKENS else 1
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def is_small(model: torch.nn.Module) -> bool:
    """Returns whether one thread of PyTorch decodes with a model as fast as several."""
    return read_bytes(model) <= _SMALL_BYTES


def read_bytes(model: torch.nn.Module) -> int:
    """Returns how many bytes of weights PyTorch reads for a token, experts excepted.

    A token reads one row of an embedding, whose weights count only if a head shares them.
    """
    import torch

    from cpumoe.integrations.transformers.shared_dense import SharedLinear

    weights = {
        id(parameter): parameter.nbytes
        for module in model.modules()
        if not isinstance(module, (torch.nn.Embedding, SharedLinear))
        for parameter in module.parameters(recurse=False)
    }
    return sum(weights.values())


def describe() -> dict[str, Any]:
    """Returns the settings in force in this process, for ``cpumoe info``.

    Returns:
        - "threads": PyTorch's threads for models that are not small.
        - "threads_variable": the environment variable that sets them, or None.
        - "openmp": the name of the OpenMP library that PyTorch loaded, or None.
        - "waiting": the variable that decides how long the library's threads spin, its value, and
          whether cpumoe or the environment set it; or None.
    """
    import torch

    counting = next((name for name in _COUNT_VARIABLES if name in os.environ), None)
    library, waiting = openmp.in_force()
    return {
        "threads": torch.get_num_threads() if counting else _default_threads(),
        "threads_variable": counting,
        "small_model_bytes": _SMALL_BYTES,
        "openmp": library,
        "waiting": waiting,
    }


def _default_threads() -> int:
    from cpumoe import _core

    return int(_core.topology().default_threads)
