"""A language model with a tokenizer of one token per byte."""

import runpy
from pathlib import Path

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import tokenization_utils_base

from cpumoe.integrations.transformers import LanguageModel, host_files
from cpumoe.integrations.transformers.detokenizer import Detokenizer
from cpumoe.text.generation import ModelError, Prompt, Sampling

TOOLS = Path(__file__).parents[2] / "tools"
GREEDY = Sampling(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_models.gpt_oss(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return LanguageModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_models.byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def greedy_tokens(model, prompt, count):
    never = torch.tensor([-1])
    ids = model.model.generate(
        torch.tensor([prompt.tokens]), max_new_tokens=count, do_sample=False, eos_token_id=never
    )
    return ids[0, len(prompt.tokens) :].tolist()


def test_prompts_become_tokens(model, folder):
    assert model.decode(model.encode("Hé?").tokens) == "Hé?"
    assert len(model.encode("Hé?").tokens) == 4
    assert model.name == folder.name
    assert model.context_length == 512
    assert LanguageModel.from_pretrained(folder, name="other").name == "other"


@pytest.mark.parametrize("host_experts", [False, True])
def test_model_files_are_checked_once(folder, monkeypatch, host_experts):
    checked = []
    check = host_files._check_weights
    monkeypatch.setattr(host_files, "_check_weights", lambda w: checked.append(w.path) or check(w))
    LanguageModel.from_pretrained(folder, host_experts=host_experts)
    assert checked == [folder]


def test_a_dtype_that_is_not_supported_is_refused_before_files_are_read():
    with pytest.raises(ValueError, match=r"dtype: expected torch\.bfloat16 or torch\.float32"):
        LanguageModel.from_pretrained("/no/such/model", dtype=torch.float16)


def test_chats_become_tokens(model):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    text = model.decode(model.encode_chat(messages).tokens)
    assert text == "<|system|>s<|user|>hi<|assistant|>"


def test_half_a_surrogate_pair_is_refused(model):
    with pytest.raises(ValueError, match=r"text: expected Unicode characters, got '\\udcff', half"):
        model.encode("a\udcff")
    with pytest.raises(ValueError, match="half a surrogate pair"):
        model.encode_chat([{"role": "user", "content": "\ud800"}])


def test_a_template_may_refuse_messages(model):
    with pytest.raises(ValueError, match="refuses these messages: unknown role tool"):
        model.encode_chat([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[0].content + 5 }}", "fails: can only concatenate str"),
        ("{{ nothing.at.all }}", "fails: 'nothing' is undefined"),
        ("{% for %}", "fails: "),
    ],
)
def test_a_template_that_always_breaks_is_the_models_fault(model, tokenizer, template, problem):
    broken = LanguageModel(model.model, tokenizer, "broken")
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=problem):
        broken.encode_chat([{"role": "user", "content": "hi"}])


def test_a_template_that_breaks_on_some_messages_refuses_them(model, tokenizer):
    some = LanguageModel(model.model, tokenizer, "some")
    tokenizer.chat_template = "{% for m in messages %}{{ 'a' + m.content }}{% endfor %}"
    assert some.decode(some.encode_chat([{"role": "user", "content": "hi"}]).tokens) == "ahi"
    with pytest.raises(ValueError, match="refuses these messages: can only concatenate str"):
        some.encode_chat([{"role": "user", "content": 5}])


def test_texts_beyond_the_context_are_encoded_without_a_warning(model, monkeypatch):
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    monkeypatch.setattr(model.tokenizer, "model_max_length", 4)
    assert len(model.encode("hello").tokens) == 5
    assert said == []


def test_a_model_without_chat_template_says_so(model, tokenizer):
    plain = LanguageModel(model.model, tokenizer, "plain")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="plain has no chat template, so it can"):
        plain.encode_chat([{"role": "user", "content": "hi"}])


def test_greedy_text_is_the_hosts(model):
    prompt = model.encode("In the beginning")
    pieces = []
    result = model.generate(prompt, GREEDY, on_piece=pieces.append)
    tokens = greedy_tokens(model, prompt, 24)
    end = tokens.index(2) if 2 in tokens else None
    assert result.text == model.tokenizer.decode(tokens[:end], skip_special_tokens=True)
    assert "".join(piece.text for piece in pieces) == result.text
    assert all(piece.tokens > 0 for piece in pieces)
    assert sum(piece.tokens for piece in pieces) <= result.completion_tokens
    assert result.prompt_tokens == len(prompt.tokens)
    assert result.completion_tokens == (24 if end is None else end + 1)
    assert result.finish_reason == ("length" if end is None else "stop")
    assert result.prefill_seconds > 0
    assert result.decode_seconds > 0
    assert 0 < result.experts_seconds < result.prefill_seconds + result.decode_seconds


