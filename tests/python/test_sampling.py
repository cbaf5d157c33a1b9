"""Sampling beyond temperature and top_p, on a tiny model of one token per byte."""

import pytest
import tiny_models
import torch

from cpumoe.integrations.transformers import LanguageModel
from cpumoe.text.generation import ModelError, Sampling

END = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_models.gpt_oss(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(folder)
    return LanguageModel.from_pretrained(folder)


@pytest.fixture
def biased(model):
    """Makes tokens more or less probable than they are."""
    head = model.model.lm_head
    bias = torch.zeros(tiny_models.VOCABULARY)
    handle = head.register_forward_hook(lambda _, __, logits: logits + bias.to(logits.dtype))
    yield bias
    handle.remove()


def ask(model, text="In the beginning", **sampling):
    return model.generate(model.encode(text), Sampling(**{"max_new_tokens": 12, **sampling}))


def test_one_best_token_is_greedy(model):
    greedy = ask(model, temperature=0).text
    assert ask(model, temperature=1, top_k=1, seed=1).text == greedy
    assert ask(model, temperature=1, min_p=1, seed=1).text == greedy
    assert ask(model, temperature=1, top_k=0, min_p=0, seed=1).text != greedy


def test_all_tokens_may_be_drawn_unless_somebody_says_otherwise(model):
    # transformers' default is the 50 most probable tokens.
    handle = model.model.lm_head.register_forward_hook(lambda _, __, logits: logits * 0)
    try:
        result = ask(model, temperature=1, seed=1, max_new_tokens=200, ignore_eos=True, logprobs=0)
    finally:
        handle.remove()
    assert len({token.token_id for token in result.logprobs}) > 60


def test_a_penalty_ends_repetition(model, biased):
    biased[104], biased[105] = 50, 40
    repeated = ask(model, temperature=0, logprobs=0).logprobs
    varied = ask(model, temperature=0, logprobs=0, repetition_penalty=1.5).logprobs
    assert len({token.token_id for token in repeated}) == 1
    assert len({token.token_id for token in varied}) > 1


def test_the_end_waits_for_the_least_number_of_tokens(model, biased):
    biased[END] = 100
    assert ask(model, temperature=0).completion_tokens == 1
    later = ask(model, temperature=0, min_tokens=5)
    assert later.completion_tokens == 6
    assert later.finish_reason == "stop"


def test_end_tokens_can_be_ignored(model, biased):
    biased[END] = 100
    result = ask(model, temperature=0, ignore_eos=True)
    assert (result.completion_tokens, result.finish_reason) == (12, "length")
    assert result.text == ""
    shown = ask(model, temperature=0, ignore_eos=True, skip_special_tokens=False)
    assert shown.text == 12 * "</s>"


def test_asked_for_tokens_end_the_text(model):
    whole = ask(model, temperature=0, logprobs=0)
    end = whole.logprobs[7].token_id
    first = [token.token_id for token in whole.logprobs].index(end)
    result = ask(model, temperature=0, logprobs=0, stop_token_ids=(end,))
    assert (result.completion_tokens, result.finish_reason) == (first + 1, "stop")
    assert result.logprobs == whole.logprobs[: first + 1]
    # Before min_tokens, end tokens are not drawn and do not end the text.
    later = ask(model, temperature=0, logprobs=0, stop_token_ids=(end,), min_tokens=first + 1)
    assert end not in [token.token_id for token in later.logprobs[: first + 1]]
    with pytest.raises(ValueError, match="stop_token_ids: expected tokens from 0 to"):
        ask(model, stop_token_ids=(10**6,))


def test_a_stop_string_ends_the_text_at_its_last_token(model):
    whole = ask(model, temperature=0, logprobs=0)
    texts = [token.text for token in whole.logprobs]
    place = next(i for i in range(2, 12) if texts[i].isascii() and texts[i] not in texts[:i])
    result = ask(model, temperature=0, stop=(texts[place],))
    assert result.completion_tokens == place + 1
    unheard = ask(model, temperature=0, stop=(texts[place],), min_tokens=place + 1)
    assert unheard.completion_tokens > place + 1


def test_a_stop_string_that_is_a_special_token_ends_the_text(model, biased):
    user = model.tokenizer.convert_tokens_to_ids("<|user|>")
    biased[user] = 100
    result = ask(model, temperature=0, stop=("<|user|>",))
    assert (result.text, result.completion_tokens, result.finish_reason) == ("", 1, "stop")


def test_special_tokens_are_shown_on_demand(model, biased):
    biased[model.tokenizer.convert_tokens_to_ids("<|user|>")] = 100
    assert ask(model, temperature=0).text == ""
    assert ask(model, temperature=0, skip_special_tokens=False).text == 12 * "<|user|>"


def test_a_model_that_computes_no_numbers_is_at_fault(model, biased):
    biased[5] = torch.nan
    with pytest.raises(ModelError, match="computes NaN instead of probabilities"):
        ask(model, temperature=0)
