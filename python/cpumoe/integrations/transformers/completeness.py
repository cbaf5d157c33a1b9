"""Whether the host found all of a model in the checkpoint's files, and all of those in the model.

transformers initialises what it does not find at random, leaves out what it does not know, and only
logs a report of both. A model that is to compute right must be refused instead.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from typing_extensions import override

from cpumoe.checkpoint import CheckpointError, SafetensorsFolder

_NAMED = 3
_REPORT = "LOAD REPORT"
_LOGGER = logging.getLogger("transformers.modeling_utils")
_WEIGHT = ".weight"
_FP8 = ("F8_E4M3", "F8_E5M2")
# What the scales of X.weight are called: X.scale, ...
_SCALES = (".scale", ".weight_scale", ".weight_scale_inv", ".qscale_weight")
# Tensors that a model computes right without, beyond those that the host itself leaves out.
_OPTIONAL = re.compile(
    # multi-token prediction
    r"(?:^|\.)mtp(?:_\w+)?\."
    # what quantized activations and key-value caches are scaled by
    r"|(?:^|[._])(?:[qkv]|kv|input|output|activation)_(?:global_)?(?:scale|zero_point)$"
    # computed from the config
    r"|(?:^|\.)rotary_emb\.inv_freq$"
)
# The host's report: rows "name | CONVERSION | traceback", where the cause stands before "Error: ".
_UNCONVERTIBLE = re.compile(r"^(\S.*?) *\| *CONVERSION\b", re.MULTILINE)
_CAUSE = re.compile(r"^(.+)\nError: ", re.MULTILINE)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def check_complete(
    model: nn.Module, report: Mapping[str, Any], path: object, *, mismatched_allowed: bool
) -> None:
    """Refuses a model that is not wholly, or not only, what the checkpoint's files hold.

    Args:
        model: a model as the host loaded it.
        report: the host's, as ``output_loading_info=True`` returns it.
        path: the checkpoint, for errors.
        mismatched_allowed: whether tensors of another shape than the model's may stay random.

    Raises:
        CheckpointError: tensors that the files lack, that the model lacks, or of another shape.
    """
    mismatched = [] if mismatched_allowed else sorted(report["mismatched_keys"])
    shapes = [f"{name} {list(file)} for {list(own)}" for name, file, own in mismatched]
    faults = [
        _counted("missing tensors", report["missing_keys"]),
        _counted("tensors unknown to the model", _unexpected(model, report["unexpected_keys"])),
        _counted("tensors of another shape", shapes),
    ]
    if any(faults):
        raise CheckpointError(
            f"{path}: the weights do not fit {type(model).__name__}: "
            f"{'; '.join(filter(None, faults))}. Is the download complete, and config.json its own?"
        )


def check_scaled(weights: SafetensorsFolder) -> None:
    """Refuses FP8 weights whose scales no file has: transformers 5.24 takes codes for values.

    Args:
        weights: a checkpoint; the headers of all its files are read.

    Raises:
        CheckpointError: names them.
    """
    stems = [name.removesuffix(_WEIGHT) for name in weights.names() if name.endswith(_WEIGHT)]
    unscaled = [
        f"{stem}{_WEIGHT}"
        for stem in stems
        if not any(f"{stem}{scale}" in weights for scale in _SCALES)
        and weights.info(f"{stem}{_WEIGHT}").dtype in _FP8
    ]
    if unscaled:
        raise CheckpointError(
            f"{weights.path}: {_counted('FP8 weights without a scale', unscaled)}. Is the download "
            f"complete?"
        )


@contextmanager
def host_report_held_back(path: object) -> Iterator[None]:
    """Keeps this thread's report of the host from the log until the block ends without an error.

    Raises:
        CheckpointError: the host could not convert tensors, which it says in its report alone.
    """
    own_level = _LOGGER.level
    held = _HeldBack(_LOGGER.getEffectiveLevel())
    _LOGGER.addFilter(held)
    # A higher level would leave no report to read. A logger's own level of WARNING would make the
    # host warn about tensor parallelism.
    _LOGGER.setLevel(min(held.level, logging.WARNING - 1))
    try:
        yield
    except RuntimeError as error:
        for record in held.records:
            _raise_unconvertible(path, _ANSI.sub("", record.getMessage()), error)
        raise
    finally:
        _LOGGER.setLevel(own_level)
        _LOGGER.removeFilter(held)
    for record in held.records:
        if record.levelno >= held.level:
            _LOGGER.handle(record)


class _HeldBack(logging.Filter):
    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level  # below which the log wants nothing
        self.records: list[logging.LogRecord] = []
        self._thread = threading.get_ident()

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread or _REPORT not in record.getMessage():
            return record.levelno >= self.level
        self.records.append(record)
        return False


def _raise_unconvertible(path: object, report: str, error: RuntimeError) -> None:
    names, cause = _UNCONVERTIBLE.findall(report), _CAUSE.search(report)
    if names:
        why = f": {cause[1].rstrip('.')}" if cause else ""
        raise CheckpointError(
            f"{path}: transformers cannot convert {_counted('tensors', names)}{why}. Is the "
            f"download complete?"
        ) from error


def _unexpected(model: Any, names: Iterable[str]) -> set[str]:
    """Returns those of the tensors without a place in the model that it should have one for."""
    names = {name for name in names if not _OPTIONAL.search(name)}
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", 0)
    predicting = range(layers, layers + (getattr(text, "num_nextn_predict_layers", 0) or 0))
    names = {n for n in names if not ((m := _LAYER.search(n)) and int(m[1]) in predicting)}
    architectures = model.config.architectures or ()
    is_part = model.base_model is model or (
        architectures and not any(c.__name__ in architectures for c in type(model).__mro__)
    )
    if not is_part:
        return names
    # The files hold more than was asked for, such as a head or a tower for images.
    prefix = f"{model.base_model_prefix}."
    own = {name for name, _ in model.named_children()}
    return {name for name in names if name.removeprefix(prefix).partition(".")[0] in own}


def _counted(fault: str, names: Collection[str]) -> str:
    """``missing tensors: 5 (a, b, c, ...)``; empty where there are none."""
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:_NAMED])
    return f"{fault}: {len(names)} ({shown}{', ...' if len(names) > _NAMED else ''})"
