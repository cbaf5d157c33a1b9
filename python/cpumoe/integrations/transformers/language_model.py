"""A model with its tokenizer, for text in and text out."""

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
from transformers import AutoTokenizer
from transformers.utils import logging

import cpumoe
from cpumoe import embedded
from cpumoe.integrations.transformers.attention import AttentionModules
from cpumoe.integrations.transformers.chat_template import render_chat
from cpumoe.integrations.transformers.continuation import Continuations
from cpumoe.integrations.transformers.decoding import decode
from cpumoe.integrations.transformers.dense import DenseLayers
from cpumoe.integrations.transformers.experts_module import CpuExperts
from cpumoe.integrations.transformers.generation_settings import (
    host_generation_config,
    read_generation_config,
)
from cpumoe.integrations.transformers.host_files import (
    check_model_files,
    check_tokenizer_files,
    check_vocabulary,
    host_reads_tokenizer,
)
from cpumoe.integrations.transformers.loading import (
    check_dtype,
    load_checked,
    load_checked_by_host,
    origin,
)
from cpumoe.integrations.transformers.logprobs import logprob_rows, token_logprob
from cpumoe.integrations.transformers.norms import NormModules
from cpumoe.integrations.transformers.options import whole_options
from cpumoe.integrations.transformers.prompt_reading import CancelledError, read_prompt
from cpumoe.text.generation import (
    Generation,
    Message,
    ModelError,
    Piece,
    Prompt,
    Sampling,
    TokenLogprob,
)
from cpumoe.text.reply import reply_format


