"""Properties of single tokens."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

# SentencePiece's notation of a space, and of a byte that is part of a character.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class Vocabulary:
    """A tokenizer's tokens one by one.

    Attributes:
        added: added tokens by their text, which are found in a text before all others. Markers of a
            chat template are among them.
        special: tokens that are not text.
        end: the tokenizer's token for the end of a sequence, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Reads a transformers tokenizer."""
        self._tokenizer = tokenizer
        self.added: dict[str, int] = {t: int(i) for t, i in tokenizer.get_added_vocab().items()}
        marked = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.special: frozenset[int] = frozenset({*map(int, tokenizer.all_special_ids), *marked})
        end = tokenizer.eos_token_id
        self.end: int | None = None if end is None else int(end)

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one token, including a space before a word."""
        written = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(written, str):
            return b""  # the model's vocabulary may be larger than the tokenizer's
        if token in self._added_ids or not (self._byte_level or _SPACE in written):
            byte = None if token in self._added_ids else _BYTE.fullmatch(written)
            return bytes.fromhex(byte[1]) if byte else self._decoded(token)
        if self._byte_level and all(character in _BYTES for character in written):
            return bytes(_BYTES[character] for character in written)
        return written.replace(_SPACE, " ").encode("utf-8", "surrogatepass")

    def _decoded(self, token: int) -> bytes:
        text: str = self._tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text.encode("utf-8", "surrogatepass")

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self.added.values())

    @cached_property
    def _byte_level(self) -> bool:
        """Whether characters of a token's name stand for bytes, as in GPT-2."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        return decoder is not None and b"ByteLevel" in decoder.__getstate__()
