"""Which reader reads which checkpoint."""

from __future__ import annotations

import os

from cpumoe.checkpoint.compressed_tensors import CompressedTensorsReader
from cpumoe.checkpoint.config import parse_config
from cpumoe.checkpoint.deepseek_v4 import DeepseekV4Reader
from cpumoe.checkpoint.gpt_oss import GptOssReader
from cpumoe.checkpoint.reader import ExpertReader
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.checkpoint.unsupported import UnsupportedReader

# The first whose `matches` says yes. A new reader is one file and one row above the last.
READERS: tuple[type[ExpertReader], ...] = (
    DeepseekV4Reader,
    GptOssReader,
    CompressedTensorsReader,
    UnsupportedReader,
)


def open_checkpoint(path: str | os.PathLike[str]) -> ExpertReader:
    """Opens a checkpoint folder with the reader for its config.json and tensor names.

    A checkpoint whose experts are not supported opens too: its reader's `unsupported` says why, and
    its `expert` raises.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: no such folder, or it lacks config.json, index or weights.
        NotADirectoryError: `path` is a file.
        CheckpointError: malformed JSON, not an MoE model, sizes that are missing.
        ValueError: sizes that the format does not allow.
    """
    folder = SafetensorsFolder(path)
    config = parse_config(folder.config)
    reader = next(reader for reader in READERS if reader.matches(folder, config))
    return reader(folder, config)
