"""Bytes of single tokens."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cpumoe.integrations.transformers.vocabulary import Vocabulary

TOKENS = {
    "<unk>": b"<unk>",
    "\N{LOWER ONE EIGHTH BLOCK}a": b" a",
    "<0x41>": b"A",
    "<0xfF>": b"\xff",
    # Names that only begin like a byte's name.
    "<0x": b"<0x",
    "<0xff;": b"<0xff;",
    "<0x411>": b"<0x411>",
}


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_without_byte_level_has_its_text_or_its_byte(token):
    vocabulary = {name: number for number, name in enumerate(TOKENS)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    assert Vocabulary(tokenizer).token_bytes(vocabulary[token]) == TOKENS[token]