class LanguageModel:
    """A causal language model that continues text, a `cpumoe.text.generation.TextModel`.

    Attributes:
        model: the transformers model.
        tokenizer: its tokenizer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Combines a loaded model and its tokenizer.

        Args:
            model: the transformers model.
            tokenizer: the model's tokenizer.
            name: the model's name for clients.
            generation_config: content of generation_config.json; None: the model's own. A warning
                lists settings that are not supported.

        Raises:
            ModelError: the checkpoint's end tokens or stop strings are invalid.
        """
        self.model = model
        self.tokenizer = tokenizer
        self._name = name
        self._experts = [m for m in model.modules() if isinstance(m, CpuExperts)]
        content = (
            model.generation_config.to_dict() if generation_config is None else generation_config
        )
        self._continuations = Continuations(model, tokenizer, content)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        options: cpumoe.ExpertsOptions | None = None,
        dtype: torch.dtype | str = torch.bfloat16,
        chat_template: str | None = None,
        host_experts: bool = False,
        **kwargs: Any,
    ) -> LanguageModel:
        """Loads a model and its tokenizer.

        Args:
            path: a checkpoint folder, or a name on the hub; None: the small model that comes with
                cpumoe.
            name: the model's name for clients; default: the last part of `path`.
            options: options for the experts, see `from_pretrained`. Router and progress apply to
                `host_experts` as well.
            dtype: dtype of everything but the experts, see `from_pretrained`.
            chat_template: a Jinja template that replaces the tokenizer's own.
            host_experts: whether transformers dequantizes and computes the experts, for comparison.
                This takes four times the memory and is slow.
            **kwargs: further arguments for transformers.

        Raises:
            FileNotFoundError, CheckpointError, UnsupportedFormatError, ValueError: see
                `from_pretrained`.
            OSError: there is no tokenizer.
            ModelError: see `LanguageModel`.
        """
        if path is None:
            path, name = embedded.model_path(), name or embedded.MODEL_NAME
        options = whole_options(options)
        check_dtype(dtype, kwargs)
        # First, because for the tokenizer transformers builds a config of all layers it claims.
        check_model_files(path, kwargs, experts=not host_experts)
        check_tokenizer_files(path, kwargs)
        with host_reads_tokenizer(path, kwargs):
            tokenizer = AutoTokenizer.from_pretrained(path, **origin(kwargs))
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        content = read_generation_config(path, origin(kwargs))
        if content is not None:
            kwargs["generation_config"] = host_generation_config(content)
        with _host_progress(options.progress):
            if host_experts:
                model = load_checked_by_host(path, kwargs, options.fp32_router, dtype)
            else:
                model = load_checked(path, kwargs, options, dtype)
        check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, path)
        return cls(model, tokenizer, name or Path(path).resolve().name, generation_config=content)

    @property
    def dense_layers(self) -> DenseLayers:
        """What became of the model's dense layers."""
        quantizer = getattr(self.model, "hf_quantizer", None)
        return getattr(quantizer, "dense_layers", None) or DenseLayers()

    @property
    def norm_modules(self) -> NormModules:
        """What became of the model's norms."""
        quantizer = getattr(self.model, "hf_quantizer", None)
        return getattr(quantizer, "norm_modules", None) or NormModules()

    @property
    def attention_modules(self) -> AttentionModules:
        """What became of the model's attention."""
        quantizer = getattr(self.model, "hf_quantizer", None)
        return getattr(quantizer, "attention_modules", None) or AttentionModules()

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self._name

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and continuation together."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)

    @property
    def experts_seconds(self) -> float:
        """Wall time spent in cpumoe's experts so far."""
        return sum(module.spent.seconds for module in self._experts)

    @property
    def experts_calls(self) -> int:
        """Number of layer calls of cpumoe's experts so far."""
        return sum(module.spent.calls for module in self._experts)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """Returns the prompt of a text to continue.

        Args:
            text: any text.
            add_special_tokens: whether to add the special tokens that the tokenizer puts before a
                text.

        Raises:
            ValueError: `text` has half a surrogate pair, which no encoding can represent.
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
        """Returns the prompt of a conversation; see `TextModel.encode_chat`."""
        try:
            _check_text(json.dumps([[*messages], [*tools]], ensure_ascii=False))
        except (RecursionError, TypeError) as error:
            raise ValueError(
                f"messages: expected values that JSON can represent: {error}"
            ) from None
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.name} has no chat template, so it can continue text, but not chat; pass "
                f"one (--chat-template FILE)"
            )
        text = render_chat(self.tokenizer, messages, tools, template_arguments or {})
        template = self.tokenizer.get_chat_template(tools=[*tools] or None)
        # The template writes all special tokens.
        tokens = self._tokens(text, add_special_tokens=False)
        return Prompt(tokens, reply_format(template, text, tools))

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of some tokens, special ones included.

        Raises:
            ValueError: the model does not have one of the tokens.
        """
        self._check_tokens("tokens", tokens)
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _tokens(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Without a warning about long texts: the caller decides whether the text fits the context.
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(int(token) for token in encoded["input_ids"])

    def _check_tokens(self, what: str, tokens: Sequence[int]) -> None:
        known = self.model.get_input_embeddings().num_embeddings
        if tokens and not 0 <= min(tokens) <= max(tokens) < known:
            wrong = next(token for token in tokens if not 0 <= token < known)
            raise ValueError(f"{what}: expected tokens from 0 to {known - 1}, got {wrong}")

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation:
        """Continues a prompt; see `cpumoe.text.generation.TextModel.generate`."""
        tokens = prompt.tokens
        limit = self._limit(tokens, sampling)
        begun = self._continuations.begin(prompt, sampling, limit, on_piece)
        text = begun.text
        read: list[TokenLogprob] | None = None if sampling.prompt_logprobs is None else []
        experts_before, start = self.experts_seconds, time.perf_counter()
        with torch.random.fork_rng(devices=[], enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            try:
                with torch.inference_mode():
                    cache = self._read(tokens, sampling.prompt_logprobs or 0, read, cancelled)
                    if limit > 0:
                        decode(self.model, tokens, begun, limit, cache, cancelled)
            except CancelledError:
                text.finish_reason = "cancelled"
            except ValueError as error:
                if error is text.listener_error:
                    raise
                # The request was checked above, so the model is at fault.
                raise ModelError(f"{self.name}: the model cannot generate: {error}") from error
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
            reasoning=text.reasoning,
            tool_calls=text.tool_calls,
            logprobs=text.logprobs,
            prompt_logprobs=None if read is None else tuple(read),
        )

    def _limit(self, tokens: Sequence[int], sampling: Sampling) -> int:
        """Returns how many tokens may follow the prompt.

        Raises:
            ValueError: the prompt leaves no room, or the request has invalid tokens.
        """
        room = self.context_length - len(tokens)
        if not tokens:
            raise ValueError("prompt: expected at least one token, got none")
        if room < (sampling.max_new_tokens != 0):
            raise ValueError(
                f"prompt: expected fewer tokens than the context of {self.context_length}, "
                f"got {len(tokens)}"
            )
        self._check_tokens("prompt", tokens)
        self._check_tokens("stop_token_ids", sampling.stop_token_ids)
        return room if sampling.max_new_tokens is None else min(room, sampling.max_new_tokens)

    def _read(
        self,
        tokens: Sequence[int],
        alternatives: int,
        read: list[TokenLogprob] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Any | None:
        """Reads a prompt except its end, and appends its log probabilities to `read`, if given."""
        if read is None:
            return read_prompt(self.model, tokens, cancelled=cancelled)
        vocabulary = self._continuations.vocabulary
        read.append(token_logprob(vocabulary, tokens[0], None))

        def note(first: int, logits: torch.Tensor) -> None:
            came = tokens[first + 1 : first + 1 + len(logits)]
            read.extend(logprob_rows(vocabulary, logits, came, alternatives))

        return read_prompt(self.model, tokens, cancelled=cancelled, on_logits=note)


@contextmanager
def _host_progress(enabled: bool | None) -> Iterator[None]:
    """Keeps transformers' progress bars out of files and pipes."""
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
    """Refuses text that tokenizers refuse with an unclear TypeError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: expected Unicode characters, got {text[error.start]!a}, half a surrogate pair; "
            f"check that the text was decoded as UTF-8"
        ) from None
