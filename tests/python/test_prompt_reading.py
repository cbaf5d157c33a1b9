"""Long prompts are read in parts, and reading may be cancelled between them."""

import pytest
import tiny_models
import torch

from cpumoe.integrations.transformers import ExpertsOptions, LanguageModel, prompt_reading
from cpumoe.text.generation import Prompt, Sampling

PART = 24
PROMPT = Prompt(tuple(5 + (i * i) % 250 for i in range(4 * PART + 5)))


@pytest.fixture(scope="module", params=[*tiny_models.FAMILIES])
def model(request, tmp_path_factory):
    folder = tiny_models.FAMILIES[request.param].write(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(folder)
    options = ExpertsOptions(isa="generic")  # fp32 products
    return LanguageModel.from_pretrained(folder, options=options, dtype=torch.float32)


@pytest.fixture
def parts(model, monkeypatch):
    """Makes parts short; returns the lengths of the model's inputs."""
    lengths = []
    monkeypatch.setattr(prompt_reading, "PART_TOKENS", PART)
    embedding = model.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, ids, __: lengths.append(ids[0].shape[-1]))
    yield lengths
    handle.remove()


def ask(model, length, **more):
    sampling = Sampling(8, temperature=0, repetition_penalty=1.1, logprobs=0)
    return model.generate(Prompt(PROMPT.tokens[:length]), sampling, **more)


@pytest.mark.parametrize("length", [PART + 1, 2 * PART, 4 * PART + 5])
def test_parts_give_what_the_whole_gives(model, monkeypatch, length):
    whole = ask(model, length)
    monkeypatch.setattr(prompt_reading, "PART_TOKENS", PART)
    inparts = ask(model, length)
    assert inparts.text == whole.text
    for ours, expected in zip(inparts.logprobs, whole.logprobs, strict=True):
        assert ours.token_id == expected.token_id
        assert ours.logprob == pytest.approx(expected.logprob, abs=1e-3)


def test_parts_are_of_one_length(model, parts):
    ask(model, PART)
    assert parts[0] == PART
    parts.clear()
    ask(model, 2 * PART)
    assert parts[:3] == [PART, PART, 1]
    parts.clear()
    ask(model, 2 * PART + 3)
    assert parts[:4] == [PART, PART, 3, 1]


def test_a_prompt_that_nobody_waits_for_is_read_no_further(model, parts):
    asked = []

    def cancelled():
        asked.append(len(parts))
        return len(asked) == 2

    result = ask(model, 4 * PART + 5, cancelled=cancelled)
    assert result.finish_reason == "cancelled"
    assert (result.text, result.completion_tokens) == ("", 0)
    assert asked == [1, 2]
    assert parts == [PART, PART]
    assert ask(model, 8).finish_reason != "cancelled"  # the model can still be used
