"""SGLang's own protocol: /generate."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cpumoe.generation import Generation, Prompt
from cpumoe.serving.answer import Answer, Document
from cpumoe.serving.body import StrictModel
from cpumoe.serving.errors import invalid
from cpumoe.serving.generation_job import GenerationJob
from cpumoe.serving.requests import (
    OptionalPromptField,
    StopStringsField,
    make_sampling,
    refuse_unsupported,
)
from cpumoe.serving.service import Service

# SGLang's own default.
_MAX_NEW_TOKENS = 128
_IGNORED = {"log_metrics", "priority", "bootstrap_room"}
_NEUTRAL: dict[str, Sequence[Any]] = {
    "return_logprob": (False,),
    "logprob_start_len": (-1,),
    "top_logprobs_num": (0,),
    "token_ids_logprob": (),
    "return_text_in_logprobs": (False,),
    "return_hidden_states": (False,),
    "input_embeds": (),
    "image_data": (),
    "video_data": (),
    "audio_data": (),
    "lora_path": (),
    "session_params": (),
    "custom_logit_processor": (),
}
_SAMPLING_NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,),
    "top_k": (-1, 1 << 30),
    "min_p": (0,),
    "min_new_tokens": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "no_stop_trim": (False,),
    "stop_token_ids": ([],),
    "stop_regex": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "custom_params": (),
}


class _SamplingParams(StrictModel):
    temperature: float | None = None
    max_new_tokens: Annotated[int | None, Field(ge=1)] = None
    top_p: float | None = None
    stop: StopStringsField = None
    sampling_seed: int | None = None


class GenerateBody(StrictModel):
    """The body of /generate."""

    text: OptionalPromptField = None
    input_ids: OptionalPromptField = None
    sampling_params: _SamplingParams | None = None
    stream: bool | None = None
    rid: str | None = None


class _Shape:
    """An answer in SGLang's words: every event has the whole text so far."""

    def __init__(self, request_id: str) -> None:
        self._id = request_id
        self._start = time.monotonic()
        self._text = ""

    def whole(self, job: GenerationJob, generation: Generation) -> Document:
        reason: dict[str, Any] = {"type": generation.finish_reason}
        if generation.finish_reason == "length":
            reason["length"] = generation.completion_tokens
        information = {
            "id": self._id,
            "finish_reason": reason,
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "e2e_latency": time.monotonic() - self._start,
        }
        return {"text": generation.text, "meta_info": information}

    def begin(self) -> Sequence[Document]:
        return []

    def piece(self, job: GenerationJob, text: str) -> Document:
        self._text += text
        information = {
            "id": self._id,
            "finish_reason": None,
            "prompt_tokens": job.prompt_tokens,
        }
        return {"text": self._text, "meta_info": information}

    def end(self, job: GenerationJob, generation: Generation) -> Sequence[Document]:
        return [self.whole(job, generation)]


def make_router(service: Service) -> APIRouter:
    """Returns the path /generate."""
    router = APIRouter()

    @router.post("/generate")
    async def generate(request: Request) -> Response:
        body = await service.bodies.read(request, GenerateBody)
        refuse_unsupported(body.model_extra, _NEUTRAL, _IGNORED)
        if body.sampling_params is not None:
            refuse_unsupported(body.sampling_params.model_extra, _SAMPLING_NEUTRAL, ())
        return Answer(service.worker, _job(service, body), _Shape(body.rid or uuid.uuid4().hex))

    return router


def _job(service: Service, body: GenerateBody) -> GenerationJob:
    text, tokens = body.text, body.input_ids
    asked = body.sampling_params or _SamplingParams()
    if (text is None) == (tokens is None):
        raise invalid("expected either text or input_ids", "text")
    if isinstance(tokens, str) or isinstance(text, list):
        raise invalid("text is a string, input_ids a list of token ids", "text")
    sampling = make_sampling(
        asked.max_new_tokens,
        asked.temperature,
        asked.top_p,
        asked.stop,
        asked.sampling_seed,
    )
    return GenerationJob(
        lambda model: model.encode(text) if tokens is None else Prompt(tuple(tokens)),
        sampling,
        streams=bool(body.stream),
        prompt_param="text" if tokens is None else "input_ids",
        limit_param="max_new_tokens",
        default_tokens=_MAX_NEW_TOKENS,
        most_tokens=service.settings.max_tokens,
    )
