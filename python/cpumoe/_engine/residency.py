"""Which of a layer's experts are in memory, and which of them calls skip."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from cpumoe import _core
from cpumoe._base.progress import track
from cpumoe._base.scalars import integer
from cpumoe._engine.arguments import check_mask
from cpumoe._engine.packing import BATCH_PER_THREAD, Biases, ExpertForm, pack_experts
from cpumoe._engine.sources import Source
from cpumoe.checkpoint import ExpertWeights


class Residency:
    """Packs a layer's experts, masks them, and gives their memory back.

    Changes come one after the other. A call sees the layer as it is before or after a change. A
    change that fails changes nothing.
    """

    def __init__(
        self, layer: _core.Layer, form: ExpertForm, num_experts: int, source: Source
    ) -> None:
        """Manages a new layer, which has no weights yet. `source` says which share a copy."""
        self._source: Source | None = None  # of weights, if a caller names no other; None: nowhere
        self._layer = layer
        self._form = form
        self._copy_of = source.copy_of or range(num_experts)
        self._biases: dict[int, Biases] = {}  # by copy
        # The mask that calls use, and the address that the engine knows. One object, so that
        # threads see both.
        self._known: tuple[torch.Tensor | None, int] = (None, 0)
        self._lock = threading.Lock()
        self._changing: int | None = None  # the thread that holds the lock

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask that calls use."""
        return self._known[0]

    def packed(self) -> list[int]:
        """Returns the experts that have weights."""
        return [expert for expert, packed in enumerate(self._layer.packed()) if packed]

    def biases(self, expert: int) -> Biases:
        """Returns an expert's biases by name, as its source gave them."""
        return self._biases.get(self._copy_of[expert], {})

    def fill(
        self, source: Source, mask: torch.Tensor | None, pack_masked: bool, runtime: _Runtime
    ) -> None:
        """Gives a new layer its weights and its mask."""
        if mask is not None:
            self._check(mask)
        with self._change():
            wanted = range(len(self._copy_of)) if pack_masked else self._unmasked(mask)
            self._pack(wanted, source, runtime, BATCH_PER_THREAD)
            self._source = source if source.lasting else None
            self._set_mask(mask, runtime)

    def pack(self, experts: Iterable[int] | None, source: Source | None, runtime: _Runtime) -> None:
        """Packs experts that have no weights; see `Experts.pack`."""
        chosen = None if experts is None else self._chosen(experts)
        with self._change():
            self._pack(self._unmasked(self.mask) if chosen is None else chosen, source, runtime)

    def set_mask(self, mask: torch.Tensor | None, runtime: _Runtime) -> None:
        """Makes `mask` the layer's, after packing what it does not mask."""
        with self._change():
            self._set_mask(mask, runtime)

    def refresh_mask(self, runtime: _Runtime) -> None:
        """Checks the mask, and names its memory to the engine anew if the caller replaced it."""
        mask, known = self._known
        if mask is None or self._check(mask) == known:
            return
        with self._change():
            if self.mask is mask:
                self._set_mask(mask, runtime)

    def evict(self) -> None:
        """Gives the memory of masked experts back to the system."""
        with self._change():
            self._layer.evict_masked()

    @contextmanager
    def missing(self, expert: int) -> Iterator[ExpertWeights | None]:
        """Yields the weights of an expert that is not in memory; None: it is in memory.

        While the context lasts, the expert stays where it is.
        """
        with self._change():
            if self._layer.packed()[expert]:
                yield None
                return
            with self._source_of([expert], None).reading() as read:
                yield read(expert)

    @contextmanager
    def _change(self) -> Iterator[None]:
        # In a forked child, a thread that exists in the parent alone may hold the lock.
        self._layer.require_own_process()
        if self._changing == threading.get_ident():
            raise RuntimeError(
                "pack: expected a source that leaves its own layer alone, got one that packs, "
                "masks or evicts experts of the layer; do that before or after pack"
            )
        with self._lock:
            self._changing = threading.get_ident()
            try:
                yield
            finally:
                self._changing = None

    def _check(self, mask: torch.Tensor) -> int:
        return check_mask(mask, len(self._copy_of))

    def _chosen(self, experts: Iterable[int]) -> list[int]:
        chosen = [integer(expert, "experts") for expert in experts]
        for expert in chosen:
            if not 0 <= expert < len(self._copy_of):
                raise IndexError(f"experts: expected 0..{len(self._copy_of) - 1}, got {expert}")
        return chosen

    def _unmasked(self, mask: torch.Tensor | None) -> Iterable[int]:
        if mask is None:
            return range(len(self._copy_of))
        self._check(mask)
        return [expert for expert, masked in enumerate(mask.tolist()) if not masked]

    def _set_mask(self, mask: torch.Tensor | None, runtime: _Runtime) -> None:
        self._pack(self._unmasked(mask), None, runtime)
        address = 0 if mask is None else self._check(mask)
        self._layer.set_mask(mask=address)
        self._known = (mask, address)

    def _pack(
        self,
        wanted: Iterable[int],
        source: Source | None,
        runtime: _Runtime,
        batch_per_thread: int = 1,  # calls wait while a batch is packed
    ) -> None:
        packed = self._layer.packed()
        absent: dict[int, int] = {}  # for each copy, the first expert that needs it
        for expert in wanted:
            if not packed[expert]:
                absent.setdefault(self._copy_of[expert], expert)
        if not absent:
            return
        experts = sorted(absent.values())
        source = self._source_of(experts, source)
        core, threads = runtime
        try:
            with source.reading() as read:
                tracked = track(experts, source.title, enabled=source.progress)
                pack_experts(
                    self._layer,
                    ((expert, read(expert)) for expert in tracked),
                    form=self._form,
                    runtime=core,
                    batch=batch_per_thread * threads,
                    keep_biases=self._keep_biases,
                )
        except BaseException:
            for expert in experts:
                self._layer.evict(expert=expert)
            raise

    def _source_of(self, experts: list[int], given: Source | None) -> Source:
        """Returns where experts come from that have no weights."""
        source = given or self._source
        if source is None:
            raise ValueError(
                f"expert {experts[0]} has no weights, and this layer was made from tensors or an "
                f"iterable, which are not kept; call pack({experts}, source) first"
            )
        return source

    def _keep_biases(self, expert: int, biases: Biases) -> None:
        self._biases[self._copy_of[expert]] = biases


# The engine's runtime, and its number of threads.
_Runtime = tuple[_core.Runtime, int]
