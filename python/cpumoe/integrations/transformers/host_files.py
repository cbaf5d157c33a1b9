"""The files that the host reads, checked before it does: what is wrong then has a file's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpumoe.checkpoint import ExpertReader, open_checkpoint
from cpumoe.checkpoint.weight_files import CONFIG_NAME, EXPLICIT_KEY


def open_resolved(files: Sequence[str], config: Any) -> ExpertReader:
    """Opens the experts in the files that the host has resolved, and reads all of their headers.

    Args:
        files: what the host calls ``checkpoint_files``.
        config: the model's.

    Raises:
        FileNotFoundError: no config.json beside the files.
        CheckpointError, ValueError: see `open_checkpoint`.
    """
    first, explicit = Path(files[0]), getattr(config, EXPLICIT_KEY, None)
    for folder in first.parents:
        # Names of weights may contain folders; the config lies where those names begin.
        if explicit is not None:
            begins = (folder / explicit).is_file()
        else:
            begins = folder == first.parent or any(folder.glob("model.safetensors.index*.json"))
        if begins and (folder / CONFIG_NAME).is_file():
            return open_checkpoint(folder, files=files)
    raise FileNotFoundError(f"{first}: expected a {CONFIG_NAME} beside the weights, found none")
