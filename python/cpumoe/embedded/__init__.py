"""The small model that comes with cpumoe."""

from pathlib import Path

MODEL_NAME = "cpumoe-tiny"
_FOLDER = Path(__file__).parent / "model"


def model_path() -> Path:
    """Returns its checkpoint folder."""
    return _FOLDER


def held_out_path() -> Path:
    """Returns a text of the kind that it was trained on, but that it has not seen."""
    return _FOLDER.parent / "held_out.txt"
