"""The old name of `cpumoe.text.generation`, which still works and warns."""

from __future__ import annotations

from cpumoe._base.renamed import warn_renamed
from cpumoe.text import generation as _generation


def __getattr__(name: str) -> object:
    value: object = getattr(_generation, name)
    if not name.startswith("_"):
        warn_renamed("cpumoe.generation", "cpumoe.text.generation", stacklevel=2)
    return value
