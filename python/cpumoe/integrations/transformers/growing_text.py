"""A reply that grows token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from cpumoe.integrations.transformers.detokenizer import Detokenizer
from cpumoe.integrations.transformers.logprobs import LogprobRecorder
from cpumoe.integrations.transformers.structured_output import GrammarProcessor
from cpumoe.text.generation import FinishReason, Piece, ReplyParser, TokenLogprob, ToolCall
from cpumoe.text.stop_strings import StopStrings


class GrowingText:
    """Takes tokens one by one and turns them into a reply.

    Attributes:
        tokens: number of tokens so far.
        first_token_at: time of the first token, by `time.perf_counter`.
        finish_reason: why the text ends, or would end now.
        listener_error: the exception that `on_piece` raised.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        ends: Collection[int],
        markers: Collection[int],
        stop: Sequence[str],
        min_tokens: int,
        parser: ReplyParser | None,
        recorder: LogprobRecorder | None,
        grammar: GrammarProcessor | None,
        on_piece: Callable[[Piece], None] | None,
    ) -> None:
        """Prepares an empty reply.

        Args:
            detokenizer: turns tokens into text.
            ends: tokens that end the text and are not part of it.
            markers: tokens that the parser must see, even at the end.
            stop: strings that end the answer.
            min_tokens: stop strings have no effect before this many tokens.
            parser: splits the text; None: the whole text is the answer.
            recorder: has the tokens' log probabilities.
            grammar: gets each chosen token.
            on_piece: called with each piece that has become certain.
        """
        self._detokenizer = detokenizer
        self._ends = frozenset(ends)
        self._unseen = self._ends - frozenset(markers)
        self._stop = StopStrings(stop)
        self._min_tokens = min_tokens
        self._parser = parser
        self._recorder = recorder
        self._grammar = grammar
        self._on_piece = on_piece
        self._pieces: list[Piece] = []
        self._told = 0
        self.tokens = 0
        self.first_token_at: float | None = None
        self.finish_reason: FinishReason = "length"
        self.listener_error: BaseException | None = None

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(piece.text for piece in self._pieces)

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(piece.reasoning for piece in self._pieces)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tool calls so far."""
        return tuple(call for piece in self._pieces for call in piece.tool_calls)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Log probabilities of the tokens so far; None: not requested."""
        if self._recorder is None:
            return None
        return tuple(logprob for piece in self._pieces for logprob in piece.logprobs)

    def add(self, token: int) -> None:
        """Takes the next token."""
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.tokens += 1
        logprobs = () if self._recorder is None else (self._recorder.take(token),)
        if self._grammar is not None:
            self._grammar.accept(token)
        self._add("" if token in self._unseen else self._detokenizer.feed(token), logprobs)
        if token in self._ends or (self._grammar is not None and self._grammar.finished):
            self.finish_reason = "stop"

    def finish(self) -> None:
        """Adds the text that was held back."""
        self._add(self._detokenizer.flush(), ())
        rest = Piece() if self._parser is None else self._parser.flush()
        self._emit(self._cut(rest), ())
        if not self._stop.found:
            self._emit(Piece(self._stop.flush()), ())
        if self._stop.found:
            self.finish_reason = "stop"

    def _add(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        parsed = Piece(text) if self._parser is None else self._parser.feed(text)
        self._emit(self._cut(parsed), logprobs)
        if self._stop.found:
            self.finish_reason = "stop"

    def _cut(self, piece: Piece) -> Piece:
        """Returns the part of a piece that is certain to come before a stop string."""
        if self.tokens <= self._min_tokens:
            return piece
        text = self._stop.feed(piece.text)
        if self._stop.found:
            return Piece(text, piece.reasoning)
        return Piece(text, piece.reasoning, piece.tool_calls)

    def _emit(self, piece: Piece, logprobs: tuple[TokenLogprob, ...]) -> None:
        new = self.tokens - self._told
        piece = Piece(piece.text, piece.reasoning, piece.tool_calls, logprobs, new)
        if not piece:
            return
        self._told = self.tokens
        self._pieces.append(piece)
        if self._on_piece is not None:
            try:
                self._on_piece(piece)
            except BaseException as error:
                self.listener_error = error
                raise


class StopWhen:
    """transformers' stopping criterion: the text ends, or the caller has cancelled.

    The criterion also hands each token to the text, because transformers' streamers get a token
    only after the criteria have decided.
    """

    def __init__(self, text: GrowingText, cancelled: Callable[[], bool] | None) -> None:
        """Uses the text, and then `cancelled`, to decide."""
        self._text = text
        self._cancelled = cancelled

    def __call__(self, ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
        """Takes the last token of ids ``[1, length]``; returns whether the sequence ends."""
        self._text.add(int(ids[0, -1]))
        stop = self._text.finish_reason == "stop"
        if not stop and self._cancelled is not None and self._cancelled():
            self._text.finish_reason = "cancelled"
            stop = True
        return torch.tensor([stop], device="cpu")
