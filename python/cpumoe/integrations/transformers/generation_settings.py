"""What a checkpoint says about how it is to be sampled: read, checked and mapped once, at load."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

from cpumoe.checkpoint import CheckpointError
from cpumoe.checkpoint.files import CONFIG_LIMIT, read_json
from cpumoe.generation import LEAST_TEMPERATURE, ModelError
from cpumoe.integrations.transformers.host_processors import (
    PROCESSORS,
    Processor,
    Request,
    leaves_a_choice,
)
from cpumoe.integrations.transformers.vocabulary import Vocabulary

FILE = "generation_config.json"
# What would change the text, if this integration did it, and the values that ask for nothing.
_UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "token_healing": (False,),
    "watermarking_config": (),
    "max_time": (),
}


@dataclass(frozen=True)
class GenerationSettings:
    """How a model is sampled where a request does not say.

    Attributes:
        sample: draw tokens; False: take the best.
        temperature: divides the logits, at least `LEAST_TEMPERATURE`.
        top_k: choose from so many tokens; 0: from all.
        top_p: choose from the nucleus of this probability, above 0.
        min_p: choose from tokens this many times as probable as the best.
        repetition_penalty: above 0; 1: none.
        min_new_tokens: before these nothing ends the text.
        min_length: likewise, the prompt's tokens included.
        stop: strings that end the text.
        processors: names and values of the host's further logits processors.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    min_length: int = 0
    stop: tuple[str, ...] = ()
    processors: tuple[tuple[Processor, Any], ...] = ()


def read_generation_config(
    path: str | os.PathLike[str], origin: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Returns what a checkpoint's generation_config.json says; None: it has none.

    Args:
        path: a checkpoint folder, or a name on the hub.
        origin: further arguments that say where it is.

    Raises:
        ModelError: the file is no JSON object.
    """
    located = {name: value for name, value in origin.items() if name != "trust_remote_code"}
    file = cached_file(path, FILE, _raise_exceptions_for_missing_entries=False, **located)
    if file is None:
        return None
    try:
        return read_json(Path(file), CONFIG_LIMIT)
    except CheckpointError as error:
        raise ModelError(str(error)) from None


def host_generation_config(content: Mapping[str, Any]) -> Any:
    """Returns the host's form of a generation_config.json; one that it refuses gives its default.

    The host would refuse to load a model for values that `GenerationSettings` can do without.
    """
    try:
        return GenerationConfig.from_dict(dict(content))
    except (ValueError, TypeError, AttributeError):
        return GenerationConfig()


def generation_settings(content: Mapping[str, Any], vocabulary: int) -> GenerationSettings:
    """Returns the settings of a generation_config.json.

    What is out of its range or not supported is left out, and one warning lists it.

    Args:
        content: the file's.
        vocabulary: how many logits the model computes.

    Raises:
        ModelError: stop strings that are no strings: the text would go on where it should end.
    """
    problems: list[str] = []
    number = _Numbers(content, problems)
    sample = _flag(content, "do_sample", problems)
    temperature = number("temperature", 1.0, lambda x: 0 <= x <= 100, "0 to 100")
    top_p = number("top_p", 1.0, lambda x: 0 <= x <= 1, "0 to 1")
    settings = GenerationSettings(
        # A nucleus of nothing is the best token alone, as is the limit of low temperatures.
        sample=sample and temperature >= LEAST_TEMPERATURE and top_p > 0,
        temperature=max(temperature, LEAST_TEMPERATURE),
        top_k=max(0, number.count("top_k", least=-1)),
        top_p=top_p or 1.0,
        min_p=number("min_p", 0.0, lambda x: 0 <= x <= 1, "0 to 1"),
        repetition_penalty=number(
            "repetition_penalty", 1.0, lambda x: 0 < x <= 100, "above 0 and at most 100"
        ),
        min_new_tokens=number.count("min_new_tokens"),
        min_length=number.count("min_length"),
        stop=_stop_strings(content.get("stop_strings")),
        processors=tuple(_processors(content, vocabulary, problems)),
    )
    for name, neutral in _UNSUPPORTED.items():
        value = content.get(name)
        if value is not None and value not in neutral:
            problems.append(f"{name}: not supported, got {_short(value)}")
    if problems:
        warnings.warn(f"{FILE}: left out: {'; '.join(problems)}", stacklevel=2)
    return settings


def end_tokens(content: Mapping[str, Any], config: Any, vocabulary: Vocabulary) -> frozenset[int]:
    """Returns the tokens that end a text, as generation_config.json, config.json and tokenizer say.

    Args:
        content: generation_config.json's.
        config: the host's configuration of the text model.
        vocabulary: the tokenizer's.

    Raises:
        ModelError: token ids that are no integers.
    """
    named = _token_ids(FILE, content.get("eos_token_id"))
    configured = _token_ids("config.json", getattr(config, "eos_token_id", None))
    if named == configured:  # the host makes the one of the other where a file is missing
        named = frozenset()
    # Where config.json has none, the host fills in what its class was made with, whatever token
    # that is in this vocabulary.
    if vocabulary.end is not None:
        known = vocabulary.special | frozenset(vocabulary.added.values())
        configured -= _token_ids("config.json", type(config)().eos_token_id) - known
        configured |= {vocabulary.end}
    return named | configured


class _Numbers:
    """Reads numbers out of a generation config, and notes those that are out of range."""

    def __init__(self, content: Mapping[str, Any], problems: list[str]) -> None:
        self._content = content
        self._problems = problems

    def __call__(
        self, name: str, default: float, fits: Callable[[float], bool], expected: str
    ) -> float:
        value = self._content.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
            self._problems.append(f"{name}: expected {expected}, got {_short(value)}")
            return default
        return float(value)

    def count(self, name: str, *, least: int = 0) -> int:
        value = self(
            name, 0, lambda x: math.isfinite(x) and x == int(x) and x >= least, "0 or more"
        )
        return int(value)


def _flag(content: Mapping[str, Any], name: str, problems: list[str]) -> bool:
    value = content.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    problems.append(f"{name}: expected true or false, got {_short(value)}")
    return False


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value or []
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise ModelError(
            f"{FILE}: stop_strings: expected strings of at least one character, got {_short(value)}"
        )
    return tuple(strings)


def _processors(
    content: Mapping[str, Any], vocabulary: int, problems: list[str]
) -> list[tuple[Processor, Any]]:
    """Those of the host's further processors that are asked for, and work."""
    found = []
    request = Request(prompt_length=3, limit=8, ends=(0,))
    for processor in PROCESSORS:
        value = content.get(processor.name)
        if value is None or value in processor.neutral:
            continue
        try:
            works = leaves_a_choice(processor.make(value, request), vocabulary)
        except Exception as error:  # whatever the host makes of a value of any kind
            problems.append(f"{processor.name}: {error}, got {_short(value)}")
            continue
        if works:
            found.append((processor, value))
        else:
            problems.append(f"{processor.name}: no token is left to choose, got {_short(value)}")
    return found


def _token_ids(file: str, ids: Any) -> frozenset[int]:
    listed = [] if ids is None else ids if isinstance(ids, (list, tuple)) else [ids]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        raise ModelError(f"{file}: eos_token_id: expected token ids, got {_short(ids)}")
    return frozenset(listed)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
