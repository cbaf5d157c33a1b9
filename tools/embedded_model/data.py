"""The tokenizer, and rows of tokens to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from chat import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    TEMPLATE,
    Asker,
    Turn,
)
from corpus import Chapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

IGNORED = -100
# Conversations in place of one row of text.
CHATS_PER_ROW = 4
# Conversations drawn until one is short enough.
_DRAWS = 8
Document = tuple[list[int], list[int]]
Batch = tuple[torch.Tensor, torch.Tensor]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer; it puts a BOS before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos]),
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        # A host that knows one end token only shall end a turn.
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


class Rows:
    """Endless batches of tokens and labels ``[rows, length]``, drawn by a seed.

    Text is packed without gaps. A conversation is alone in a shorter row, as in its use: after
    other text, the little that a request says would hardly be noticed.
    """

    def __init__(
        self, tokenizer: Tokenizer, chapters: list[Chapter], length: int, seed: int
    ) -> None:
        """Draws from `chapters`; rows have `length` tokens."""
        self._tokenizer = tokenizer
        self._chapters = chapters
        self._length = length
        self._rng = random.Random(seed)
        self._asker = Asker(chapters, self._rng)
        self._bos, self._eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        self._pad = tokenizer.token_to_id(PAD)
        self._rows = self._pack()

    def text(self, rows: int) -> Batch:
        """Returns rows of chapters and passages."""
        return _batch([next(self._rows) for _ in range(rows)])

    def chat(self, rows: int) -> Batch:
        """Returns as many tokens of conversations."""
        length = self._length // CHATS_PER_ROW
        return _batch([self._conversation(length) for _ in range(rows * CHATS_PER_ROW)])

    def _conversation(self, length: int) -> Document:
        tokens, labels = self._chat(self._asker.conversation())
        for _ in range(_DRAWS):
            if len(tokens) <= length:
                break
            tokens, labels = self._chat(self._asker.conversation())
        gap = max(0, length - len(tokens))
        return tokens[:length] + [self._pad] * gap, labels[:length] + [IGNORED] * gap

    def _pack(self) -> Iterator[Document]:
        """Documents one after the other; every row begins with one, or with the rest of one."""
        tokens: list[int] = []
        labels: list[int] = []
        while True:
            for chapter in self._rng.sample(self._chapters, len(self._chapters)):
                for text, is_end in self._texts(chapter):
                    document = self._text(text, is_end)
                    tokens += document[0]
                    labels += document[1]
                    while len(tokens) >= self._length:
                        yield tokens[: self._length], labels[: self._length]
                        tokens = [self._bos, *tokens[self._length :]]
                        labels = [IGNORED, *labels[self._length :]]

    def _texts(self, chapter: Chapter) -> Iterator[tuple[str, bool]]:
        """A chapter with its heading, or all of its passages without."""
        if self._rng.random() < 0.5:
            yield chapter.text, True
            return
        first = 0
        while first < len(chapter.verses):
            last = first + self._rng.randint(2, 14)
            yield "\n".join(chapter.verses[first:last]), last >= len(chapter.verses)
            first = last

    def _text(self, text: str, is_end: bool) -> Document:
        tokens = self._encode(text) + [self._eos] * is_end
        return [self._bos, *tokens], [IGNORED, *tokens]

    def _chat(self, turns: list[Turn]) -> Document:
        """Only what the assistant says is learned."""
        tokens, labels = [self._bos], [IGNORED]
        for role, text in turns:
            said = self._encode(text + END)
            tokens += [self._tokenizer.token_to_id(f"<|{role}|>"), *said]
            learned = f"<|{role}|>" == ASSISTANT
            labels += [IGNORED, *(said if learned else [IGNORED] * len(said))]
        return tokens, labels

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _batch(documents: list[Document]) -> Batch:
    tokens, labels = zip(*documents, strict=True)
    return torch.tensor(tokens), torch.tensor(labels)
