"""The checkpoint that holds a layer's experts, compared with what the host says of the layer."""

from __future__ import annotations

import os
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from cpumoe._base.tensors import describe
from cpumoe.checkpoint import CheckpointError, ExpertReader, open_checkpoint
from cpumoe.integrations.sglang.checks import number_or_none
from cpumoe.numerics.glu import GLU, SwiGLU


class Method(NamedTuple):
    """The experts of a ``--kt-method``.

    Attributes:
        format: name of their weight format.
        by_row: whether each row has a scale of its own, of formats in which blocks may share one.
    """

    format: str
    by_row: bool = False


# By SGLang's names, for --kt-method.
METHODS = {
    "MXFP4": Method("mxfp4"),
    "RAWINT4": Method("int4"),
    "FP8": Method("fp8"),
    "FP8_PERCHANNEL": Method("fp8", by_row=True),
    "BF16": Method("bf16"),
    "NVFP4": Method("nvfp4"),
}

# SwiGLU limit and alpha of the layer that the host is making; its plugin sets them.
host_swiglu: ContextVar[tuple[float | None, float | None]] = ContextVar(
    "host_swiglu", default=(None, None)
)

# One reader per folder, for the layers that use it, because a reader's index takes megabytes.
_readers: WeakValueDictionary[str, ExpertReader] = WeakValueDictionary()


@dataclass(frozen=True)
class LayerSizes:
    """What the host says of a layer."""

    layer: int
    experts: int
    hidden: int
    intermediate: int


def known_method(method: object) -> str:
    """Returns the name of a ``--kt-method`` in capitals.

    Raises:
        TypeError: `method` is no string.
        ValueError: cpumoe does not have it.
    """
    if not isinstance(method, str):
        raise TypeError(f"method: expected a string, got {method!r}")
    if method.upper() not in METHODS:
        raise ValueError(
            f"method: expected one of {', '.join(METHODS)}, which are the formats that cpumoe "
            f"computes, got {method!r}; pass --kt-method and a checkpoint in that format"
        )
    return method.upper()


def method_of(weights: object, fmt: str, *, by_row: bool = False) -> str:
    """Returns the ``--kt-method`` of a checkpoint whose experts have a weight format.

    Args:
        weights: the checkpoint's folder or name, for the error.
        fmt: name of the weight format.
        by_row: whether each row has a scale of its own.

    Raises:
        ValueError: SGLang has no method for the format that cpumoe computes.
    """
    fitting = [name for name, method in METHODS.items() if method.format == fmt]
    if fitting:
        exact = (name for name in fitting if METHODS[name].by_row == by_row)
        return next(exact, fitting[0])
    known = " or ".join(dict.fromkeys(method.format for method in METHODS.values()))
    raise ValueError(
        f"{weights}: expected experts in {known}, which are the formats that cpumoe computes for "
        f"SGLang, got {fmt}"
    )


