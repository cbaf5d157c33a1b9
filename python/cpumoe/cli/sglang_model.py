"""What the launch of an SGLang server needs to know of a model."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpumoe.checkpoint import SafetensorsFolder, open_checkpoint
from cpumoe.cli import inspect_model
from cpumoe.cli.errors import InputError
from cpumoe.integrations.sglang.checkpoint import method_of

if TYPE_CHECKING:
    from cpumoe.models.registry import ModelSpec

# Bytes of published checkpoints, for models that are not downloaded: of all weights but those of
# routed experts and draft layers, and of draft layers with their experts.
_OTHER_BYTES = {
    "DeepSeek-V4-Flash": (7_160_000_000, 3_640_000_000),
    "Kimi-K2-Thinking": (23_500_000_000, 0),
    "Kimi-K2.5": (24_400_000_000, 0),
}
# Model types whose layers SGLang is known to hand to the module, and whether a checkpoint of the
# type has Python code that SGLang runs.
_KNOWN_TYPES = {"deepseek_v4": False, "kimi_k2": True, "kimi_k25": True, "qwen3_moe": False}

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_DRAFT = re.compile(r"(?:^|\.)mtp\.")
_EXPERTS = re.compile(r"\.experts\.")


@dataclass(frozen=True)
class LaunchModel:
    """A model, and where its bytes belong.

    Attributes:
        path: its folder.
        weights: the folder with the experts for the CPU.
        method: the value of ``--kt-method``.
        layers: number of layers with routed experts.
        experts: number of routed experts per layer.
        cpu_expert_bytes: bytes of an expert on the CPU.
        gpu_expert_bytes: bytes of an expert on the GPU.
        dense_bytes: bytes of all weights but those of experts and draft layers.
        draft_bytes: bytes of draft layers with their experts, for multi-token prediction.
        missing: why the model cannot be loaded.
        remarks: what its user should know.
    """

    path: str
    weights: str
    method: str
    layers: int
    experts: int
    cpu_expert_bytes: int
    gpu_expert_bytes: int
    dense_bytes: int
    draft_bytes: int
    missing: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Bytes:
    """Bytes on the GPU if it had all experts."""

    dense: int
    experts: int
    draft: int


def find_launch_model(model: str, weights: str | None) -> LaunchModel:
    """Returns a model for SGLang.

    Args:
        model: its folder, or a name of the registry. A name also finds a checkpoint in the cache of
            Hugging Face.
        weights: the folder with the experts for the CPU; None: the model's own.

    Raises:
        InputError: there is no such model, or its checkpoint has no routed experts.
        OSError, ValueError: a folder is no MoE checkpoint, or cpumoe does not compute its format
            for SGLang.
    """
    folder = Path(model) if Path(model).exists() else _downloaded(model)
    document = inspect_model.collect(weights or str(folder or model))
    source = Path(weights or folder or model)
    method = method_of(
        weights or model, document["format"], by_row=source.exists() and _scales_by_row(source)
    )
    layers, experts = len(document["layers"]), document["num_experts"]
    if not layers:
        raise InputError(
            f"{weights or model}: expected a checkpoint that has routed experts, got layers "
            "without any; pass --kt-weight-path FOLDER, the checkpoint of the experts"
        )
    expert_bytes = document["bytes"]["expert"]
    missing = tuple(document["reasons"])
    if folder is not None:
        path = str(folder)
        stored = _stored(folder, document["num_hidden_layers"])
    else:
        spec = _registered(model)
        path = spec.name
        dense, draft = _published_bytes(spec)
        stored = _Bytes(dense, layers * experts * expert_bytes, draft)
        missing += (f"{path}: no such folder; hf download {spec.aliases[0]} --local-dir {path}",)
    return LaunchModel(
        path=path,
        weights=weights or path,
        method=method,
        layers=layers,
        experts=experts,
        cpu_expert_bytes=expert_bytes,
        # The model's own folder may lack experts that another folder has for the CPU.
        gpu_expert_bytes=stored.experts // (layers * experts) or expert_bytes,
        dense_bytes=stored.dense,
        draft_bytes=stored.draft,
        missing=missing,
        remarks=_remarks(document["model_type"]),
    )


def _scales_by_row(folder: Path) -> bool:
    """Whether rows of the experts' matrices have scales of their own."""
    with open_checkpoint(folder) as reader:
        return not reader.unsupported and any(map(reader.scales_by_row, reader.layers()))


def _downloaded(name: str) -> Path | None:
    """The folder of a registered model in the cache of Hugging Face, if it is there."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        spec = _registered(name)
    except InputError:
        return None
    for alias in spec.aliases:
        if "/" in alias:
            file = try_to_load_from_cache(alias, "config.json")
            if isinstance(file, str):
                return Path(file).parent
    return None


def _registered(name: str) -> ModelSpec:
    from cpumoe.models import find_model

    try:
        return find_model(name)
    except ValueError as error:
        raise InputError(f"{name}: no such folder, and {error}") from error


def _published_bytes(spec: ModelSpec) -> tuple[int, int]:
    try:
        return _OTHER_BYTES[spec.name]
    except KeyError:
        raise InputError(
            f"{spec.name}: no such folder; expected a downloaded model, or one of "
            f"{', '.join(_OTHER_BYTES)}"
        ) from None


def _stored(path: Path, decoder_layers: int) -> _Bytes:
    """Adds up the tensors of a checkpoint; those of missing files do not count."""
    sizes = dict.fromkeys(("dense", "experts", "draft"), 0)
    with SafetensorsFolder(path) as folder:
        for name in folder.names():
            try:
                nbytes = folder.info(name).nbytes
            except FileNotFoundError:  # `inspect_model` reports missing files
                continue
            layer = _LAYER.search(name)
            if _DRAFT.search(name) or (layer and int(layer[1]) >= decoder_layers):
                sizes["draft"] += nbytes
            else:
                sizes["experts" if _EXPERTS.search(name) else "dense"] += nbytes
    return _Bytes(**sizes)


def _remarks(model_type: str) -> tuple[str, ...]:
    has_code = _KNOWN_TYPES.get(model_type)
    if has_code is None:
        return (f"SGLang with cpumoe was not tried with models of the type {model_type}",)
    if has_code:
        return (
            "the checkpoint has Python code, for its tokenizer; SGLang runs it if you pass "
            "--trust-remote-code",
        )
    return ()
