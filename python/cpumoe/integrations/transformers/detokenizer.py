"""Turns tokens into text, one token at a time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# The text of bytes that are no whole character yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# How many tokens to wait for the end of a character, and how many of the last tokens may still be
# part of one, which has at most four bytes.
_PATIENCE = 8
_KEPT = 3


class Detokenizer:
    """Turns a growing list of tokens into pieces of text that add up to the whole.

    Decoding tokens one by one would lose spaces that depend on the token before, and would cut
    characters of several tokens. So the tokens of the last piece are decoded with and without the
    new tokens, and the difference is the next piece.
    """

    def __init__(self, tokenizer: Any, hidden: Collection[int] = ()) -> None:
        """Uses a transformers tokenizer. Tokens in `hidden` are left out of the text."""
        self._tokenizer = tokenizer
        self._hidden = frozenset(hidden)
        self._shown: list[int] = []
        self._new: list[int] = []

    def feed(self, token: int) -> str:
        """Takes the next token; returns the text that it completes, which may be empty."""
        if token in self._hidden:
            return ""
        self._new.append(token)
        if not self._decode(self._shown + self._new).endswith(_INCOMPLETE):
            return self._take(len(self._new))
        # These bytes are no text, and are shown as replacement characters.
        return self._take(len(self._new) - _KEPT) if len(self._new) >= _PATIENCE else ""

    def flush(self) -> str:
        """Returns the rest of the text, complete or not."""
        return self._take(len(self._new))

    def _take(self, count: int) -> str:
        taken, self._new = self._new[:count], self._new[count:]
        if not taken:
            return ""
        text = self._decode(self._shown + taken)[len(self._decode(self._shown)) :]
        self._shown = taken
        return text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
