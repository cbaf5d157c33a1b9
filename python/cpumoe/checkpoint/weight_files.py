"""Finds the files of a folder that hold a checkpoint's weights.

Files are preferred in the order of transformers 5.23
(`modeling_utils._get_resolved_checkpoint_files`), so that experts come from the files from which
transformers takes the other weights. A folder is refused if its content alone does not decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cpumoe.checkpoint.files import (
    INDEX_LIMIT,
    CheckpointError,
    check_name,
    read_json,
    shown,
    shown_value,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

SHARD_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
# The key of config.json whose file is preferred to all others.
EXPLICIT_KEY = "transformers_weights"
# Names of files of distributed training, which transformers prefers to all others.
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def is_index(file: str) -> bool:
    """Whether a file of weights is an index of shards."""
    return file.endswith(".json")


def weights_file(folder: Path, config: Mapping[str, Any], variant: str | None) -> str:
    """Returns the file that holds the weights, or the index of the files that do.

    Args:
        folder: the checkpoint's folder.
        config: the content of config.json.
        variant: as in transformers' `from_pretrained`: ``fp16`` in ``model.fp16.safetensors``.

    Returns:
        The name, relative to the folder.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the folder alone does not decide, or the file lies outside.
    """
    _check_unambiguous(folder, config)
    explicit = config.get(EXPLICIT_KEY)
    if explicit is not None:
        return _explicit_file(folder, explicit)
    names = [_with_variant(name, variant) for name in (SINGLE_NAME, INDEX_NAME)]
    for name in names:
        if (folder / name).is_file():
            return name
    raise FileNotFoundError(
        f"{folder}: not a checkpoint: it has neither {names[0]} nor {names[1]}{_others(folder)}"
    )


def read_index(folder: Path, file: str) -> tuple[Mapping[str, str], Any]:
    """Reads an index.

    Args:
        folder: the checkpoint's folder.
        file: the index, relative to the folder.

    Returns:
        The shard of each tensor, relative to the folder, and the index's ``metadata``.

    Raises:
        CheckpointError: the file is no such index.
    """
    path = folder / file
    content = read_json(path, INDEX_LIMIT)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{path}: weight_map: expected an object, got {shown_value(weight_map)}"
        )
    shards: set[str] = set()
    for name, shard in weight_map.items():
        check_name(name, path)
        if not isinstance(shard, str) or (shard not in shards and not _is_shard(shard)):
            raise CheckpointError(
                f"{path}: weight_map: {shown(name)}: expected the name of a {SHARD_SUFFIX} file in "
                f"the folder, got {shown_value(shard)}"
            )
        shards.add(shard)
    return weight_map, content.get("metadata")


def _check_unambiguous(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("configuration_files"):
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: configuration_files: expected one config.json for all "
            f"versions of transformers, got several; remove the entry"
        )
    distributed = next((p.name for p in folder.iterdir() if _DISTRIBUTED.match(p.name)), None)
    if distributed is not None:
        raise CheckpointError(
            f"{folder / distributed}: part of a checkpoint of distributed training, which "
            f"transformers prefers to all other files; expected {SINGLE_NAME} or {INDEX_NAME}"
        )


def _explicit_file(folder: Path, file: Any) -> str:
    key = f"{folder / CONFIG_NAME}: {EXPLICIT_KEY}"
    if not isinstance(file, str) or not (
        _is_inside(file) and file.endswith((SHARD_SUFFIX, _INDEX_SUFFIX))
    ):
        raise CheckpointError(
            f"{key}: expected a file in the folder that ends in {SHARD_SUFFIX} or {_INDEX_SUFFIX}, "
            f"got {shown_value(file)}"
        )
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{key}: {shown(file)} is missing")
    return file


def _is_shard(name: str) -> bool:
    return name.endswith(SHARD_SUFFIX) and _is_inside(name)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        name.isprintable()
        and not path.is_absolute()
        and ".." not in path.parts
        and all(0 < len(part.encode()) <= 255 for part in path.parts)
    )


def _with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _others(folder: Path) -> str:
    """Returns a text that lists other files of weights in the folder."""
    patterns = ("*.safetensors", f"*{_INDEX_SUFFIX[:-5]}*.json", "*.bin", "*.gguf", "*.pt", "*.pth")
    found = sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
    if not found:
        return ""
    more = "" if len(found) <= 3 else f" and {len(found) - 3} more"
    return f"; it has {', '.join(map(shown, found[:3]))}{more}"
