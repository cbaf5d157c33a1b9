"""The job that continues a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cpumoe.text.generation import Generation, Piece, Prompt, Sampling, TextModel
from cpumoe.text.serving.errors import ApiError, invalid, stopping
from cpumoe.text.serving.job import Job


@dataclass(frozen=True)
class Terms:
    """The common parameters of all texts of a request.

    Attributes:
        streams: whether the client wants text as it is generated.
        prompt_param: the request's name of its prompt.
        names: the request's names of attributes of `Sampling`, where they differ.
        default_tokens: the most new tokens if the request does not say; None: as many as there is
            room for.
        most_tokens: the operator's limit of new tokens; None: as many as there is room for.
    """

    streams: bool
    prompt_param: str
    names: Mapping[str, str]
    default_tokens: int | None = None
    most_tokens: int | None = None


class GenerationJob(Job[Generation]):
    """Continues a prompt.

    Attributes:
        prompt_tokens: number of tokens of the prompt, after it is encoded.
        prompt_text: text of the prompt, after it is encoded; empty if it was not requested.
        completion_tokens: number of generated tokens in the pieces that were read.
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
            terms: the request's common parameters.
            encode: returns the prompt. The worker calls it, because it may take long.
            sampling: the sampling that the client requests.
            text: returns the prompt's text. The worker calls it as well.
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
        """Returns the pieces since the last call and, at the end, the result; see `Job.read`."""
        pieces, result = await super().read(seconds)
        self.completion_tokens += sum(piece.tokens for piece in pieces)
        if result is not None:
            self.completion_tokens = result.completion_tokens
        return pieces, result

    def run(self, model: TextModel) -> Generation:
        """Returns the generation. If the client streams, pieces are added while it runs."""
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
        """Blames the prompt, unless the message begins with an attribute of `Sampling`."""
        subject, _, problem = message.partition(":")
        if subject in (field.name for field in dataclasses.fields(Sampling)):
            name = self._terms.names.get(subject, subject)
            return invalid(f"{name}:{problem}", name)
        return invalid(message, self._terms.prompt_param)

    def _limited(self, context: int) -> Sampling:
        """Returns the sampling within the limits of the context and the operator."""
        terms, used, asked = self._terms, self.prompt_tokens, self._sampling.max_new_tokens
        if used == 0:
            raise invalid("the prompt is empty", terms.prompt_param)
        if used > context - (asked != 0):
            raise invalid(
                f"the model's context length is {context} tokens, but the prompt has {used}; "
                "shorten the prompt",
                terms.prompt_param,
                "context_length_exceeded",
            )
        limits = [context - used, terms.default_tokens if asked is None else asked]
        limits.append(terms.most_tokens)
        wanted = min(limit for limit in limits if limit is not None)
        return dataclasses.replace(self._sampling, max_new_tokens=wanted)
