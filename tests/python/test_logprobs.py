"""Log probabilities of generated tokens and of prompts."""

import pytest
import tiny_models
import torch

from cpumoe.integrations.transformers import (
    ExpertsOptions,
    LanguageModel,
    perplexity,
    prompt_reading,
)
from cpumoe.text.generation import Prompt, Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_models.deepseek_v4(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(folder)
    options = ExpertsOptions(isa="generic")  # fp32 products
    return LanguageModel.from_pretrained(folder, options=options, dtype=torch.float32)


def logprobs_of(model, tokens):
    with torch.inference_mode():
        return model.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def test_generated_tokens_have_the_models_own_probabilities(model):
    prompt = model.encode("Once")
    sampling = Sampling(6, temperature=3.0, top_k=40, seed=1, logprobs=2, repetition_penalty=2.0)
    pieces = []
    result = model.generate(prompt, sampling, on_piece=pieces.append)
    ids = [token.token_id for token in result.logprobs]
    rows = logprobs_of(model, [*prompt.tokens, *ids])[len(prompt.tokens) - 1 : -1]
    for token, row in zip(result.logprobs, rows, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-3)
        best = row.topk(2)
        assert [other.token_id for other in token.top] == best.indices.tolist()
        assert [other.logprob for other in token.top] == pytest.approx(
            best.values.tolist(), abs=1e-3
        )
        assert token.raw.decode("utf-8", "replace") == token.text
    assert tuple(t for piece in pieces for t in piece.logprobs) == result.logprobs
    assert result.prompt_logprobs is None


def test_no_alternatives_are_given_unless_asked_for(model):
    prompt = model.encode("Once")
    result = model.generate(prompt, Sampling(2, temperature=0, logprobs=0))
    assert [token.top for token in result.logprobs] == [(), ()]
    assert model.generate(prompt, Sampling(2, temperature=0)).logprobs is None


def test_a_prompts_probabilities_are_those_of_its_perplexity(model):
    prompt = model.encode("In the beginning God created the heaven and the earth.")
    result = model.generate(prompt, Sampling(0, prompt_logprobs=1))
    first, *others = result.prompt_logprobs
    assert (first.logprob, first.token_id) == (None, prompt.tokens[0])
    assert [token.token_id for token in others] == [*prompt.tokens[1:]]
    expected = perplexity(model.model, prompt.tokens, window=len(prompt.tokens))
    mean = -sum(token.logprob for token in others) / len(others)
    assert mean == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert all(token.top[0].logprob >= token.logprob for token in others)
    assert (result.text, result.completion_tokens, result.finish_reason) == ("", 0, "length")


def test_a_long_prompts_logits_are_never_in_memory_together(model, monkeypatch):
    rows = []
    monkeypatch.setattr(prompt_reading, "_MOST_LOGITS", 16 * tiny_models.VOCABULARY)
    head = model.model.lm_head
    handle = head.register_forward_hook(lambda _, __, logits: rows.append(logits.shape[1]))
    prompt = model.encode("In the beginning God created the heaven and the earth.")
    try:
        parts = model.generate(prompt, Sampling(0, prompt_logprobs=0)).prompt_logprobs
    finally:
        handle.remove()
    assert max(rows) == 16
    rows = logprobs_of(model, prompt.tokens)
    for token, row in zip(parts[1:], rows, strict=False):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)


def test_prompt_and_text_in_one_request(model):
    prompt = model.encode("Once upon")
    plain = model.generate(prompt, Sampling(5, temperature=0, logprobs=0))
    both = model.generate(prompt, Sampling(5, temperature=0, logprobs=0, prompt_logprobs=0))
    assert [t.token_id for t in both.logprobs] == [t.token_id for t in plain.logprobs]
    assert both.text == plain.text
    assert len(both.prompt_logprobs) == len(prompt.tokens)


def test_a_prompt_that_fills_the_context_can_be_read(model):
    full = Prompt(tuple(5 + i % 250 for i in range(model.context_length)))
    result = model.generate(full, Sampling(0, prompt_logprobs=0))
    assert len(result.prompt_logprobs) == model.context_length
    with pytest.raises(ValueError, match="fewer tokens than the context"):
        model.generate(full, Sampling(1))


def test_a_token_that_is_part_of_a_character_has_its_bytes(model):
    prompt = model.encode("aé")
    first, *others = model.generate(prompt, Sampling(0, prompt_logprobs=0)).prompt_logprobs[-3:]
    assert (first.raw, first.text) == (b"a", "a")
    assert [token.raw for token in others] == [b"\xc3", b"\xa9"]
    assert [token.text for token in others] == 2 * ["\ufffd"]
