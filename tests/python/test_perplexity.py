"""Perplexity, compared with its definition."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpumoe.integrations.transformers import perplexity
from cpumoe.integrations.transformers.perplexity import _windows

VOCABULARY = 11


def bigram(ids, **_):
    """A model whose prediction depends on the last token alone."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(logits=table[ids])


def uniform(ids, **_):
    return SimpleNamespace(logits=torch.zeros(*ids.shape, VOCABULARY))


def tokens(count):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(("window", "stride"), [(100, None), (7, None), (7, 3), (7, 1), (2, 1)])
def test_windows_do_not_matter_to_a_bigram_model(window, stride):
    text = tokens(50)
    log_probabilities = bigram(torch.tensor([text])).logits[0].log_softmax(-1)
    expected = -sum(float(log_probabilities[i, text[i + 1]]) for i in range(49)) / 49
    result = perplexity(bigram, text, window=window, stride=stride)
    assert result.scored_tokens == 49
    assert result.nats_per_token == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert result.tokens_per_second > 0


def test_knowing_nothing_is_the_vocabularys_size():
    assert perplexity(uniform, tokens(30), window=8).perplexity == pytest.approx(VOCABULARY)


@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_every_token_but_the_first_is_scored_once(length, window, data):
    stride = data.draw(st.integers(1, window))
    scored = []
    for begin, new in _windows(length, window, stride):
        end = min(begin + window, length)
        assert 1 <= new < end - begin  # each scored token has context
        scored.extend(range(end - new, end))
    assert scored == list(range(1, length))


def test_progress_ends_at_all():
    seen = []
    perplexity(uniform, tokens(30), window=8, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (29, 29)


@pytest.mark.parametrize(
    ("count", "window", "stride", "message"),
    [
        (1, 8, None, "text: expected at least 2 tokens, got 1"),
        (9, 1, None, "window: expected 2 or more, got 1"),
        (9, 4, 5, "stride: expected 1 to 4, the window, got 5"),
        (9, 4, 0, "stride"),
    ],
)
def test_bad_arguments(count, window, stride, message):
    with pytest.raises(ValueError, match=message):
        perplexity(uniform, tokens(count), window=window, stride=stride)
