"""Commands that torchrun starts in several processes, which divide a model's experts.

Rank 0 is the command, and has everything but the other ranks' experts. The other ranks read no
options but those that say which model it is, and write nothing.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpumoe._base.launcher import own_rank, started_as_rank
from cpumoe.cli.console import print_error
from cpumoe.cli.errors import BAD_INPUT
from cpumoe.cli.options import value_option

if TYPE_CHECKING:
    import torch

    from cpumoe.checkpoint import ExpertReader
    from cpumoe.distributed import Ranks

# The exit status of a rank that ends because another one has ended.
_LOST = 1
# torchrun sets this to 1 for several ranks of a machine. cpumoe divides the machine's cores.
_THREADS_VARIABLE = "OMP_NUM_THREADS"
# PyTorch reads this when it is imported. Sixty lines for each lost connection would hide the
# message that names the rank. Exceptions say the rest.
_LOG_VARIABLE = "TORCH_CPP_LOG_LEVEL"

SumsOption = Annotated[
    str,
    value_option(
        "fixed|plain",
        "How several ranks (torchrun) add up results. fixed: with the bits of one process. plain: "
        "with fewer bytes between ranks.",
    ),
]
DEFAULT_SUMS = "fixed"
PlacementOption = Annotated[
    Path | None,
    value_option(
        "FILE",
        "Counts of used experts (`cpumoe eval --record`), by which several ranks (torchrun) get "
        "about equally many tokens.",
        "each rank has successive experts",
    ),
]

_joined: Ranks | None = None


def join_ranks(
    model: str | None,
    sums: str = DEFAULT_SUMS,
    threads: int | None = None,
    placement: Path | None = None,
    **options: object,
) -> Ranks | None:
    """Joins the other processes, if there are several. Only rank 0 returns.

    Args:
        model: the checkpoint's folder; None: the small model that comes with cpumoe.
        sums: see `SumsOption`.
        threads: threads of this rank; None: the cores that it may use.
        placement: see `PlacementOption`.
        **options: further options that all ranks must have in common.

    Returns:
        The ranks; None: this process is alone.

    Raises:
        RanksError: a rank is missing or differs from the others.
        OSError, ValueError: the checkpoint or the counts cannot be read, or do not fit together.
        typer.Exit: this was another rank, which has ended.
    """
    global _joined
    if not started_as_rank() or _joined is not None:
        return _joined
    os.environ.setdefault(_LOG_VARIABLE, "FATAL")
    from cpumoe import embedded
    from cpumoe.distributed import join
    from cpumoe.distributed.agreement import UnreachableError

    try:
        _joined = join(
            embedded.model_path() if model is None else model,
            sums=sums,
            frequencies=None if placement is None else functools.partial(_counts, placement),
            options={name: str(value) for name, value in options.items()},
            on_end=_end,
        )
    except (OSError, ValueError) as error:
        if own_rank() == 0 or isinstance(error, UnreachableError):
            raise
        raise typer.Exit(BAD_INPUT) from None  # rank 0 says why
    if _joined.rank > 0:
        _follow(_joined, threads)
        raise typer.Exit
    return _joined


def _counts(path: Path, reader: ExpertReader) -> torch.Tensor:
    """Returns the counts of a file, which must be those of the checkpoint."""
    from cpumoe.distributed.placement import check_frequencies
    from cpumoe.integrations.sglang.recording import read_counts

    counts = read_counts(path)
    check_frequencies(counts, reader, str(path))
    return counts


def _follow(ranks: Ranks, threads: int | None) -> None:
    from cpumoe.distributed import host_name
    from cpumoe.runtime import Runtime

    # Rank 0 gets these signals as well, and may have to finish an answer.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        ranks.follow(None if threads is None else Runtime(threads))
    except Exception as error:
        ranks.fail(f"rank {ranks.rank} ({host_name()}): {str(error) or type(error).__name__}")
        raise typer.Exit(BAD_INPUT) from None


@contextmanager
def ranks_end() -> Iterator[None]:
    """Ends the other ranks when this one, which leads them, ends."""
    try:
        yield
    except SystemExit as error:
        _leave(error.code in (None, 0))
        raise
    except BaseException:
        _leave(False)
        raise
    _leave(True)


def _leave(succeeded: bool) -> None:
    if _joined is None:
        return
    if succeeded:
        _joined.close()
    else:
        _joined.fail(f"rank {_joined.rank} has ended with an error")


def environment() -> Mapping[str, str]:
    """Returns the environment variables without those that torchrun has set against its user."""
    if started_as_rank() and os.environ.get(_THREADS_VARIABLE) == "1":
        return {name: value for name, value in os.environ.items() if name != _THREADS_VARIABLE}
    return os.environ


def _end(message: str, shown: bool) -> None:
    """Ends this process, whatever it does, because a rank has ended. One rank says so."""
    if not shown and _speaks():
        print_error(message)
        sys.stderr.flush()
    os._exit(_LOST)


def _speaks() -> bool:
    """Whether this rank reports the end of another one: rank 0, or the first one beside it."""
    rank = int(os.environ["RANK"])
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return local == (1 if rank == local and rank > 0 else 0)
