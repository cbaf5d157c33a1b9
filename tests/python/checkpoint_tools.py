"""Small checkpoints for the reader tests, and ways to damage them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cpumoe.checkpoint import ExpertReader, open_checkpoint
from cpumoe.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from cpumoe.formats import WEIGHT_FORMATS
from cpumoe.models import find_model
from cpumoe.models.synth import write_checkpoint

SMALL = {"layers": 2, "experts": 3, "hidden": 64, "intermediate": 96, "top_k": 2}


def write_small(folder: Path, model: str, **overrides: Any) -> Path:
    """Writes a few kilobytes in `model`'s native format (without `tid2eid`)."""
    return write_checkpoint(folder, find_model(model), **{**SMALL, **overrides})


def first_layer(folder: Path) -> int:
    """Returns the first layer that has experts."""
    return open_checkpoint(folder).layers()[0]


def a_call(*, tokens: int = 6, experts: int = 4, top_k: int = 3) -> tuple[torch.Tensor, ...]:
    """Returns hidden states, ids and weights of a call of a small checkpoint's layer."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, SMALL["hidden"], generator=generator)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return x, ids, torch.rand(tokens, top_k, generator=generator)


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


def split_into_shards(source: Path, target: Path, count: int, index: str = INDEX_NAME) -> Path:
    """Writes the tensors of a one-file checkpoint to `target` as shards, and copies its config."""
    tensors = load_file(source / SINGLE_NAME)
    weight_map: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        names = sorted(tensors)[number::count]
        save_file({name: tensors[name] for name in names}, target / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (target / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


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


def assert_sizes(reader: ExpertReader) -> None:
    """The reader has the sizes of `SMALL`, and its first expert too."""
    assert reader.num_experts == SMALL["experts"]
    assert reader.hidden_size == SMALL["hidden"]
    assert reader.intermediate_size == SMALL["intermediate"]
    assert reader.top_k == SMALL["top_k"]
    assert reader.unsupported == ()
    weights = reader.expert(reader.layers()[0], 0)
    assert weights.gate.shape == weights.up.shape == (96, 64)
    assert weights.down.shape == (64, 96)
    bits = WEIGHT_FORMATS[reader.format].bits_per_weight
    assert weights.nbytes == 3 * 64 * 96 * bits / 8
