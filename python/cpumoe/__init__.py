"""Mixture-of-Experts layers on the CPU, straight from low-precision checkpoints.

Example::

    experts = cpumoe.Experts.from_checkpoint("path/to/DeepSeek-V4-Flash", layer=3)
    y = experts(hidden_states, topk_ids, topk_weights)
"""

import importlib
from typing import TYPE_CHECKING

# Imports without PyTorch. The function isa must be bound after its submodule of that name.
from cpumoe import _core
from cpumoe.isa import isa, known_isas, missing_features, supported_isas

if TYPE_CHECKING:
    from cpumoe import reference
    from cpumoe.checkpoint import (
        CheckpointError,
        ExpertReader,
        ExpertWeights,
        UnsupportedFormatError,
        open_checkpoint,
    )
    from cpumoe.dot_product_attention import attention
    from cpumoe.experts import Experts
    from cpumoe.experts_builder import ExpertsBuilder
    from cpumoe.formats import WEIGHT_FORMATS, QuantizedMatrix, WeightFormat, weight_format
    from cpumoe.future import Future
    from cpumoe.linear import Linear
    from cpumoe.models import ModelSpec, find_model
    from cpumoe.numerics.glu import GLU, SwiGLU
    from cpumoe.options import ExpertsOptions
    from cpumoe.placement import Placement
    from cpumoe.runtime import Runtime, default_runtime
    from cpumoe.statistics import ExpertsStatistics

__version__ = _core.version()

__all__ = [
    "GLU",
    "WEIGHT_FORMATS",
    "CheckpointError",
    "ExpertReader",
    "ExpertWeights",
    "Experts",
    "ExpertsBuilder",
    "ExpertsOptions",
    "ExpertsStatistics",
    "Future",
    "Linear",
    "ModelSpec",
    "Placement",
    "QuantizedMatrix",
    "Runtime",
    "SwiGLU",
    "UnsupportedFormatError",
    "WeightFormat",
    "__version__",
    "attention",
    "default_runtime",
    "find_model",
    "isa",
    "known_isas",
    "missing_features",
    "open_checkpoint",
    "reference",
    "supported_isas",
    "weight_format",
]

# Importing PyTorch takes seconds. Whatever needs it is imported on first use, so that the command
# line's help and the ISA functions answer at once.
_MODULES = {
    "cpumoe.checkpoint": (
        "CheckpointError",
        "ExpertReader",
        "ExpertWeights",
        "UnsupportedFormatError",
        "open_checkpoint",
    ),
    "cpumoe.dot_product_attention": ("attention",),
    "cpumoe.experts": ("Experts",),
    "cpumoe.experts_builder": ("ExpertsBuilder",),
    "cpumoe.formats": ("WEIGHT_FORMATS", "QuantizedMatrix", "WeightFormat", "weight_format"),
    "cpumoe.future": ("Future",),
    "cpumoe.linear": ("Linear",),
    "cpumoe.models": ("ModelSpec", "find_model"),
    "cpumoe.options": ("ExpertsOptions",),
    "cpumoe.placement": ("Placement",),
    "cpumoe.runtime": ("Runtime", "default_runtime"),
    "cpumoe.statistics": ("ExpertsStatistics",),
    "cpumoe.numerics.glu": ("GLU", "SwiGLU"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "reference":
        return importlib.import_module("cpumoe.reference")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cpumoe' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
