"""Target over generation_config.json: a model with it loads or says why not, and then generates."""

import shutil
import tempfile
import warnings
from pathlib import Path

import tiny_models

from cpumoe.integrations.transformers import LanguageModel
from cpumoe.integrations.transformers.generation_settings import (
    FILE,
    host_generation_config,
    read_generation_config,
)
from cpumoe.text.generation import ModelError, Sampling

from .documents import json_bytes
from .target import Target, in_one_line

_SOUND = (
    {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"bos_token_id": 1, "eos_token_id": 2, "repetition_penalty": 1.1, "stop_strings": ["a"]},
    {"min_new_tokens": 2, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "typical_p": 0.9},
    {"suppress_tokens": [7], "begin_suppress_tokens": [8], "sequence_bias": [[[9], -1.0]]},
    {"num_beams": 4, "cache_implementation": "static", "forced_eos_token_id": 2, "min_p": 0.1},
    {"epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4, "exponential_decay_length_penalty": [1, 1.1]},
)


class GenerationConfig(Target):
    """generation_config.json."""

    def __init__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="cpumoe-fuzz-"))
        tiny_models.gpt_oss(self._folder)
        tiny_models.byte_tokenizer(self._folder)
        self._loaded = LanguageModel.from_pretrained(self._folder)

    def close(self):
        shutil.rmtree(self._folder)

    def strategy(self):
        return json_bytes(_SOUND)

    def check(self, data):
        (self._folder / FILE).write_bytes(data)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            try:
                content = read_generation_config(self._folder, {})
                host_generation_config(content)
                model = LanguageModel(
                    self._loaded.model, self._loaded.tokenizer, "tiny", generation_config=content
                )
            except ModelError as error:
                in_one_line(error)
                return
            result = model.generate(model.encode("Once"), Sampling(3, seed=1))
        assert result.completion_tokens <= 3
