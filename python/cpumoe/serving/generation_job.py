"""The job that continues a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cpumoe.generation import Generation, Piece, Prompt, Sampling, TextModel
from cpumoe.serving.errors import ApiError, invalid, stopping
from cpumoe.serving.job import Job


@dataclass(frozen=True)
class Terms:
    """What all texts of a request share.

    Attributes:
        streams: the client wants text as it is generated.
        prompt_param: what the request calls its prompt.
        names: what the request calls attributes of `Sampling`, where that differs.
        default_tokens: new tokens where the request does not say, as far as there is room; None:
            what there is room for.
        most_tokens: the operator's limit of new tokens; None: what there is room for.
    """

    streams: bool
    prompt_param: str
    names: Mapping[str, str]
    default_tokens: int | None = None
    most_tokens: int | None = None


class GenerationJob(Job[Generation]):
    """Continues a prompt.

    Attributes:
        prompt_tokens: how many, once the prompt is encoded.
        prompt_text: what the prompt says, once it is encoded; empty where nobody asked.
        completion_tokens: how many of those that were read.
    """

    def __init__(
        self,
        terms: Terms,
        encode: Callable[[TextModel], Prompt],
        sampling: Sampling,
        *,
        text: Callable[[TextModel], str] = lambda _: "",
    ) -> None:
        """Makes a job of the running event loop.

        Args:
            terms: of the request.
            encode: returns the prompt; run by the worker, since it may take long.
            sampling: as the client asks.
            text: returns what the prompt says; likewise.
        """
        super().__init__()
        self.prompt_tokens = 0
        self.prompt_text = ""
        self.completion_tokens = 0
        self._terms = terms
        self._encode = encode
        self._sampling = sampling
        self._text = text

    async def read(self, seconds: float | None = None) -> tuple[list[Piece], Generation | None]:
        """Returns the pieces since the last call and, at the end, the whole; see the base class."""
        pieces, result = await super().read(seconds)
        self.completion_tokens += sum(piece.tokens for piece in pieces)
        if result is not None:
            self.completion_tokens = result.completion_tokens
        return pieces, result

    def run(self, model: TextModel) -> Generation:
        """Returns the whole generation; its pieces come before, where the client wants them."""
        try:
            prompt = self._encode(model)
            self.prompt_tokens = len(prompt.tokens)
            sampling = self._limited(model.context_length)
            self.prompt_text = self._text(model)
            generation = model.generate(
                prompt,
                sampling,
                on_piece=self.add_piece if self._terms.streams else None,
                cancelled=lambda: self.cancelled,
            )
        except ValueError as error:
            raise self._refused(str(error)) from error
        if generation.finish_reason == "cancelled":
            raise stopping()
        return generation

    def _refused(self, message: str) -> ApiError:
        """What the model refuses is the prompt's fault, unless the message says otherwise."""
        subject, _, problem = message.partition(":")
        if subject in (field.name for field in dataclasses.fields(Sampling)):
            name = self._terms.names.get(subject, subject)
            return invalid(f"{name}:{problem}", name)
        return invalid(message, self._terms.prompt_param)

    def _limited(self, context: int) -> Sampling:
        """The sampling within what the context and the operator allow."""
        terms, used, asked = self._terms, self.prompt_tokens, self._sampling.max_new_tokens
        if used == 0:
            raise invalid("the prompt is empty", terms.prompt_param)
        if used > context - (asked != 0):
            raise invalid(
                f"the model's context length is {context} tokens, but the prompt has {used}: "
                "shorten it",
                terms.prompt_param,
                "context_length_exceeded",
            )
        limits = [context - used, terms.default_tokens if asked is None else asked]
        limits.append(terms.most_tokens)
        wanted = min(limit for limit in limits if limit is not None)
        return dataclasses.replace(self._sampling, max_new_tokens=wanted)
