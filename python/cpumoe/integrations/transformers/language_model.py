"""A model with its tokenizer: text in, text out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging
from typing_extensions import override

from cpumoe import embedded
from cpumoe.generation import (
    LEAST_TEMPERATURE,
    FinishReason,
    Generation,
    Message,
    Piece,
    Prompt,
    Sampling,
)
from cpumoe.integrations.transformers.chat_template import render_chat
from cpumoe.integrations.transformers.detokenizer import Detokenizer
from cpumoe.integrations.transformers.experts_module import CpuExperts
from cpumoe.integrations.transformers.loading import (
    check_path,
    from_pretrained,
    from_pretrained_by_host,
    origin,
)
from cpumoe.integrations.transformers.options import ExpertsOptions
from cpumoe.stop_strings import StopStrings


class LanguageModel:
    """A causal language model that continues text; implements `cpumoe.generation.TextModel`.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        """Takes a loaded model, its tokenizer, and the name that clients call it by."""
        self.model = model
        self.tokenizer = tokenizer
        self._name = name
        self._experts = [m for m in model.modules() if isinstance(m, CpuExperts)]
        self._end_tokens = _token_ids(model.generation_config.eos_token_id)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        options: ExpertsOptions | None = None,
        dtype: torch.dtype = torch.bfloat16,
        chat_template: str | None = None,
        host_experts: bool = False,
        **kwargs: Any,
    ) -> LanguageModel:
        """Loads a model and its tokenizer.

        Args:
            path: a checkpoint folder, or a name on the hub; None: the small model that comes with
                cpumoe.
            name: what clients call it; default: the path's last part.
            options: how experts are made, see `from_pretrained`. Its router and progress hold for
                `host_experts` too.
            dtype: of everything but the experts, bfloat16 or float32.
            chat_template: a Jinja template in the place of the tokenizer's own.
            host_experts: let transformers dequantize and compute the experts as well, for
                comparison. Four times the memory, and slow.
            **kwargs: for transformers.

        Raises:
            FileNotFoundError, CheckpointError, UnsupportedFormatError, ValueError: see
            `from_pretrained`; OSError: no tokenizer.
        """
        if path is None:
            path, name = embedded.model_path(), name or embedded.MODEL_NAME
        options = options or ExpertsOptions()
        check_path(path)
        tokenizer = AutoTokenizer.from_pretrained(path, **origin(kwargs))
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        with _host_progress(options.progress):
            if host_experts:
                model = from_pretrained_by_host(
                    path, fp32_router=options.fp32_router, dtype=dtype, **kwargs
                )
            else:
                model = from_pretrained(path, options=options, dtype=dtype, **kwargs)
        return cls(model, tokenizer, name or Path(path).resolve().name)

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self._name

    @property
    def context_length(self) -> int:
        """Tokens of prompt and continuation together."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)

    @property
    def experts_seconds(self) -> float:
        """Wall time spent in cpumoe's experts so far."""
        return sum(module.spent.seconds for module in self._experts)

    @property
    def experts_calls(self) -> int:
        """Layer calls of cpumoe's experts so far."""
        return sum(module.spent.calls for module in self._experts)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """Returns the prompt of a text, with what the tokenizer puts before it.

        Args:
            text: any.
            add_special_tokens: False: the text alone.

        Raises:
            ValueError: half a surrogate pair in it, which no encoding has.
        """
        _check_text(text)
        return Prompt(self._tokens(text, add_special_tokens))

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """Returns the prompt of a conversation; see `cpumoe.generation.TextModel.encode_chat`."""
        _check_text(json.dumps([[*messages], [*tools]], ensure_ascii=False))
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.name} has no chat template: it completes text, but cannot chat without one "
                f"(--chat-template FILE)"
            )
        text = render_chat(self.tokenizer, messages, tools, template_arguments or {})
        # The template writes all special tokens itself.
        return Prompt(self._tokens(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of some tokens, special ones included.

        Raises:
            ValueError: tokens that the model does not have.
        """
        self._check_tokens("tokens", tokens)
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _tokens(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Quietly: whether the text fits the context is the caller's to say.
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(int(token) for token in encoded["input_ids"])

    def _check_tokens(self, what: str, tokens: Sequence[int]) -> None:
        known = self.model.get_input_embeddings().num_embeddings
        if tokens and not 0 <= min(tokens) <= max(tokens) < known:
            raise ValueError(f"{what}: expected tokens from 0 to {known - 1}, got others")

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation:
        """Continues a prompt; see `cpumoe.generation.TextModel.generate`."""
        tokens = prompt.tokens
        room = self.context_length - len(tokens)
        if not tokens:
            raise ValueError("prompt: expected at least one token, got none")
        if room < (sampling.max_new_tokens != 0):
            raise ValueError(
                f"prompt: expected fewer tokens than the context of {self.context_length}, "
                f"got {len(tokens)}"
            )
        self._check_tokens("prompt", tokens)
        limit = room if sampling.max_new_tokens is None else min(room, sampling.max_new_tokens)
        if limit == 0:
            return Generation("", "length", len(tokens), 0, 0.0, 0.0, 0.0)
        text = _GrowingText(self.tokenizer, sampling.stop, self._end_tokens, on_piece)
        ids = torch.tensor([tokens])
        experts_before, start = self.experts_seconds, time.perf_counter()
        with torch.random.fork_rng(devices=[], enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            with torch.inference_mode():
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=limit,
                    streamer=text,
                    stopping_criteria=StoppingCriteriaList([_StopWhen(text, cancelled)]),
                    pad_token_id=next(iter(self._end_tokens), 0),
                    **_sampling_arguments(sampling),
                )
        end = time.perf_counter()
        text.finish()
        first = text.first_token_at or end
        return Generation(
            text=text.text,
            finish_reason=text.finish_reason,
            prompt_tokens=len(tokens),
            completion_tokens=text.tokens,
            prefill_seconds=first - start,
            decode_seconds=end - first,
            experts_seconds=self.experts_seconds - experts_before,
        )


class _GrowingText(BaseStreamer):
    """Takes tokens from the host's generation loop and makes text of them."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        end_tokens: frozenset[int],
        on_piece: Callable[[Piece], None] | None,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._end_tokens = end_tokens
        self._on_piece = on_piece
        self._pieces: list[str] = []
        self._prompt_seen = False
        self._told = 0
        self.tokens = 0
        self.first_token_at: float | None = None
        self.finish_reason: FinishReason = "length"

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @override
    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # the host puts the prompt first
            self._prompt_seen = True
            return
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        token = int(value.flatten()[0])
        self.tokens += 1
        if token in self._end_tokens:
            self.finish_reason = "stop"
            return
        self._add(self._stop.feed(self._detokenizer.feed(token)))
        if self._stop.found:
            self.finish_reason = "stop"

    @override
    def end(self) -> None:
        pass

    def finish(self) -> None:
        """Adds what was held back."""
        self._add(self._stop.flush(self._detokenizer.flush()))
        if self._stop.found:
            self.finish_reason = "stop"

    def _add(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            if self._on_piece is not None:
                self._on_piece(Piece(piece, tokens=self.tokens - self._told))
                self._told = self.tokens


class _StopWhen:
    """The host's stopping criterion: a stop string came, or the caller has gone."""

    def __init__(self, text: _GrowingText, cancelled: Callable[[], bool] | None) -> None:
        self._text = text
        self._cancelled = cancelled

    def __call__(self, ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
        stop = self._text.finish_reason == "stop"
        if not stop and self._cancelled is not None and self._cancelled():
            self._text.finish_reason = "cancelled"
            stop = True
        return torch.full((ids.shape[0],), stop)


@contextmanager
def _host_progress(enabled: bool | None) -> Iterator[None]:
    """Keeps the host's bars out of files and pipes."""
    wanted = sys.stderr.isatty() if enabled is None else enabled
    if wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _check_text(text: str) -> None:
    """Tokenizers refuse such text with a TypeError that does not say what is wrong."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: expected Unicode characters, got {text[error.start]!a}, half a surrogate pair; "
            f"was it UTF-8?"
        ) from None


def _sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """What the host's `generate` calls them; what is left out is its generation config's."""
    arguments: dict[str, Any] = {}
    if sampling.temperature is not None:
        sample = sampling.temperature >= LEAST_TEMPERATURE
        arguments["do_sample"] = sample
        # The host refuses a temperature of 0 or of type int, and warns of any without sampling.
        arguments["temperature"] = float(sampling.temperature) if sample else None
    if sampling.top_p is not None:
        arguments["top_p"] = sampling.top_p
    if arguments.get("do_sample") is False:
        arguments |= {"top_p": None, "top_k": None}
    return arguments


def _token_ids(ids: int | list[int] | None) -> frozenset[int]:
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
