"""Weight formats: how a group of low-precision weights is stored and decoded.

To add a format, add a file with its `WeightFormat`, and a row to `WEIGHT_FORMATS`.
"""

from __future__ import annotations

from cpumoe.formats.bf16 import BF16
from cpumoe.formats.fp8 import FP8
from cpumoe.formats.fp16 import FP16
from cpumoe.formats.int4 import INT4
from cpumoe.formats.mxfp4 import MXFP4
from cpumoe.formats.nvfp4 import NVFP4
from cpumoe.formats.quantized_matrix import QuantizedMatrix, stacked_rows
from cpumoe.formats.weight_format import WeightFormat

__all__ = ["WEIGHT_FORMATS", "QuantizedMatrix", "WeightFormat", "stacked_rows", "weight_format"]

WEIGHT_FORMATS: dict[str, WeightFormat] = {
    row.name: row for row in (MXFP4, INT4, BF16, FP16, FP8, NVFP4)
}


def weight_format(name: str | WeightFormat) -> WeightFormat:
    """Returns the format called `name`, or `name` itself if it is a WeightFormat.

    Raises:
        ValueError: the format is unknown; the message lists the known ones.
    """
    if isinstance(name, WeightFormat):
        return name
    try:
        return WEIGHT_FORMATS[name]
    except KeyError:
        raise ValueError(
            f"weight format {name!r} is not supported; supported: {', '.join(WEIGHT_FORMATS)}"
        ) from None
