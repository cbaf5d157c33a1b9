"""Tokens to text, one token at a time."""

from __future__ import annotations

from typing import Any

# What a tokenizer shows for bytes that are no whole character yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 takes up to four byte tokens; more replacement characters are really there.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Turns a growing list of tokens into text whose pieces add up to the whole.

    Decoding tokens one by one would lose spaces that depend on the token before, and cut characters
    of several tokens. So the tokens of the last piece are decoded once with and once without what
    is new, and the difference is the next piece.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Uses a transformers tokenizer; special tokens are left out."""
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._new: list[int] = []

    def feed(self, token: int) -> str:
        """Takes the next token; returns the text that is whole because of it, maybe none."""
        self._new.append(token)
        return self._take(len(self._new) >= _LONGEST_CHARACTER)

    def flush(self) -> str:
        """Returns what is left, whole or not."""
        return self._take(True)

    def _take(self, even_incomplete: bool) -> str:
        before = self._decode(self._shown)
        after = self._decode(self._shown + self._new)
        if after.endswith(_INCOMPLETE) and not even_incomplete:
            return ""
        self._shown, self._new = self._new or self._shown, []
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
