"""What packed layers have in common: who computes them, and that they belong to this process."""

from __future__ import annotations

from typing import ClassVar, NoReturn

from cpumoe import _core
from cpumoe.formats import WeightFormat, weight_format
from cpumoe.isa import select_isa


class PackedLayer:
    """Packed weights in one format, which one variant computes in one precision."""

    # How to make a layer again, for the error of copies.
    _anew: ClassVar[str]

    _format: WeightFormat
    _isa: str
    _precision: str

    def _choose(self, format: str, isa: str | None, precision: str) -> str:
        """Sets format, variant and precision. Returns who asked for the variant, for errors.

        Raises:
            ValueError: the format is unknown, or this CPU cannot run the variant.
            RuntimeError: the variant's library cannot be used.
        """
        self._format = weight_format(format)
        name, origin = select_isa(isa)
        self._isa = _core.open_variant(name, origin)
        self._precision = precision
        return origin

    @property
    def format(self) -> str:
        """Name of the weight format, e.g. "mxfp4"."""
        return self._format.name

    @property
    def isa(self) -> str:
        """Name of the ISA variant that computes, e.g. "avx512_bf16"."""
        return self._isa

    @property
    def precision(self) -> str:
        """The lowest precision of activations: "auto", "bf16" or "int8"; see `cpumoe.Experts`."""
        return self._precision

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled or copied."""
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied, because packed weights belong to "
            f"this process; {self._anew}"
        )
