"""Which reader reads which checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cpumoe.checkpoint.compressed_tensors import CompressedTensorsReader
from cpumoe.checkpoint.config import parse_config
from cpumoe.checkpoint.deepseek_v4 import DeepseekV4Reader
from cpumoe.checkpoint.gpt_oss import GptOssReader, OriginalGptOssReader
from cpumoe.checkpoint.reader import ExpertReader
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.checkpoint.unsupported import UnsupportedReader

# The first whose `matches` says yes. A new reader is one file and one row above the last.
READERS: tuple[type[ExpertReader], ...] = (
    DeepseekV4Reader,
    GptOssReader,
    OriginalGptOssReader,
    CompressedTensorsReader,
    UnsupportedReader,
)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    files: Sequence[str | os.PathLike[str]] | None = None,
) -> ExpertReader:
    """Opens a checkpoint folder with the reader for its config.json and tensor names.

    Weights come from the files that transformers would take: the one that config.json's
    ``transformers_weights`` names, else model.safetensors, else model.safetensors.index.json.

    A checkpoint whose experts are not supported opens too: its reader's `unsupported` says why, and
    its `expert` raises.

    Args:
        path: the folder.
        variant: of the weights, as in transformers' `from_pretrained`: the ``fp16`` of
            ``model.fp16.safetensors``.
        files: the safetensors files that hold the weights, for a caller who knows them better.

    Raises:
        FileNotFoundError: no such folder, or it lacks config.json, index or weights.
        NotADirectoryError: `path` is a file.
        CheckpointError: malformed JSON, not an MoE model, sizes that are missing, weights of which
            more than the folder decides which count.
        ValueError: sizes that the format does not allow.
    """
    folder = SafetensorsFolder(path, variant=variant, files=files)
    config = parse_config(folder.config)
    reader = next(reader for reader in READERS if reader.matches(folder, config))
    return reader(folder, config)
