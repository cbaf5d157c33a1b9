"""A checkpoint's settings of sampling, read and checked once when the model is loaded."""

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
from cpumoe.integrations.transformers.host_processors import (
    PROCESSORS,
    Processor,
    Request,
    leaves_a_choice,
)
from cpumoe.integrations.transformers.vocabulary import Vocabulary
from cpumoe.text.generation import LEAST_TEMPERATURE, ModelError

FILE = "generation_config.json"
# Settings that are not supported though they change the text, and their values without effect.
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
    """A model's defaults of sampling, for requests that leave the choice to the model.

    Attributes:
        sample: whether tokens are drawn; False: the most probable one is taken.
        temperature: divides the logits, at least `LEAST_TEMPERATURE`.
        top_k: sample from this many most probable tokens; 0: from all.
        top_p: sample from the most probable tokens that together have this probability, above 0.
        min_p: sample from tokens at least this many times as probable as the most probable one.
        repetition_penalty: above 0; 1: no penalty.
        min_new_tokens: before this many new tokens, nothing ends the text.
        min_length: before this many tokens, including the prompt's, nothing ends the text.
        stop: strings that end the text.
        processors: transformers' further logits processors, with their values.
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
    """Returns the content of a checkpoint's generation_config.json; None: there is no such file.

    Args:
        path: a checkpoint folder, or a name on the hub.
        origin: further arguments that locate the checkpoint.

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
    """Returns a generation_config.json as transformers' class, or its default for invalid content.

    Otherwise transformers would refuse to load the model because of values that
    `GenerationSettings` does not need.
    """
    try:
        return GenerationConfig.from_dict(dict(content))
    except (ValueError, TypeError, AttributeError):
        return GenerationConfig()


def generation_settings(content: Mapping[str, Any], vocabulary: int) -> GenerationSettings:
    """Returns the settings in a generation_config.json.

    Settings that are out of range or not supported are left out, and one warning lists them.

    Args:
        content: content of the file.
        vocabulary: number of logits that the model computes.

    Raises:
        ModelError: the stop strings are invalid. Leaving them out would make texts too long.
    """
    problems: list[str] = []
    number = _Numbers(content, problems)
    sample = _flag(content, "do_sample", problems)
    temperature = number("temperature", 1.0, lambda x: 0 <= x <= 100, "0 to 100")
    top_p = number("top_p", 1.0, lambda x: 0 <= x <= 1, "0 to 1")
    settings = GenerationSettings(
        # top_p 0 and very low temperatures leave only the most probable token.
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
        warnings.warn(f"{FILE}: these settings are left out: {'; '.join(problems)}", stacklevel=2)
    return settings


def end_tokens(content: Mapping[str, Any], config: Any, vocabulary: Vocabulary) -> frozenset[int]:
    """Returns the tokens that end a text, by generation_config.json, config.json and tokenizer.

    Args:
        content: content of generation_config.json.
        config: transformers' configuration of the text model.
        vocabulary: the tokens of the tokenizer.

    Raises:
        ModelError: a token id is no integer.
    """
    named = _token_ids(FILE, content.get("eos_token_id"))
    configured = _token_ids("config.json", getattr(config, "eos_token_id", None))
    if named == configured:  # transformers makes one from the other if a file is missing
        named = frozenset()
    # If config.json has no end token, transformers fills in the default of the model's class, which
    # may be any token in this vocabulary.
    if vocabulary.end is not None:
        known = vocabulary.special | frozenset(vocabulary.added.values())
        configured -= _token_ids("config.json", type(config)().eos_token_id) - known
        configured |= {vocabulary.end}
    return named | configured


class _Numbers:
    """Reads numbers from a generation config, and notes those that are out of range."""

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
    """Returns transformers' further processors that the config requests and that work."""
    found = []
    request = Request(prompt_length=3, limit=8, ends=(0,))
    for processor in PROCESSORS:
        value = content.get(processor.name)
        if value is None or value in processor.neutral:
            continue
        if _has_booleans(value):  # Python and transformers count them as the tokens 0 and 1
            problems.append(f"{processor.name}: expected numbers, got {_short(value)}")
            continue
        try:
            works = leaves_a_choice(processor.make(value, request), vocabulary)
        except Exception as error:  # transformers may raise anything for a wrong value
            problems.append(f"{processor.name}: {error}, got {_short(value)}")
            continue
        if works:
            found.append((processor, value))
        else:
            problems.append(f"{processor.name}: it forbids all tokens, got {_short(value)}")
    return found


def _has_booleans(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_has_booleans, value))
    return isinstance(value, bool)


def _token_ids(file: str, ids: Any) -> frozenset[int]:
    listed = [] if ids is None else ids if isinstance(ids, (list, tuple)) else [ids]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
        raise ModelError(f"{file}: eos_token_id: expected token ids, got {_short(ids)}")
    return frozenset(listed)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
