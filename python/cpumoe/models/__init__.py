"""Known MoE models, and checkpoints with made-up weights in their native formats."""

from cpumoe.models.registry import MODELS, ModelSpec, find_model

__all__ = ["MODELS", "ModelSpec", "find_model"]
