"""Where the weights of a layer's experts come from."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from cpumoe._base.scalars import integer
from cpumoe._engine.shards import shard_features, shard_of
from cpumoe.checkpoint import CheckpointError, ExpertReader, ExpertWeights, open_checkpoint

# Returns the weights of the layer's expert of an index.
ReadExpert = Callable[[int], ExpertWeights]


class Source(ABC):
    """The weights of a layer's experts.

    Attributes:
        copy_of: the packed copy for each expert; empty: each expert has a copy of its own.
        title: what a progress bar says while the experts are packed.
        progress: whether there is a bar; None: if standard error is a terminal.
        lasting: whether weights can be read at any time, and not only once.
    """

    copy_of: Sequence[int] = ()
    title = "packing experts"
    progress: bool | None = False
    lasting = False

    def scale_dtypes(self) -> set[torch.dtype]:
        """Returns the dtypes of the experts' scales, as far as they are known before reading."""
        return set()

    @abstractmethod
    def reading(self) -> AbstractContextManager[ReadExpert]:
        """Opens the source. The weights that were read are valid until the context ends.

        Leaving the context raises an error if they were not valid until now.
        """


class Given(Source):
    """A function of a caller."""

    def __init__(self, read: ReadExpert) -> None:
        """Makes a source of a function that takes the layer's index of an expert."""
        if not callable(read):
            raise TypeError(
                f"source: expected a function that returns the ExpertWeights of an expert, got "
                f"{type(read).__name__}"
            )
        self._read = read

    @override
    @contextmanager
    def reading(self) -> Iterator[ReadExpert]:
        yield self._read


class InOrder(Source):
    """All `count` experts of a layer, which come one after the other, once."""

    def __init__(self, experts: Iterable[ExpertWeights], count: int) -> None:
        """Makes a source of `experts`."""
        self._experts = iter(experts)
        self._count = count

    @override
    def scale_dtypes(self) -> set[torch.dtype]:
        """Returns the dtypes of the first expert's scales."""
        first = list(itertools.islice(self._experts, 1))
        self._experts = itertools.chain(first, self._experts)
        # Packing refuses what is no ExpertWeights.
        names = ("gate", "up", "down")
        matrices = (getattr(expert, name, None) for expert in first for name in names)
        scales = (getattr(matrix, "scales", None) for matrix in matrices)
        return {each.dtype for each in scales if isinstance(each, torch.Tensor)}

    @override
    @contextmanager
    def reading(self) -> Iterator[ReadExpert]:
        taken = 0

        def read(expert: int) -> ExpertWeights:
            nonlocal taken
            for weights in self._experts:
                taken += 1
                if taken > expert:
                    return weights
            raise ValueError(f"expected {self._count} experts, got {taken}")

        yield read
        taken += sum(1 for _ in itertools.islice(self._experts, self._count - taken + 1))
        if taken != self._count:
            got = "more" if taken > self._count else taken
            raise ValueError(f"expected {self._count} experts, got {got}")


class CheckpointSource(Source):
    """Experts of a checkpoint's layer, which can be read again while its files stay as they are."""

    lasting = True

    def __init__(
        self,
        reader: ExpertReader,
        layer: int,
        experts: Sequence[int] | None,
        progress: bool | None,
        shard: Sequence[int] | None = None,
    ) -> None:
        """Makes the layer's expert i the checkpoint's `experts[i]`; None: all, in their order.

        `shard` is the rank and the number of ranks of which each has a part of every expert.

        Raises:
            TypeError: `experts` is no sequence of ints, or `shard` no pair of ints.
            IndexError: the checkpoint has no such expert.
            ValueError: `experts` is empty, or there is no such shard.
        """
        self.features = shard_features(reader, layer, shard)
        self._is_first = self.features.start == 0
        self.experts = _chosen(experts, reader.num_experts)
        self.copy_of = _shared_copies(self.experts)
        self.title = f"layer {layer}: packing experts"
        self.progress = progress
        self._layer = layer
        self._reader: ExpertReader | None = reader
        folder = reader.folder
        files = folder.files
        # Absolute paths, because the process may change its working directory.
        self._path = folder.path.absolute()
        self._variant = folder.variant
        self._module = reader.module
        self._files = None if files is None else [Path(file).absolute() for file in files]
        self._stamps = folder.stamps()

    def settle(self, *, keep_reader: bool) -> None:
        """Ends the first reading. Without the reader, later readings open the folder again."""
        self.progress = False
        if self._reader is not None:
            self._stamps = self._reader.folder.stamps()
            if not keep_reader:
                self._reader = None

    @override
    def scale_dtypes(self) -> set[torch.dtype]:
        assert self._reader is not None
        return self._reader.scale_dtypes(self._layer, self.experts)

    @override
    @contextmanager
    def reading(self) -> Iterator[ReadExpert]:
        kept = self._reader
        if kept is not None and not kept.folder.closed:
            yield self._read(kept)
            self._check(kept)
            return
        with open_checkpoint(self._path, variant=self._variant, files=self._files) as reader:
            reader = reader.of_module(self._module)
            yield self._read(reader)
            self._check(reader)

    def _read(self, reader: ExpertReader) -> ReadExpert:
        def read(expert: int) -> ExpertWeights:
            # Whoever takes the weights looks at all scales.
            weights = reader.expert(self._layer, self.experts[expert], check_scales=False)
            if len(self.features) == reader.intermediate_size:
                return weights
            return shard_of(weights, self.features, first=self._is_first)

        return read

    def _check(self, reader: ExpertReader) -> None:
        """Raises if what `reader` read is not what the layer was made from."""
        for file, stamp in reader.folder.stamps().items():
            if self._stamps.get(file, stamp) != stamp:
                raise CheckpointError(
                    f"{file}: changed since the layer was made from it; make the layer anew, "
                    f"because experts of two versions do not fit together"
                )
        reader.folder.check_unchanged()


def _chosen(experts: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if experts is None:
        return tuple(range(count))
    given: Any = experts
    if isinstance(given, torch.Tensor):
        given = given.tolist()
    # A set has no order, and an iterator could be read once only.
    indexed = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    if not indexed or isinstance(given, Mapping | str | bytes):
        remedy = "; pass a list, whose order the layer's experts get"
        raise TypeError(
            f"experts: expected a sequence of ints, got {type(experts).__name__}"
            f"{remedy if hasattr(experts, '__iter__') else ''}"
        )
    chosen = tuple(integer(expert, f"experts[{i}]") for i, expert in enumerate(given))
    if not chosen:
        raise ValueError("experts: expected at least one expert, got none")
    for i, expert in enumerate(chosen):
        if not 0 <= expert < count:
            raise IndexError(f"experts[{i}]: expected 0..{count - 1}, got {expert}")
    return chosen


def _shared_copies(experts: Sequence[int]) -> tuple[int, ...]:
    """Returns `Source.copy_of` for a list in which experts may be repeated."""
    copies: dict[int, int] = {}
    copy_of = tuple(copies.setdefault(expert, len(copies)) for expert in experts)
    return copy_of if len(copies) < len(experts) else ()
