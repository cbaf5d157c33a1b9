"""The small model that comes with cpumoe."""

from pathlib import Path

MODEL_NAME = "cpumoe-tiny"


def model_path() -> Path:
    """Returns its checkpoint folder."""
    return Path(__file__).parent / "model"