def open_experts(path: object, method: str, sizes: LayerSizes) -> ExpertReader:
    """Opens a checkpoint and checks that a layer is as the host says.

    Raises:
        TypeError: `path` is no path.
        FileNotFoundError, CheckpointError: see `open_checkpoint`.
        IndexError: the checkpoint's layer has no routed experts.
        ValueError: the checkpoint has another format or other sizes.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"weight_path: expected a folder, got {path!r}; pass --kt-weight-path")
    reader = _shared_reader(Path(path))
    reader.check_supported()
    try:
        _check_format(reader, method, sizes.layer)
        _check_sizes(reader, sizes)
        reader.check_layer(sizes.layer)
    except IndexError as error:
        raise IndexError(
            f"layer_idx: {error}; layers of a draft model must stay on the GPU, which SGLang's "
            "plugin of cpumoe and sglang-kt see to"
        ) from error
    return reader


def experts_of_slots(physical_to_logical: object, reader: ExpertReader, slots: int) -> list[int]:
    """Returns the checkpoint's expert in each of the host's slots.

    Args:
        physical_to_logical: int ``[slots]``; None: slot i has expert i.
        reader: the checkpoint.
        slots: number of the host's slots.

    Raises:
        TypeError, ValueError: it is something else, or names experts that do not exist.
    """
    name = "physical_to_logical_map"
    if physical_to_logical is None:
        return list(range(slots))
    if not isinstance(physical_to_logical, torch.Tensor):
        raise TypeError(
            f"{name}: expected an int tensor [{slots}], got {type(physical_to_logical).__name__}"
        )
    integers = not (physical_to_logical.dtype.is_floating_point or physical_to_logical.is_complex())
    if not integers or physical_to_logical.dtype == torch.bool:
        raise TypeError(
            f"{name}: expected an int tensor [{slots}], got {describe(physical_to_logical)}"
        )
    if tuple(physical_to_logical.shape) != (slots,):
        raise ValueError(f"{name}: expected [{slots}], got {list(physical_to_logical.shape)}")
    experts = [int(expert) for expert in physical_to_logical.tolist()]
    for slot, expert in enumerate(experts):
        if not 0 <= expert < reader.num_experts:
            raise ValueError(
                f"{name}: slot {slot}: expected an expert from 0 to {reader.num_experts - 1}, got "
                f"{expert}"
            )
    return experts


def swiglu_of(reader: ExpertReader, swiglu_limit: object, swiglu_alpha: object) -> GLU:
    """Returns the activation: the host's values, or else the checkpoint's.

    Args:
        reader: the checkpoint.
        swiglu_limit: the host's limit; None or 0: it names none.
        swiglu_alpha: the host's alpha; None or 0: it names none. Any other value means gpt-oss'
            gate, whose up projection is shifted by 1.

    Raises:
        TypeError, ValueError: a value is wrong, or the checkpoint has another one.
    """
    plugin_limit, plugin_alpha = host_swiglu.get()
    host_limit = number_or_none(swiglu_limit, "swiglu_limit") or plugin_limit
    host_alpha = number_or_none(swiglu_alpha, "swiglu_alpha") or plugin_alpha
    stored = _stored_swiglu(reader)
    if host_limit and stored.limit and host_limit != stored.limit:
        raise ValueError(
            f"swiglu_limit: expected {stored.limit}, as the checkpoint {reader.folder.path} has, "
            f"got {host_limit}; --kt-weight-path must be the experts of the model that runs"
        )
    activation = replace(stored, limit=host_limit or stored.limit)
    if not host_alpha:
        return activation
    gate = replace(activation, alpha=host_alpha, up_offset=1.0)
    if reader.activation is not None and gate != activation:
        expected = stored.alpha if stored.up_offset else "none"
        raise ValueError(
            f"swiglu_alpha: expected {expected}, as the checkpoint {reader.folder.path} has, got "
            f"{host_alpha}; --kt-weight-path must be the experts of the model that runs"
        )
    return gate


def _stored_swiglu(reader: ExpertReader) -> GLU:
    if reader.activation is not None:
        return reader.activation
    # SGLang itself has checked that the activation function is SiLU.
    limit = number_or_none(reader.config.text.get("swiglu_limit"), "config.json: swiglu_limit")
    return SwiGLU(limit=limit)


def _shared_reader(path: Path) -> ExpertReader:
    key = os.path.realpath(path)
    reader = _readers.get(key)
    if reader is None or reader.folder.closed or not _unchanged(reader):
        reader = _readers[key] = open_checkpoint(path)
    return reader


def _unchanged(reader: ExpertReader) -> bool:
    try:
        reader.folder.check_unchanged()
    except (CheckpointError, OSError):
        return False
    return True


def _check_format(reader: ExpertReader, method: str, layer: int) -> None:
    path, fmt = reader.folder.path, reader.layer_format(layer)
    by_row = reader.scales_by_row(layer)
    fitting = method_of(path, fmt, by_row=by_row)
    if fitting != known_method(method):
        rows = " with a scale per row" if METHODS[fitting].by_row else ""
        raise ValueError(
            f"method: expected {fitting}, because the experts of {path} are {fmt}{rows}, got "
            f"{method}; pass --kt-method {fitting}"
        )


def _check_sizes(reader: ExpertReader, sizes: LayerSizes) -> None:
    if sizes.experts > reader.num_experts:
        raise ValueError(
            f"num_experts: expected {reader.num_experts}, as the checkpoint has, got "
            f"{sizes.experts}; pass --disable-shared-experts-fusion, because a fused shared expert "
            "would be computed as a routed one, and no --ep-num-redundant-experts"
        )
    for name, wanted, got in (
        ("num_experts", reader.num_experts, sizes.experts),
        ("hidden_size", reader.hidden_size, sizes.hidden),
        ("moe_intermediate_size", reader.intermediate_size, sizes.intermediate),
    ):
        if wanted != got:
            raise ValueError(
                f"{name}: expected {wanted}, as the checkpoint {reader.folder.path} has, got {got};"
                " --kt-weight-path must be the experts of the model that runs"
            )
