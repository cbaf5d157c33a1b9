"""The model that comes with the package: a small DeepSeek-V4, trained on public-domain text.

The checkpoint is in DeepSeek-V4-Flash's native format, with MXFP4 experts and FP8 blocks.
``tools/embedded_model`` in the sources trains and exports it.
"""

from pathlib import Path

MODEL_NAME = "cpumoe-tiny"

_FOLDER = Path(__file__).parent


def model_path() -> Path:
    """Returns the checkpoint's folder: config, weights, tokenizer, chat template."""
    return _FOLDER / "model"


def held_out_path() -> Path:
    """Returns a text file that the model was not trained on; a blank line divides chapters."""
    return _FOLDER / "held_out.txt"
