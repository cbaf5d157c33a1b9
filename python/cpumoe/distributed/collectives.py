"""The few operations of a process group that experts need, for tensors on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_UNTYPED: Any = dist  # the operations whose arguments PyTorch does not annotate


class Group:
    """A process group whose ranks all make the same calls, in the same order.

    Attributes:
        rank: this process' number in the group.
        world: the number of processes.
    """

    def __init__(self, group: Any | None) -> None:
        """Takes a group that the host has initialised; None: the default group.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: the group has no backend for tensors on the CPU.
        """
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised; call "
                "torch.distributed.init_process_group('gloo') first"
            )
        if "cpu:" not in dist.get_backend_config(group):
            raise ValueError(
                f"group: expected a backend for tensors on the CPU, got "
                f"{dist.get_backend(group)}; pass torch.distributed.new_group(backend='gloo')"
            )
        self._group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)

    def objects(self, mine: Any) -> list[Any]:
        """Returns each rank's object."""
        every: list[Any] = [None] * self.world
        _UNTYPED.all_gather_object(every, mine, group=self._group)
        return every

    def equal(self, mine: torch.Tensor) -> torch.Tensor:
        """Returns the tensors of all ranks, ``[world, *shape]``, which have one shape."""
        every = mine.new_empty((self.world, *mine.shape))
        if mine.numel():
            flat = mine.contiguous().view(-1)
            _UNTYPED.all_gather_into_tensor(every.view(-1), flat, group=self._group)
        return every

    def sum(self, mine: torch.Tensor) -> torch.Tensor:
        """Adds the tensors of all ranks up, in place, and returns the sum."""
        if mine.numel():
            _UNTYPED.all_reduce(mine, group=self._group)
        return mine

    def exchange(self, mine: torch.Tensor, sent: Sequence[int], got: Sequence[int]) -> torch.Tensor:
        """Sends each rank some rows, and returns the rows that ranks have sent to this one.

        Args:
            mine: rows for rank 0, then for rank 1 and so on.
            sent: how many rows each rank gets.
            got: how many rows come from each rank.
        """
        received = mine.new_empty((sum(got), *mine.shape[1:]))
        _UNTYPED.all_to_all_single(
            received, mine.contiguous(), list(got), list(sent), group=self._group
        )
        return received
