"""SGLang's protocol: /generate."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field

from cpumoe.text.generation import Generation, Piece, Sampling, TokenLogprob
from cpumoe.text.serving.answer import BLANK_LINE, Answer, Answered, Document
from cpumoe.text.serving.body import StrictModel
from cpumoe.text.serving.errors import invalid
from cpumoe.text.serving.fields import (
    Count,
    Integer,
    SamplingFields,
    Seed,
    TokenLimit,
    TopLogprobs,
    check_texts,
    choice_seed,
    is_tokens,
)
from cpumoe.text.serving.generation_job import GenerationJob, Terms
from cpumoe.text.serving.openai_api import encoder
from cpumoe.text.serving.parameters import refuse_common
from cpumoe.text.serving.service import Service

# SGLang's default.
_MAX_NEW_TOKENS = 128
_NAMES = {
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "logprobs": "top_logprobs_num",
    "prompt_logprobs": "top_logprobs_num",
}


class SamplingParams(SamplingFields):
    """The sampling of a request."""

    max_new_tokens: TokenLimit = None
    min_new_tokens: Count | None = None
    sampling_seed: Seed = None
    n: Annotated[Integer, Field(ge=1)] | None = None
    json_schema: str | None = None

    def samplings(self, **others: Any) -> list[Sampling]:
        """Returns the sampling of each answer to the prompt.

        Raises:
            ApiError: a value is not supported or out of its range.
        """
        refuse_common(self.model_extra)
        return [
            self.sampling(
                _NAMES,
                max_new_tokens=self.max_new_tokens,
                min_tokens=self.min_new_tokens or 0,
                seed=choice_seed(self.sampling_seed, choice),
                json_schema=self.json_schema or None,
                **others,
            )
            for choice in range(self.n or 1)
        ]


def _text_or_texts(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(t, str) for t in value):
        raise ValueError("expected a string or a list of strings")
    return value


def _tokens_or_lists(value: Any) -> Any:
    if value is None or is_tokens(value):
        return value
    if not isinstance(value, list) or not all(map(is_tokens, value)):
        raise ValueError("expected a list of token ids, integers of 0 or more, or a list of these")
    return value


class GenerateBody(StrictModel):
    """The body of /generate."""

    text: Annotated[Any, BeforeValidator(_text_or_texts)] = None
    input_ids: Annotated[Any, BeforeValidator(_tokens_or_lists)] = None
    sampling_params: SamplingParams | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[Integer, Field(ge=-1)] | None = None
    top_logprobs_num: TopLogprobs = None
    return_text_in_logprobs: bool | None = None

    ignored: ClassVar[frozenset[str]] = frozenset({"stream_options"})

    @property
    def prompt_param(self) -> str:
        """Name of the field that has the prompts."""
        return "text" if self.input_ids is None else "input_ids"

    @property
    def prompts(self) -> list[Any]:
        """The prompts, each a text or a list of token ids.

        Raises:
            ApiError: there are no prompts, or both fields have some.
        """
        if (self.text is None) == (self.input_ids is None):
            raise invalid("text: expected either text or input_ids", "text")
        given = self.text if self.input_ids is None else self.input_ids
        return given if self._is_list else [given]

    @property
    def _is_list(self) -> bool:
        if self.input_ids is None:
            return isinstance(self.text, list)
        return bool(self.input_ids) and isinstance(self.input_ids[0], list)

    @property
    def answers_with_list(self) -> bool:
        """Whether the answer is a list of texts."""
        return self._is_list or self.answers > 1

    @property
    def parameters(self) -> SamplingParams:
        """The sampling of the request."""
        return self.sampling_params or SamplingParams()

    @property
    def answers(self) -> int:
        """Number of answers to each prompt."""
        return self.parameters.n or 1

    @property
    def ids(self) -> list[str]:
        """An id for each answer."""
        count = len(self.prompts) * self.answers
        if isinstance(self.rid, list) and len(self.rid) == len(self.prompts):
            return [rid for rid in self.rid for _ in range(self.answers)]
        if isinstance(self.rid, str) and count == 1:
            return [self.rid]
        prefix = f"{self.rid}-" if isinstance(self.rid, str) else ""
        return [f"{prefix}{uuid.uuid4().hex}" for _ in range(count)]

    def logprobs(self) -> dict[str, int]:
        """Returns the attributes of `Sampling` that request log probabilities."""
        if not self.return_logprob:
            return {}
        top = self.top_logprobs_num or 0
        asked = {"logprobs": top}
        return asked if self.logprob_start is None else {**asked, "prompt_logprobs": top}

    @property
    def logprob_start(self) -> int | None:
        """The prompt's first token whose log probability is requested, if any."""
        start = self.logprob_start_len
        return None if not self.return_logprob or start is None or start < 0 else start


