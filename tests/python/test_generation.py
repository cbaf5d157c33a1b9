"""The protocol of text generation without a model: stop strings and sampling."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpumoe.text.generation import Sampling
from cpumoe.text.stop_strings import StopStrings

# Few letters, so that stop strings, their beginnings and overlaps are frequent.
TEXT = st.text("ab", max_size=20)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def cut(pieces, stop):
    """Returns the certain text of each piece, and whether a stop string was found."""
    strings = StopStrings(stop)
    out = []
    for piece in pieces:
        out.append(strings.feed(piece))
        if strings.found:
            return out, True
    out.append(strings.flush())
    return out, strings.found


def first_stop(text, stop):
    """Returns where the text ends by definition: at the first letter that completes a stop."""
    for end in range(len(text) + 1):
        lengths = [len(s) for s in stop if text[:end].endswith(s)]
        if lengths:
            return end - max(lengths)
    return None


@pytest.mark.parametrize(
    ("pieces", "stop", "texts"),
    [
        (["one ", "two"], [], ["one ", "two", ""]),
        (["one STOP two"], ["STOP"], ["one "]),
        (["one ST", "OP two"], ["STOP"], ["one ", ""]),
        (["one ST", "ART"], ["STOP"], ["one ", "START", ""]),
        (["one ST"], ["STOP"], ["one ", "ST"]),
        # "aa" may become "aab".
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", ""]),
        (["x\n", "\n", "y"], ["\n\n"], ["x", ""]),
        # The first one in the text counts, not the first one in the list.
        (["abc"], ["c", "b"], ["a"]),
        # If several end together, the longest counts.
        (["ab", "cd"], ["bcd", "cd"], ["a", ""]),
        # A complete stop string does not wait for a longer one that began before it.
        (["abc"], ["abc", "b"], ["a"]),
        (["ab", "c"], ["abx", "c"], ["", "ab"]),
    ],
)
def test_stop_strings(pieces, stop, texts):
    assert cut(pieces, stop)[0] == texts


def test_nothing_to_stop_at_holds_nothing_back():
    strings = StopStrings([])
    assert [strings.feed(piece) for piece in "abc"] == ["a", "b", "c"]
    assert strings.flush() == ""
    assert not strings.found


@given(TEXT, STOPS, st.data())
def test_pieces_give_what_the_whole_gives(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    end = first_stop(text, stop)
    out, found = cut(pieces, stop)
    assert found == (end is not None)
    assert "".join(out) == text[:end]


@given(TEXT, STOPS)
def test_no_more_is_held_back_than_may_be_a_stop_string(text, stop):
    strings = StopStrings(stop)
    shown = ""
    for letter in text:
        shown += strings.feed(letter)
        if strings.found:
            return
        held = text[len(shown) : len(shown) + len(strings.flush())]
        assert held == "" or any(s.startswith(held) for s in stop)
        strings.feed(held)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": -1}, "top_k: expected 0 or more, got -1"),
        ({"min_p": 1.5}, "min_p: expected 0 to 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected above 0 and at most 100, got 0"),
        ({"min_tokens": -1}, "min_tokens: expected 0 or more, got -1"),
        ({"logprobs": -1}, "logprobs: expected 0 or more, got -1"),
        ({"json_schema": "{"}, "json_schema: expected JSON: "),
        ({"json_schema": "[]"}, "json_schema: expected a JSON object, got list"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected 0 or more, got -1"),
        ({"temperature": -0.1}, "temperature: expected 0 to 100, got -0.1"),
        ({"temperature": math.nan}, "temperature: expected 0 to 100, got nan"),
        ({"temperature": math.inf}, "temperature: expected 0 to 100, got inf"),
        ({"top_p": 0}, "top_p: expected above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p: expected above 0 and at most 1, got 1.1"),
        ({"top_p": math.nan}, "top_p: expected above 0 and at most 1, got nan"),
        ({"stop": ("a", "")}, "stop: expected strings of at least one character"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"seed": 2**63}, "seed: expected 0 to"),
    ],
)
def test_sampling_refuses(values, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        Sampling(**values)


def test_sampling_accepts_the_ends_of_its_ranges():
    Sampling()
    Sampling(max_new_tokens=1, temperature=0, top_p=1, stop=("a",), seed=2**63 - 1)
    Sampling(temperature=100, top_p=1e-9, seed=0)