def test_an_end_token_ends_the_text(model):
    prompt = model.encode("In the beginning")
    tokens = greedy_tokens(model, prompt, 24)
    end = tokens[9]
    first = tokens.index(end)
    configured = model.model.generation_config.eos_token_id
    model.model.generation_config.eos_token_id = [2, end]
    try:
        ending = LanguageModel(model.model, model.tokenizer, "ending")
        result = ending.generate(prompt, GREEDY)
    finally:
        model.model.generation_config.eos_token_id = configured
    assert result.finish_reason == "stop"
    assert result.completion_tokens == first + 1
    assert result.text == model.tokenizer.decode(tokens[:first], skip_special_tokens=True)


def test_a_stop_string_ends_the_text_and_is_not_shown(model):
    prompt = model.encode("In the beginning")
    whole = model.generate(prompt, GREEDY).text
    stop = whole[5:8]
    pieces = []
    result = model.generate(
        prompt, Sampling(24, temperature=0, stop=("never found", stop)), on_piece=pieces.append
    )
    assert result.text == whole[: whole.index(stop)]
    assert "".join(piece.text for piece in pieces) == result.text
    assert result.finish_reason == "stop"
    assert result.completion_tokens < 24


def test_what_might_have_been_a_stop_string_is_shown_in_the_end(model):
    prompt = model.encode("In the beginning")
    whole = model.generate(prompt, GREEDY).text
    stop = whole[-2:] + "and more"
    assert model.generate(prompt, Sampling(24, temperature=0, stop=(stop,))).text == whole


def test_a_seed_repeats_the_text_and_leaves_torchs_generator_alone(model):
    prompt = model.encode("Once")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    texts = [model.generate(prompt, Sampling(24, temperature=1, seed=s)).text for s in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.rand(1), expected)


def test_a_temperature_may_be_an_integer(model):
    texts = [
        model.generate(model.encode("Once"), Sampling(8, temperature=t, seed=1)).text
        for t in (2, 2.0)
    ]
    assert texts[0] == texts[1]


def test_a_small_nucleus_is_greedy(model):
    prompt = model.encode("A day")
    nucleus = model.generate(prompt, Sampling(24, temperature=1, top_p=1e-6, seed=1)).text
    assert nucleus == model.generate(prompt, GREEDY).text


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-6, 1e-5])
def test_the_lowest_temperatures_are_greedy(model, temperature):
    prompt = model.encode("A day")
    text = model.generate(prompt, Sampling(24, temperature=temperature, seed=1)).text
    assert text == model.generate(prompt, GREEDY).text


def test_cancelling(model):
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) == 3

    result = model.generate(model.encode("Once"), GREEDY, cancelled=cancelled)
    assert result.finish_reason == "cancelled"
    assert result.completion_tokens == 3


def test_an_error_of_the_listener_reaches_the_caller(model):
    def refuse(piece):
        raise BrokenPipeError(piece)

    with pytest.raises(BrokenPipeError):
        model.generate(model.encode("Once"), GREEDY, on_piece=refuse)
    assert model.generate(model.encode("Once"), GREEDY).text  # the model can still be used


def test_the_context_is_the_limit(model):
    prompt = model.encode("x" * 508)
    result = model.generate(prompt, Sampling(temperature=0))
    assert result.completion_tokens <= 4
    with pytest.raises(ValueError, match="fewer tokens than the context of 512, got 512"):
        model.generate(model.encode("x" * 512), GREEDY)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(Prompt(()), GREEDY)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_that_the_model_does_not_have_are_refused(model, token):
    with pytest.raises(ValueError, match="expected tokens from 0 to"):
        model.generate(Prompt((1, token)), GREEDY)


def test_the_profile_of_decoding(folder):
    profile = runpy.run_path(str(TOOLS / "decode_profile.py"))["profile"]
    found = profile(LanguageModel.from_pretrained(folder), "Once", 4)
    assert (found["tokens"], found["layers"]) == (4, tiny_models.LAYERS)
    assert found["dispatch_us_per_call"] > 0
    assert found["kernels_us_per_call"] + found["python_us_per_call"] > 0
    assert 0 < found["experts_share"] < 1


@given(st.text(min_size=1, max_size=40))
@settings(deadline=None)
def test_detokenized_pieces_add_up(tokenizer, text):
    detokenizer = Detokenizer(tokenizer, tokenizer.all_special_ids)
    pieces = [detokenizer.feed(token) for token in tokenizer(text)["input_ids"]]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == text
    # No piece ends inside a character.
    assert all("\N{REPLACEMENT CHARACTER}" not in p for p in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 261), max_size=30))
@settings(deadline=None)
def test_detokenized_bytes_that_are_no_text_add_up_too(tokenizer, tokens):
    detokenizer = Detokenizer(tokenizer, tokenizer.all_special_ids)
    pieces = [detokenizer.feed(token) for token in tokens]
    text = "".join([*pieces, detokenizer.flush()])
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    # For bytes that are no text, the number of replacement characters is not fixed.
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")
