"""The model that is part of the package: a small DeepSeek-V4, trained on public-domain text.

Its checkpoint has DeepSeek-V4-Flash's native format: MXFP4 experts, FP8 blocks. How it was made:
``tools/embedded_model`` in the sources.
"""

from pathlib import Path

MODEL_NAME = "cpumoe-tiny"

_FOLDER = Path(__file__).parent


def model_path() -> Path:
    """Returns the checkpoint's folder: config, weights, tokenizer, chat template."""
    return _FOLDER / "model"


def held_out_path() -> Path:
    """Returns a text that it was not trained on: chapters, a blank line between two."""
    return _FOLDER / "held_out.txt"
