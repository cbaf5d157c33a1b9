"""Log probabilities in the newer and the older format of OpenAI's protocol."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from cpumoe.text.generation import TokenLogprob

Document = dict[str, Any]


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> Document:
    """Returns log probabilities in the format of chats."""
    content = [
        {**_token(token), "top_logprobs": [_token(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def characters(tokens: Iterable[TokenLogprob]) -> int:
    """Returns the number of characters of these tokens."""
    return len(b"".join(token.raw for token in tokens).decode(errors="replace"))


def _token(token: TokenLogprob) -> Document:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}


class CompletionLogprobs:
    """Log probabilities in the format of plain completions, for a text that comes in pieces.

    The format has the offset of each token in the text, in characters.
    """

    def __init__(self) -> None:
        """Begins at the start of the text."""
        # Some tokens end within a character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def document(self, tokens: Sequence[TokenLogprob], *, before: int = 0) -> Document:
        """Returns the next tokens' log probabilities.

        Args:
            tokens: the next tokens.
            before: number of characters of these tokens that are not part of the text.
        """
        offsets = []
        self._offset -= before
        for token in tokens:
            offsets.append(max(0, self._offset))
            self._offset += len(self._decoder.decode(token.raw))
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": offsets,
        }


def _alternatives(token: TokenLogprob) -> dict[str, float] | None:
    """Returns the most probable tokens, and the token itself."""
    if token.logprob is None:
        return None
    alternatives: dict[str, float] = {}
    for other in (*token.top, token):
        if other.logprob is not None:
            # Several tokens may have one text. The most probable one comes first and counts.
            alternatives.setdefault(_name(other), other.logprob)
    return alternatives


def _name(token: TokenLogprob) -> str:
    """Returns a token's text, or OpenAI's notation of bytes that are no text."""
    try:
        return token.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
