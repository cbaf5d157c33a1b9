"""Checks that a model and its checkpoint's files have the same tensors.

transformers initializes tensors that it does not find at random, leaves out tensors that it does
not know, and only logs a report of both. cpumoe refuses such a model.
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
# Suffixes of the scales of X.weight: X.scale, ...
_SCALES = (".scale", ".weight_scale", ".weight_scale_inv", ".qscale_weight")
# Tensors that a model does not need, beyond those that transformers itself leaves out.
_OPTIONAL = re.compile(
    # multi-token prediction
    r"(?:^|\.)mtp(?:_\w+)?\."
    # scales of quantized activations and of key-value caches
    r"|(?:^|[._])(?:[qkv]|kv|input|output|activation)_(?:global_)?(?:scale|zero_point)$"
    # computed from the config
    r"|(?:^|\.)rotary_emb\.inv_freq$"
)
# transformers' report has rows "name | CONVERSION | traceback", with the cause before "Error: ".
_UNCONVERTIBLE = re.compile(r"^(\S.*?) *\| *CONVERSION\b", re.MULTILINE)
_CAUSE = re.compile(r"^(.+)\nError: ", re.MULTILINE)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def check_complete(
    model: nn.Module, report: Mapping[str, Any], path: object, *, mismatched_allowed: bool
) -> None:
    """Refuses a model if the checkpoint's files lack some of its tensors, or have more.

    Args:
        model: the model as transformers loaded it.
        report: transformers' report, as ``output_loading_info=True`` returns it.
        path: the checkpoint, for errors.
        mismatched_allowed: whether tensors whose shapes differ from the model's may stay random.

    Raises:
        CheckpointError: the files or the model lack tensors, or shapes differ.
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
            f"{'; '.join(filter(None, faults))}; check that the download is complete, and that "
            f"config.json belongs to it"
        )


def check_scaled(weights: SafetensorsFolder) -> None:
    """Refuses FP8 weights without scales, because transformers 5.24 takes codes for values.

    Args:
        weights: a checkpoint. The headers of all its files are read.

    Raises:
        CheckpointError: a weight has no scale.
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
            f"{weights.path}: {_counted('FP8 weights without a scale', unscaled)}; check that the "
            f"download is complete"
        )


@contextmanager
def host_report_held_back(path: object) -> Iterator[None]:
    """Holds back this thread's report of transformers until the block ends without an error.

    Raises:
        CheckpointError: transformers could not convert tensors, which only its report says.
    """
    own_level = _LOGGER.level
    held = _HeldBack(_LOGGER.getEffectiveLevel())
    _LOGGER.addFilter(held)
    # A higher level would leave no report to read. A logger's own level of WARNING would make
    # transformers warn about tensor parallelism.
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
        self.level = level  # the log drops records below it
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
            f"{path}: transformers cannot convert {_counted('tensors', names)}{why}; check that "
            f"the download is complete"
        ) from error


def _unexpected(model: Any, names: Iterable[str]) -> set[str]:
    """Returns those of the unexpected tensors that are a fault."""
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
    # The files hold a larger model, with a head or a vision tower, of which this is a part.
    prefix = f"{model.base_model_prefix}."
    own = {name for name, _ in model.named_children()}
    return {name for name in names if name.removeprefix(prefix).partition(".")[0] in own}


def _counted(fault: str, names: Collection[str]) -> str:
    """Returns ``missing tensors: 5 (a, b, c, ...)``, or an empty text if there are none."""
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:_NAMED])
    return f"{fault}: {len(names)} ({shown}{', ...' if len(names) > _NAMED else ''})"
