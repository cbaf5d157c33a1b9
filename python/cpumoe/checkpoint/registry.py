"""Chooses the reader for a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cpumoe.checkpoint.compressed_tensors import CompressedTensorsReader
from cpumoe.checkpoint.config import parse_config
from cpumoe.checkpoint.deepseek_v4 import DeepseekV4Reader
from cpumoe.checkpoint.fp8 import Fp8Reader
from cpumoe.checkpoint.gpt_oss import GptOssReader, OriginalGptOssReader
from cpumoe.checkpoint.modelopt import ModelOptReader
from cpumoe.checkpoint.published import PublishedReader
from cpumoe.checkpoint.reader import ExpertReader
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.checkpoint.unsupported import UnsupportedReader

# The first reader whose `matches` is true is used. A new reader goes above the last row.
READERS: tuple[type[ExpertReader], ...] = (
    DeepseekV4Reader,
    GptOssReader,
    OriginalGptOssReader,
    PublishedReader,
    Fp8Reader,
    ModelOptReader,
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

    Weights come from the files that transformers would use: the one that ``transformers_weights``
    in config.json names, else model.safetensors, else model.safetensors.index.json.

    A checkpoint whose experts are not supported can be opened as well. The reader's `unsupported`
    has the reasons, and `expert` raises.

    Args:
        path: the folder.
        variant: the weights' variant, as in transformers' `from_pretrained`: ``fp16`` in
            ``model.fp16.safetensors``.
        files: the safetensors files that hold the weights, instead of those above.

    Raises:
        FileNotFoundError: the folder does not exist, or it has no config.json, index or weights.
        NotADirectoryError: `path` is a file.
        TypeError: `path` is no str and no path.
        CheckpointError: JSON is malformed, the model is no MoE model, sizes are missing, or not the
            folder alone decides which weights are used.
        ValueError: `path` is empty, or the format does not allow a size.
    """
    folder = SafetensorsFolder(path, variant=variant, files=files)
    config = parse_config(folder.config)
    reader = next(reader for reader in READERS if reader.matches(folder, config))
    return reader.open(folder, config)
