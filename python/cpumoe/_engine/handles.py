"""Handles: how code that PyTorch's compilers recorded finds a layer.

A handle is a tensor with a random number. As a tensor, the handle is an input of a compiled graph
and no constant in it, so layers of equal shape share a graph, and caches of compiled graphs serve
later processes. As a random number, it never names another layer: not in a forked child, nor in a
process that loads an exported program.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from cpumoe._base.tensors import describe

Layer = Callable[..., torch.Tensor]


class Handle(NamedTuple):
    """Names a layer in this process, for as long as the layer lives."""

    number: int
    tensor: torch.Tensor  # the number as int64 scalar, an operator's argument


class Handles:
    """The layers of one class that an operator may be called for."""

    def __init__(self, kind: str) -> None:
        """Makes an empty collection; `kind` is the name of the layers' class, for errors."""
        self._kind = kind
        # Layers are not kept alive here, so running a graph that has outlived its layer is an
        # error.
        self._layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()

    def new(self, layer: Layer) -> Handle:
        """Returns a handle for a layer."""
        # 53 bits, so that the number stays whole if a compiler keeps it as fp64.
        number = int.from_bytes(os.urandom(8), "little") >> 11
        self._layers[number] = layer
        with torch.inference_mode(False):  # the tensor may be used outside of that mode
            return Handle(number, torch.tensor(number, dtype=torch.int64, device="cpu"))

    def check(self, handle: torch.Tensor) -> None:
        """Raises TypeError if a tensor cannot be a handle."""
        if handle.dtype != torch.int64 or handle.dim():
            raise TypeError(
                f"layer: expected {self._kind}.handle, an int64 scalar, got {describe(handle)}"
            )

    def layer(self, handle: torch.Tensor) -> Layer:
        """Returns the layer that a handle names.

        Raises:
            TypeError: `handle` is no int64 scalar.
            RuntimeError: this process has no such layer.
        """
        self.check(handle)
        known = self._layers.get(int(handle))
        if known is None:
            article = "an" if self._kind[0] in "AEIOU" else "a"
            raise RuntimeError(
                f"layer: expected the handle of {article} {self._kind} in this process, got "
                f"{int(handle)}; its {self._kind} was deleted, or another process made it. Keep "
                f"{self._kind} alive while compiled code uses them, and export programs in the "
                "process that runs them"
            )
        return known
