"""generation_config.json: supported settings, those left out with a warning, and errors."""

import contextlib
import json
import warnings

import pytest
import tiny_models

from cpumoe.checkpoint import CheckpointError
from cpumoe.integrations.transformers import LanguageModel
from cpumoe.integrations.transformers.generation_settings import end_tokens
from cpumoe.integrations.transformers.vocabulary import Vocabulary
from cpumoe.text.generation import ModelError, Sampling

SEEDED = Sampling(16, seed=3)
BRIEF = Sampling(6, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_models.gpt_oss(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return LanguageModel.from_pretrained(folder)


@contextlib.contextmanager
def told():
    """Collects warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        messages = []
        yield messages
        messages += [str(warning.message) for warning in caught]


def with_config(loaded, **content):
    """Returns the model of a checkpoint with this generation_config.json, and warnings."""
    with told() as messages:
        model = LanguageModel(
            loaded.model, loaded.tokenizer, "tiny", generation_config={"eos_token_id": 2, **content}
        )
    return model, messages


def answer(model, sampling=SEEDED):
    return model.generate(model.encode("Once"), sampling)


@pytest.fixture(scope="module")
def plain(loaded):
    """A model without settings."""
    return with_config(loaded)[0]


@pytest.fixture(scope="module")
def plain_text(plain):
    """Its brief answer."""
    return answer(plain, BRIEF).text


def same(loaded, config, **sampling):
    """Whether a model's defaults equal a request to a model without settings."""
    model, messages = with_config(loaded, **config)
    plain, _ = with_config(loaded)
    asked = Sampling(16, seed=3, **sampling)
    return not messages and answer(model).text == answer(plain, asked).text


def test_values_mean_what_they_mean_in_a_request(loaded):
    drawn = {"do_sample": True}
    assert same(loaded, {}, temperature=0)
    assert same(loaded, drawn, temperature=1)
    assert same(loaded, {**drawn, "temperature": 0.0}, temperature=0)
    assert same(loaded, {**drawn, "temperature": 2}, temperature=2)
    assert same(loaded, {**drawn, "top_k": -1}, temperature=1, top_k=0)
    assert same(loaded, {**drawn, "top_k": 0}, temperature=1)
    assert same(loaded, {**drawn, "top_k": 3}, temperature=1, top_k=3)
    assert same(loaded, {**drawn, "top_p": 0.0}, temperature=0)
    assert same(loaded, {**drawn, "top_p": 0.3}, temperature=1, top_p=0.3)
    assert same(loaded, {**drawn, "min_p": 0.5}, temperature=1, min_p=0.5)
    assert same(loaded, {"repetition_penalty": 3.0}, temperature=0, repetition_penalty=3)
    assert same(loaded, {"min_new_tokens": 12}, temperature=0, min_tokens=12)
    assert same(loaded, {"min_length": 16}, temperature=0, min_tokens=12)
    # Without do_sample, transformers takes the most probable token at any temperature.
    assert same(loaded, {"temperature": 0.7, "top_p": 0.9}, temperature=0)


def test_a_request_goes_before_the_models_settings(loaded):
    config = {"do_sample": True, "temperature": 3.0, "top_k": 1, "repetition_penalty": 5.0}
    model, _ = with_config(loaded, **config)
    plain, _ = with_config(loaded)
    asked = Sampling(16, temperature=1, top_k=0, repetition_penalty=1, seed=1)
    assert answer(model, asked).text == answer(plain, asked).text


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_beams": 4}, "num_beams: not supported, got 4"),
        ({"num_beams": 4, "num_return_sequences": 4}, "num_return_sequences: not supported"),
        ({"num_return_sequences": 3}, "num_return_sequences: not supported, got 3"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected above 0 and at most 100, got 0"),
        ({"temperature": -1.0}, "temperature: expected 0 to 100, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 to 100, got NaN"),
        ({"temperature": "0.7"}, 'temperature: expected 0 to 100, got "0.7"'),
        ({"top_p": 1.5}, "top_p: expected 0 to 1, got 1.5"),
        ({"top_k": -5}, "top_k: expected 0 or more, got -5"),
        ({"top_k": 2.5}, "top_k: expected 0 or more, got 2.5"),
        ({"min_p": 2}, "min_p: expected 0 to 1, got 2"),
        ({"min_new_tokens": "many"}, "min_new_tokens: expected 0 or more"),
        ({"do_sample": "yes"}, 'do_sample: expected true or false, got "yes"'),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: not supported, got 0.6"),
        ({"dola_layers": "high"}, "dola_layers: not supported"),
        ({"guidance_scale": 1.5}, "guidance_scale: not supported"),
        ({"constraints": [1]}, "constraints: not supported"),
        ({"force_words_ids": [[5]]}, "force_words_ids: not supported"),
        ({"encoder_repetition_penalty": 2.0}, "encoder_repetition_penalty: not supported"),
        ({"typical_p": 0}, "typical_p: "),
        ({"eta_cutoff": 5}, "eta_cutoff: "),
        ({"epsilon_cutoff": "x"}, "epsilon_cutoff: "),
        ({"bad_words_ids": [5]}, "bad_words_ids: "),
        ({"bad_words_ids": [[10**6]]}, "bad_words_ids: "),
        ({"bad_words_ids": [[False]]}, "bad_words_ids: expected numbers, got [[false]]"),
        ({"sequence_bias": [[[5], True]]}, "sequence_bias: expected numbers"),
        ({"no_repeat_ngram_size": True}, "no_repeat_ngram_size: expected numbers, got true"),
        ({"suppress_tokens": "none"}, "suppress_tokens: "),
        ({"suppress_tokens": [*range(288)]}, "suppress_tokens: it forbids all tokens"),
        ({"forced_eos_token_id": 10**6}, "forced_eos_token_id: "),
        ({"sequence_bias": 3}, "sequence_bias: "),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_left_out_and_told_once(loaded, plain_text, config, problem):
    model, messages = with_config(loaded, **config)
    assert len(messages) == 1
    assert messages[0].startswith("generation_config.json: these settings are left out: ")
    assert problem in messages[0]
    assert "\n" not in messages[0]
    with told() as later:
        assert answer(model, BRIEF).text == plain_text
    assert later == []


@pytest.mark.parametrize(
    "config",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "nonsense"},
        {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
        {"use_cache": False},
        {"max_length": 3},
        {"max_new_tokens": 2},
        {"output_scores": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"num_assistant_tokens": 3, "assistant_early_exit": 1},
        {"pad_token_id": -1},
        {"pad_token_id": "<pad>"},
        {"max_new_tokens": 0},
        {"prefill_chunk_size": 1},
        {"early_stopping": "perhaps"},
        {"streamer": True},
        {"unknown": [1]},
        {"typical_p": 1.0, "no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "num_beams": 1},
        {"bad_words_ids": None, "stop_strings": None, "suppress_tokens": []},
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_does_not_change_the_text_is_passed_over(loaded, plain_text, config):
    model, messages = with_config(loaded, **config)
    assert messages == []
    assert answer(model, BRIEF).text == plain_text


def test_the_hosts_further_processors_work(loaded):
    plain = answer(with_config(loaded)[0], Sampling(16, logprobs=0))
    tokens = [token.token_id for token in plain.logprobs]
    suppressed, _ = with_config(loaded, suppress_tokens=[tokens[0]])
    assert tokens[0] not in chosen(suppressed)
    begin, _ = with_config(loaded, begin_suppress_tokens=[tokens[0]])
    assert chosen(begin)[0] != tokens[0]
    bad, _ = with_config(loaded, bad_words_ids=[[tokens[0]]])
    assert tokens[0] not in chosen(bad)
    forced, _ = with_config(loaded, forced_eos_token_id=2, eos_token_id=2)
    assert chosen(forced)[-1] == 2
    unlike, _ = with_config(loaded, no_repeat_ngram_size=1)
    assert len(set(chosen(unlike))) == len(chosen(unlike))


def chosen(model):
    return [token.token_id for token in answer(model, Sampling(16, logprobs=0)).logprobs]


def test_stop_strings_end_the_text(loaded):
    whole = answer(with_config(loaded)[0]).text
    for stop in (whole[4:6], [whole[4:6]]):
        model, messages = with_config(loaded, stop_strings=stop)
        result = answer(model)
        assert messages == []
        assert (result.text, result.finish_reason) == (whole[: whole.index(whole[4:6])], "stop")
    with pytest.raises(ModelError, match="stop_strings: expected strings"):
        with_config(loaded, stop_strings=[5])


@pytest.mark.parametrize("ends", ["</s>", [2, "x"], 2.5, True])
def test_end_tokens_that_are_no_tokens_are_the_models_fault(loaded, ends):
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id: expected token"):
        with_config(loaded, eos_token_id=ends)


def ends_at(model, token):
    """Whether the text ends at a token that the model is made to choose."""
    head = model.model.lm_head

    def prefer(_, __, logits):
        logits = logits.clone()
        logits[..., token] = 1000
        return logits

    handle = head.register_forward_hook(prefer)
    try:
        return answer(model, Sampling(4, temperature=0)).finish_reason == "stop"
    finally:
        handle.remove()


@pytest.fixture
def copied(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def rewrite(folder, name, content):
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_an_end_token_that_only_the_tokenizer_names_ends_the_text(copied):
    config = json.loads((copied / "config.json").read_text())
    rewrite(copied, "config.json", {**config, "eos_token_id": None})
    rewrite(copied, "generation_config.json", {})
    assert ends_at(LanguageModel.from_pretrained(copied), 2)
    rewrite(copied, "generation_config.json", None)
    assert ends_at(LanguageModel.from_pretrained(copied), 2)


def test_end_tokens_of_all_files_end_the_text(copied):
    config = json.loads((copied / "config.json").read_text())
    rewrite(copied, "config.json", {**config, "eos_token_id": 4})
    rewrite(copied, "generation_config.json", {"eos_token_id": [5, 10**9]})
    model = LanguageModel.from_pretrained(copied)
    assert [token for token in range(8) if ends_at(model, token)] == [2, 4, 5]


class HostConfig:
    """A configuration of transformers whose class has an end token."""

    def __init__(self, eos_token_id=40):
        self.eos_token_id = eos_token_id


@pytest.mark.parametrize(
    ("content", "configured", "expected"),
    [
        ({}, None, {2}),
        ({}, 40, {2}),  # a letter in this vocabulary, which no file may have named
        ({}, 41, {2, 41}),
        ({}, [4, 5], {2, 4, 5}),
        ({"eos_token_id": [6, 7]}, 40, {2, 6, 7}),
        ({"eos_token_id": 2}, 2, {2}),
        ({"eos_token_id": 40}, 40, {2}),
        ({"eos_token_id": [40, 41]}, 40, {2, 40, 41}),
    ],
)
def test_an_end_token_that_only_the_hosts_class_names_is_an_ordinary_one(
    loaded, content, configured, expected
):
    vocabulary = Vocabulary(loaded.tokenizer)
    assert end_tokens(content, HostConfig(configured), vocabulary) == expected


def test_without_a_tokenizers_end_the_hosts_class_is_believed(loaded):
    vocabulary = Vocabulary(loaded.tokenizer)
    vocabulary.end = None
    assert end_tokens({}, HostConfig(), vocabulary) == {40}


def test_a_file_that_the_host_refuses_does_not_keep_a_model_from_loading(copied):
    rewrite(copied, "generation_config.json", {"cache_implementation": "nonsense", "num_beams": 2})
    with told() as messages:
        model = LanguageModel.from_pretrained(copied)
    assert [m for m in messages if "num_beams" in m]
    assert ends_at(model, 2)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_file_that_is_no_json_is_refused_by_name(copied, text):
    rewrite(copied, "generation_config.json", "")
    (copied / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: (malformed|expected a) JSON"
    ):
        LanguageModel.from_pretrained(copied)


def test_generation_settings_in_config_json_are_no_fault(copied):
    config = json.loads((copied / "config.json").read_text())
    rewrite(copied, "config.json", {**config, "temperature": 0.5, "num_beams": 1, "top_k": 5})
    rewrite(copied, "generation_config.json", None)
    assert answer(LanguageModel.from_pretrained(copied)).completion_tokens > 0


def test_what_the_host_refuses_while_generating_is_the_models_fault(loaded, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no such thing")

    monkeypatch.setattr(loaded.model, "generate", refuse, raising=False)
    with pytest.raises(ModelError, match="the model cannot generate: no such thing"):
        answer(loaded)


def test_a_value_error_of_the_listener_stays_one(loaded):
    def refuse(_):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        loaded.generate(loaded.encode("Once"), SEEDED, on_piece=refuse)


def test_the_models_own_settings_are_left_as_they_are(loaded):
    before = loaded.model.generation_config
    answer(loaded)
    assert loaded.model.generation_config is before
