"""The job that continues a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from cpumoe.generation import Generation, Prompt, Sampling, TextModel
from cpumoe.serving.errors import invalid, stopping
from cpumoe.serving.job import Job


class GenerationJob(Job[Generation]):
    """Continues a prompt.

    Attributes:
        streams: the client wants text as it is generated.
        prompt_tokens: how many, once the prompt is encoded.
    """

    def __init__(
        self,
        encode: Callable[[TextModel], Prompt],
        sampling: Sampling,
        *,
        streams: bool,
        prompt_param: str,
        limit_param: str,
        default_tokens: int | None = None,
        most_tokens: int | None = None,
    ) -> None:
        """Makes a job of the running event loop.

        Args:
            encode: returns the prompt; run by the worker, since it may take long.
            sampling: as the client asks.
            streams: the client wants text as it is generated.
            prompt_param: what the request calls its prompt.
            limit_param: what the request calls `sampling.max_new_tokens`.
            default_tokens: new tokens where the request does not say, as far as there is room;
                None: what there is room for.
            most_tokens: the operator's limit of new tokens; None: what there is room for.
        """
        super().__init__()
        self.streams = streams
        self.prompt_tokens = 0
        self._encode = encode
        self._sampling = sampling
        self._prompt_param = prompt_param
        self._limit_param = limit_param
        self._default_tokens = default_tokens
        self._most_tokens = most_tokens

    def run(self, model: TextModel) -> Generation:
        """Returns the whole generation; its pieces come before, where the client wants them."""
        # What the model refuses is the prompt's fault: sampling was checked before.
        try:
            prompt = self._encode(model)
            self.prompt_tokens = len(prompt.tokens)
            generation = model.generate(
                prompt,
                self._limited(model.context_length),
                on_piece=self.add_piece if self.streams else None,
                cancelled=lambda: self.cancelled,
            )
        except ValueError as error:
            raise invalid(str(error), self._prompt_param) from error
        if generation.finish_reason == "cancelled":
            raise stopping()
        return generation

    def _limited(self, context: int) -> Sampling:
        """The sampling within what the context and the operator allow."""
        used, asked = self.prompt_tokens, self._sampling.max_new_tokens
        if used == 0:
            raise invalid("the prompt is empty", self._prompt_param)
        if used >= context:
            raise invalid(
                f"the model's context length is {context} tokens, but the prompt has {used}: "
                "shorten it",
                self._prompt_param,
                "context_length_exceeded",
            )
        room = context - used
        wanted = asked or self._default_tokens or room
        if self._most_tokens is not None:
            wanted = min(wanted, self._most_tokens)
        if asked is None:
            wanted = min(wanted, room)
        elif wanted > room:
            raise invalid(
                f"the model's context length is {context} tokens, but {used + wanted} were "
                f"requested: {used} of the prompt and {self._limit_param}={wanted}",
                self._limit_param,
                "context_length_exceeded",
            )
        return dataclasses.replace(self._sampling, max_new_tokens=wanted)
