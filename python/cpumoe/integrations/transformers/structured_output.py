"""Restricts text to what a JSON schema admits, with llguidance."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

# A space, or a line feed and an indentation. Without a limit, a model that is not sure how to go on
# would write white space forever.
_WHITESPACE = r" |\n[ \t]{0,24}"


class StructuredOutput:
    """Makes grammars for a model's vocabulary."""

    def __init__(self, tokenizer: Any, logits: int, ends: Collection[int]) -> None:
        """Prepares little: the first grammar prepares the vocabulary, which takes a second.

        Args:
            tokenizer: a transformers tokenizer.
            logits: number of logits that the model computes.
            ends: tokens that end a text.
        """
        self._tokenizer = tokenizer
        self._logits = logits
        self._ends = sorted(ends)
        self._prepared: Any = None

    def grammar(self, schema: str) -> Any:
        """Returns llguidance's matcher of a JSON schema, given as JSON text.

        Raises:
            ValueError: the schema is invalid or not supported, or llguidance is not installed or
                does not support the tokenizer.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise ValueError(
                'json_schema: needs llguidance, which is not installed: pip install "cpumoe[serve]"'
            ) from None
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                # Both admit anything, but the library takes objects only.
                "{}" if schema.strip() == "true" else schema,
                overrides={"whitespace_pattern": _WHITESPACE},
            )
        except ValueError as error:
            raise ValueError(f"json_schema: {_one_line(error)}") from None
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"json_schema: {_one_line(matcher.get_error())}")
        return matcher

    def _vocabulary(self) -> Any:
        if self._prepared is None:
            from llguidance.hf import from_tokenizer

            try:
                self._prepared = from_tokenizer(
                    self._tokenizer, n_vocab=self._logits, eos_token=self._ends or None
                )
            except Exception as error:  # for tokenizers that the library does not know
                raise ValueError(
                    f"json_schema: not supported with this model's tokenizer: {_one_line(error)}"
                ) from None
        return self._prepared


class GrammarProcessor:
    """A logits processor that admits only tokens that fit a grammar.

    Attributes:
        finished: whether the grammar admits no further token.
    """

    def __init__(
        self,
        matcher: Any,
        *,
        begun: Callable[[], bool],
        openers: Callable[[], Collection[int]],
    ) -> None:
        """Applies to the answer, not to the reasoning before it.

        Args:
            matcher: llguidance's matcher.
            begun: returns whether the next token is part of the answer.
            openers: returns tokens that may come instead of the answer's first token.
        """
        self._matcher = matcher
        self._begun = begun
        self._next_openers = openers
        self._openers: list[int] = []
        self._started = False
        self._holds = False
        self.finished = False

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns the scores ``[1, vocabulary]``, minus infinity for tokens that do not fit."""
        self._holds = self._begun()
        if not self._holds:
            return scores
        admitted = torch.frombuffer(
            bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8
        )
        forbidden = torch.ones_like(scores, dtype=torch.bool)
        count = min(len(admitted), scores.shape[1])
        forbidden[0, :count] = admitted[:count] == 0
        self._openers = [] if self._started else sorted(self._next_openers())
        forbidden[0, self._openers] = False
        masked = scores.masked_fill(forbidden, -torch.inf)
        if masked.max().isneginf():
            # Other processors have forbidden all tokens that fit. The grammar has the last word.
            return torch.zeros_like(scores).masked_fill(forbidden, -torch.inf)
        return masked

    def accept(self, token: int) -> None:
        """Takes the token that was chosen."""
        if not self._holds or token in self._openers:
            return
        self._started = True
        self._matcher.consume_token(token)
        self.finished = bool(self._matcher.is_stopped())


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