class _Shape:
    """Writes answers in SGLang's format, whose events have the whole text so far."""

    def __init__(self, body: GenerateBody) -> None:
        self._body = body
        self._ids = body.ids
        self._start = time.monotonic()
        self._text = ""
        self._tokens: list[TokenLogprob] = []

    def whole(self, jobs: Sequence[GenerationJob], results: Sequence[Generation]) -> Answered:
        documents = [self._whole(index, result) for index, result in enumerate(results)]
        return documents if self._body.answers_with_list else documents[0]

    def begin(self, jobs: Sequence[GenerationJob], index: int) -> Sequence[Document]:
        self._text, self._tokens = "", []
        return []

    def piece(self, jobs: Sequence[GenerationJob], index: int, piece: Piece) -> Sequence[Document]:
        self._text += piece.text
        self._tokens += piece.logprobs
        job = jobs[index]
        information = {
            **self._information(index, None, job.prompt_tokens, job.completion_tokens),
            **self._logprobs((), self._tokens),
        }
        return [self._numbered(index, {"text": self._text, "meta_info": information})]

    def end(
        self, jobs: Sequence[GenerationJob], index: int, result: Generation
    ) -> Sequence[Document]:
        return [self._numbered(index, self._whole(index, result))]

    def close(self, jobs: Sequence[GenerationJob]) -> Sequence[Document]:
        return []

    def _numbered(self, index: int, document: Document) -> Document:
        return {**document, "index": index} if self._body.answers_with_list else document

    def _whole(self, index: int, result: Generation) -> Document:
        reason: dict[str, Any] = {"type": result.finish_reason}
        if result.finish_reason == "length":
            reason["length"] = result.completion_tokens
        information = {
            **self._information(index, reason, result.prompt_tokens, result.completion_tokens),
            **self._logprobs(result.prompt_logprobs or (), result.logprobs or ()),
            "e2e_latency": time.monotonic() - self._start,
        }
        return {"text": result.text, "meta_info": information}

    def _information(
        self, index: int, reason: Document | None, prompt: int, completion: int
    ) -> dict[str, Any]:
        return {
            "id": self._ids[index],
            "finish_reason": reason,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            # Requests do not share a cache.
            "cached_tokens": 0,
        }

    def _logprobs(
        self, prompt: Sequence[TokenLogprob], output: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        if not self._body.return_logprob:
            return {}
        read = prompt[self._body.logprob_start or 0 :]
        # SGLang computes from this token on, so it has no log probability.
        first = [[None, *self._row(token)[1:]] for token in read[:1]]
        lists: dict[str, Any] = {
            "input_token_logprobs": [*first, *map(self._row, read[1:])],
            "output_token_logprobs": [*map(self._row, output)],
        }
        if self._body.top_logprobs_num:
            rows = [[self._row(other) for other in token.top] for token in read[1:]]
            lists["input_top_logprobs"] = [*([None] * len(first)), *rows]
            lists["output_top_logprobs"] = [
                [self._row(other) for other in token.top] for token in output
            ]
        return lists

    def _row(self, token: TokenLogprob) -> list[Any]:
        text = token.text if self._body.return_text_in_logprobs else None
        return [token.logprob, token.token_id, text]


def make_router(service: Service) -> APIRouter:
    """Returns the path /generate."""
    router = APIRouter()

    @router.post("/generate")
    async def generate(request: Request) -> Response:
        body = await service.bodies.read(request, GenerateBody)
        refuse_common(body.model_extra, ignored=body.ignored)
        check_texts(len(body.prompts), body.answers, service.worker.capacity, body.prompt_param)
        jobs = _jobs(service, body)
        return Answer(
            service.worker,
            jobs,
            _Shape(body),
            streams=bool(body.stream),
            sign_of_life=BLANK_LINE,
        )

    return router


def _jobs(service: Service, body: GenerateBody) -> list[GenerationJob]:
    terms = Terms(
        bool(body.stream),
        body.prompt_param,
        _NAMES,
        _MAX_NEW_TOKENS,
        service.settings.max_tokens,
    )
    samplings, jobs = body.parameters.samplings(**body.logprobs()), []
    for prompt in body.prompts:
        encode, _ = encoder(prompt)
        jobs += [GenerationJob(terms, encode, sampling) for sampling in samplings]
    return jobs
