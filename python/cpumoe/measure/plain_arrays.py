"""A layer and its calls in plain files, so that other programs can compute with identical bits.

Each file is a bare array in C order and in the machine's (little-endian) byte order:

=========== ======= ============================ ================================================
file        element shape                        content
=========== ======= ============================ ================================================
``gate.q``  uint8   [experts, inner, hidden/2]   MXFP4 codes, low nibble = even k
``gate.s``  uint8   [experts, inner, hidden/32]  MXFP4 scales, E8M0
``up.q``    uint8   as ``gate.q``
``up.s``    uint8   as ``gate.s``
``down.q``  uint8   [experts, hidden, inner/2]
``down.s``  uint8   [experts, hidden, inner/32]
``x_M``     float32 [M, hidden]                  hidden states of M tokens, bf16 values
``ids_M``   int32   [calls, M, top_k]            expert ids, one routing per call; -1: skipped
``rw_M``    float32 [M, top_k]                   routing weights
``ref_M``   float32 [M, hidden]                  the result of the first routing; may be missing
=========== ======= ============================ ================================================

The activation is plain SwiGLU, ``silu(g) * u``. The other sizes follow from the sizes of the files
and from the model's hidden and inner size.
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from cpumoe.checkpoint import ExpertWeights
from cpumoe.formats import QuantizedMatrix, weight_format
from cpumoe.measure.layer_weights import LayerWeights
from cpumoe.measure.throughput import Workload
from cpumoe.numerics.glu import SwiGLU

_FORMAT = "mxfp4"


class PlainArrays:
    """The files of one folder.

    Args:
        folder: the folder.
        hidden_size: width of the hidden states.
        intermediate_size: inner width of one expert.

    Raises:
        FileNotFoundError: the folder, its weights or its calls are missing.
        ValueError: the files' sizes do not fit together.
    """

    def __init__(
        self, folder: str | PathLike[str], hidden_size: int, intermediate_size: int
    ) -> None:
        """Reads only the files' sizes."""
        self.folder = Path(folder)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of plain arrays")
        names = (re.fullmatch(r"ids_([1-9]\d{0,8})", path.name) for path in self.folder.iterdir())
        self.tokens = sorted(int(name[1]) for name in names if name)
        if not self.tokens:
            raise FileNotFoundError(f"{folder}: no calls (ids_M, x_M and rw_M for M tokens)")
        matrix = hidden_size * intermediate_size // 2
        self.num_experts = self._count("gate.q", matrix, "an expert's codes")
        self.top_k = self._count(f"rw_{self.tokens[0]}", 4 * self.tokens[0], "a token's weight")

    def weights(self) -> LayerWeights:
        """Returns the layer; its tensors are views of the mapped files.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file has another size.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        gate, up, down = (self._matrices(name, *shape) for name, shape in shapes.items())
        return LayerWeights(
            experts=[ExpertWeights(gate[i], up[i], down[i]) for i in range(self.num_experts)],
            format=_FORMAT,
            hidden_size=hidden,
            intermediate_size=inner,
            top_k=self.top_k,
            activation=SwiGLU(),
            has_bias=False,
        )

    def workload(self, tokens: int) -> Workload:
        """Returns the calls of `tokens` tokens.

        Raises:
            FileNotFoundError: a file of these calls is missing.
            ValueError: a file has another size, or expert ids are out of range or all skipped.
        """
        shape = (tokens, self.hidden_size)
        ids = self._routings(tokens)
        reference = None
        if (self.folder / f"ref_{tokens}").exists():
            reference = self._read(f"ref_{tokens}", torch.float32, shape).clone()
        return Workload(
            self._read(f"x_{tokens}", torch.float32, shape).bfloat16(),
            ids,
            self._read(f"rw_{tokens}", torch.float32, (tokens, self.top_k)).clone(),
            reference,
        )

    def _routings(self, tokens: int) -> torch.Tensor:
        """Expert ids ``[calls, tokens, top_k]``, -1: skipped."""
        name = f"ids_{tokens}"
        calls = self._count(name, 4 * tokens * self.top_k, "a routing")
        ids = self._read(name, torch.int32, (calls, tokens, self.top_k)).clone()
        bad = ids[(ids < -1) | (ids > self.num_experts)]
        if len(bad):
            raise ValueError(
                f"{self.folder / name}: expected expert ids from -1 to {self.num_experts}, "
                f"got {int(bad[0])}"
            )
        ids[ids == self.num_experts] = -1  # also means skipped
        if bool((ids < 0).all()):
            raise ValueError(
                f"{self.folder / name}: expected at least one expert id, got skipped ones only"
            )
        return ids

    def _matrices(self, name: str, n: int, k: int) -> QuantizedMatrix:
        group = weight_format(_FORMAT).group_size
        return QuantizedMatrix(
            self._read(f"{name}.q", torch.uint8, (self.num_experts, n, k // 2)),
            self._read(f"{name}.s", torch.uint8, (self.num_experts, n, -(-k // group))),
        )

    def _read(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        expected = dtype.itemsize * int(np.prod(shape))
        size = self._size(name)
        if size != expected:
            raise ValueError(
                f"{self.folder / name}: expected {expected} bytes for {list(shape)}, got {size}"
            )
        # Copy on write, because PyTorch has no read-only tensors.
        data = np.memmap(self.folder / name, np.uint8, mode="c")
        return torch.from_numpy(data).view(dtype).view(shape)

    def _count(self, name: str, unit: int, what: str) -> int:
        """How many units of `unit` bytes a file holds."""
        size = self._size(name)
        if size == 0 or size % unit:
            raise ValueError(
                f"{self.folder / name}: expected a multiple of {unit} bytes ({what}), got {size}"
            )
        return size // unit

    def _size(self, name: str) -> int:
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.folder / name}: no such file") from None
