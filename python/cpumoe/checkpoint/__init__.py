"""Reads routed experts from checkpoint folders, lazily and without copies."""

from cpumoe.checkpoint.files import CheckpointError
from cpumoe.checkpoint.reader import ExpertReader, ExpertWeights, UnsupportedFormatError
from cpumoe.checkpoint.registry import open_checkpoint
from cpumoe.checkpoint.shards import SafetensorsFolder
from cpumoe.formats import QuantizedMatrix

__all__ = [
    "CheckpointError",
    "ExpertReader",
    "ExpertWeights",
    "QuantizedMatrix",
    "SafetensorsFolder",
    "UnsupportedFormatError",
    "open_checkpoint",
]
