"""How the tokens of a request are chosen and become text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LogitsProcessorList

from cpumoe.integrations.transformers.detokenizer import Detokenizer
from cpumoe.integrations.transformers.generation_settings import end_tokens, generation_settings
from cpumoe.integrations.transformers.growing_text import GrowingText
from cpumoe.integrations.transformers.host_processors import Request
from cpumoe.integrations.transformers.logprobs import LogprobRecorder
from cpumoe.integrations.transformers.prompt_reading import num_logits
from cpumoe.integrations.transformers.sampling import (
    is_sampled,
    logits_processors,
    min_new_tokens,
)
from cpumoe.integrations.transformers.structured_output import GrammarProcessor, StructuredOutput
from cpumoe.integrations.transformers.vocabulary import Vocabulary
from cpumoe.text.generation import Piece, Prompt, ReplyParser, Sampling


@dataclass(frozen=True)
class Continuation:
    """A request, ready for transformers' generation loop.

    Attributes:
        text: the growing reply, which takes the tokens.
        processors: the logits processors.
        sampled: whether tokens are drawn; False: the most probable one is taken.
    """

    text: GrowingText
    processors: LogitsProcessorList
    sampled: bool


class Continuations:
    """Makes continuations for one checkpoint.

    Attributes:
        vocabulary: the checkpoint's tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, generation_config: Mapping[str, Any]) -> None:
        """Reads the checkpoint's settings.

        Args:
            model: the transformers model.
            tokenizer: the transformers tokenizer.
            generation_config: content of generation_config.json.

        Raises:
            ModelError: the end tokens or the stop strings are invalid.
        """
        logits = num_logits(model)
        config = model.config.get_text_config(decoder=True)
        self.vocabulary = Vocabulary(tokenizer)
        self._tokenizer = tokenizer
        self._settings = generation_settings(generation_config, logits)
        self._end_tokens = end_tokens(generation_config, config, self.vocabulary)
        self._structured = StructuredOutput(tokenizer, logits, self._end_tokens)

    def begin(
        self,
        prompt: Prompt,
        sampling: Sampling,
        limit: int,
        on_piece: Callable[[Piece], None] | None,
    ) -> Continuation:
        """Returns the continuation of a prompt by at most `limit` tokens.

        Raises:
            ValueError: the JSON schema is not supported.
        """
        length = len(prompt.tokens)
        markers = self._added(() if prompt.reply is None else prompt.reply.markers)
        stop, ends = self._stops(sampling)
        parser = None if prompt.reply is None else prompt.reply.parser()
        recorder = None
        if sampling.logprobs is not None:
            recorder = LogprobRecorder(self.vocabulary, sampling.logprobs)
        grammar = self._grammar(sampling.json_schema, parser)
        hidden = self.vocabulary.special - markers if sampling.skip_special_tokens else ()
        text = GrowingText(
            Detokenizer(self._tokenizer, hidden),
            ends=ends,
            markers=markers,
            stop=stop,
            min_tokens=min_new_tokens(sampling, self._settings, length),
            parser=parser,
            recorder=recorder,
            grammar=grammar,
            on_piece=on_piece,
        )
        processors = logits_processors(
            sampling,
            self._settings,
            Request(length, length + limit, tuple(sorted(ends))),
            recorder=recorder,
            grammar=grammar,
        )
        return Continuation(text, processors, is_sampled(sampling, self._settings))

    def _stops(self, sampling: Sampling) -> tuple[tuple[str, ...], frozenset[int]]:
        """Returns the strings and the tokens that end the text."""
        stop = sampling.stop
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop += self._settings.stop
            ends |= self._end_tokens
        # A stop string that is a token by itself may be hidden from the text.
        return stop, ends | self._added(stop)

    def _added(self, texts: Collection[str]) -> frozenset[int]:
        added = self.vocabulary.added
        return frozenset(added[text] for text in texts if text in added)

    def _grammar(self, schema: str | None, parser: ReplyParser | None) -> GrammarProcessor | None:
        if schema is None:
            return None
        matcher = self._structured.grammar(schema)
        if parser is None:
            return GrammarProcessor(matcher, begun=lambda: True, openers=frozenset)
        return GrammarProcessor(
            matcher, begun=lambda: parser.answering, openers=lambda: self._added(parser.openers)
        )
