"""Text that a JSON schema admits, by llguidance."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

# A space, or a line's end and an indentation. A model that is not sure what comes next would write
# white space without end, if it could.
_WHITESPACE = r" |\n[ \t]{0,24}"


class StructuredOutput:
    """Makes grammars for a model's vocabulary."""

    def __init__(self, tokenizer: Any, logits: int, ends: Collection[int]) -> None:
        """Prepares; what takes a second waits for the first grammar.

        Args:
            tokenizer: a transformers tokenizer.
            logits: how many the model computes.
            ends: tokens that end a text.
        """
        self._tokenizer = tokenizer
        self._logits = logits
        self._ends = sorted(ends)
        self._prepared: Any = None

    def grammar(self, schema: str) -> Any:
        """Returns llguidance's matcher of a JSON schema, given as JSON text.

        Raises:
            ValueError: the schema is invalid or not supported, or nothing here can honour one.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise ValueError(
                'json_schema: needs llguidance, which is not installed: pip install "cpumoe[serve]"'
            ) from None
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                # Both say that anything is admitted; the library takes objects only.
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
            except Exception as error:  # the library's, for tokenizers that it does not know
                raise ValueError(
                    f"json_schema: not with this model's tokenizer: {_one_line(error)}"
                ) from None
        return self._prepared


class GrammarProcessor:
    """A logits processor that only lets tokens pass that a grammar admits.

    Attributes:
        finished: the grammar admits no further token.
    """

    def __init__(
        self,
        matcher: Any,
        *,
        begun: Callable[[], bool],
        openers: Callable[[], Collection[int]],
    ) -> None:
        """Holds for the answer, not for what a chat's reply has before it.

        Args:
            matcher: llguidance's.
            begun: whether the next token is part of the answer.
            openers: tokens that may come in place of the answer's first.
        """
        self._matcher = matcher
        self._begun = begun
        self._next_openers = openers
        self._openers: list[int] = []
        self._started = False
        self._holds = False
        self.finished = False

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns the scores ``[1, vocabulary]``, minus infinity where the grammar ends."""
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
            # What else forbids tokens has forbidden all of them: the grammar has the last word.
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
