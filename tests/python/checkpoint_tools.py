"""Small checkpoints for the reader tests, and ways to damage them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cpumoe.models import find_model
from cpumoe.synth import write_checkpoint

SMALL = {"layers": 2, "experts": 3, "hidden": 64, "intermediate": 96, "top_k": 2}


def write_small(folder: Path, model: str, **overrides: Any) -> Path:
    """A few kilobytes of `model`'s native format (`tid2eid` aside)."""
    return write_checkpoint(folder, find_model(model), **{**SMALL, **overrides})


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, path)


def rename_tensors(folder: Path, old: str, new: str) -> None:
    """Replaces the prefix `old` of every tensor name by `new`."""
    path = folder / "model.safetensors"
    tensors = {new + name.removeprefix(old): t.clone() for name, t in load_file(path).items()}
    save_file(tensors, path)


def edit_config(folder: Path, **changes: Any) -> None:
    """Replaces, adds or (None) removes top-level keys of config.json."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
