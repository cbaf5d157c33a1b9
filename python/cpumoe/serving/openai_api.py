"""OpenAI's protocol: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cpumoe.generation import Generation, Prompt, TextModel
from cpumoe.serving.answer import Answer, Document
from cpumoe.serving.body import StrictModel
from cpumoe.serving.errors import ApiError, invalid, json_response
from cpumoe.serving.generation_job import GenerationJob
from cpumoe.serving.requests import (
    MessageText,
    PromptField,
    StopStringsField,
    make_sampling,
    refuse_unsupported,
)
from cpumoe.serving.service import Service

# OpenAI's own default of /v1/completions; a chat goes on until the model ends it.
_COMPLETION_TOKENS = 16
# They do not change what is generated.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
# Of messages; clients send back what servers gave them.
_MESSAGE_IGNORED = {"name", "annotations", "reasoning", "reasoning_content", "refusal"}
_MESSAGE_NEUTRAL: dict[str, Sequence[Any]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "tool_call_id": (),
}
_TokenLimit = Annotated[int | None, Field(ge=1)]


class _StreamOptions(StrictModel):
    include_usage: bool = False
    # Pads events against observers of an encrypted stream; this server does not encrypt.
    include_obfuscation: bool = False


class _Body(StrictModel):
    model: str | None = None
    max_tokens: _TokenLimit = None
    temperature: float | None = None
    top_p: float | None = None
    stop: StopStringsField = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: MessageText


class ChatBody(_Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: _TokenLimit = None


class CompletionBody(_Body):
    """The body of /v1/completions."""

    prompt: PromptField


class _Shape:
    """An answer in OpenAI's words; chat and plain completions differ in their choices."""

    prefix = ""
    name = ""

    def __init__(self, model: str, body: _Body) -> None:
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.name,
            "created": int(time.time()),
            "model": model,
        }
        options = body.stream_options
        self._usage = options is not None and options.include_usage

    def whole(self, job: GenerationJob, generation: Generation) -> Document:
        """Returns the answer as one document."""
        choice = self.choice(generation.text, generation.finish_reason)
        return {**self._head, "choices": [choice], "usage": _usage(generation)}

    def begin(self) -> Sequence[Document]:
        """Returns the events before the first text."""
        return []

    def piece(self, job: GenerationJob, text: str) -> Document:
        """Returns the event of the next piece of text."""
        return self._event(self.delta(text, None))

    def end(self, job: GenerationJob, generation: Generation) -> Sequence[Document]:
        """Returns the events after the last text."""
        events = [self._event(self.delta("", generation.finish_reason))]
        if self._usage:
            events.append({**self._event(), "usage": _usage(generation)})
        return events

    def choice(self, text: str, finish_reason: str) -> Document:
        """Returns the whole text as a choice."""
        raise NotImplementedError

    def delta(self, text: str, finish_reason: str | None) -> Document:
        """Returns a piece of text as a choice."""
        raise NotImplementedError

    def _event(self, *choices: Document) -> Document:
        event = {**self._head, "choices": choices}
        return {**event, "usage": None} if self._usage else event


class _CompletionShape(_Shape):
    prefix = "cmpl"
    name = "text_completion"

    def choice(self, text: str, finish_reason: str | None) -> Document:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}

    delta = choice


class _ChatShape(_Shape):
    prefix = "chatcmpl"
    name = "chat.completion"

    def begin(self) -> Sequence[Document]:
        self._head["object"] = "chat.completion.chunk"
        return [self._event(_chat_delta({"role": "assistant", "content": ""}, None))]

    def choice(self, text: str, finish_reason: str) -> Document:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def delta(self, text: str, finish_reason: str | None) -> Document:
        return _chat_delta({"content": text} if text else {}, finish_reason)


def _chat_delta(delta: Document, finish_reason: str | None) -> Document:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _usage(generation: Generation) -> Document:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "total_tokens": generation.prompt_tokens + generation.completion_tokens,
    }


def make_router(service: Service) -> APIRouter:
    """Returns the paths below /v1."""
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await service.bodies.read(request, ChatBody)
        _check(service, body)
        return Answer(service.worker, _chat_job(service, body), _ChatShape(service.name, body))

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body = await service.bodies.read(request, CompletionBody)
        _check(service, body)
        return Answer(
            service.worker, _completion_job(service, body), _CompletionShape(service.name, body)
        )

    @router.get("/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model_card(service)]})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(service, name)
        return json_response(_model_card(service))

    return router


def _check(service: Service, body: _Body) -> None:
    _check_model(service, body.model)
    refuse_unsupported(body.model_extra, _NEUTRAL, _IGNORED)
    if body.stream_options is not None:
        if not body.stream:
            raise invalid("stream_options: only with stream=true", "stream_options")
        if body.stream_options.include_obfuscation:
            name = "stream_options.include_obfuscation"
            raise invalid(f"{name}: this server does not support it", name, "unsupported_parameter")


def _check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.name:
        raise ApiError(
            404,
            f"the model {name!r} does not exist; this server has {service.name!r}",
            param="model",
            code="model_not_found",
        )


def _model_card(service: Service) -> Document:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "cpumoe",
        "max_model_len": service.context_length,
    }


def _chat_job(service: Service, body: ChatBody) -> GenerationJob:
    messages = []
    for index, message in enumerate(body.messages):
        try:
            refuse_unsupported(message.model_extra, _MESSAGE_NEUTRAL, _MESSAGE_IGNORED)
        except ApiError as error:
            where = f"messages[{index}]"
            raise invalid(
                f"{where}: {error.message}", f"{where}.{error.param}", error.code
            ) from None
        # OpenAI's newer name of the same role; chat templates know the older.
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": message.content})
    new = body.max_completion_tokens is not None
    limit = body.max_completion_tokens if new else body.max_tokens

    def encode(model: TextModel) -> Prompt:
        return model.encode_chat(messages)

    return GenerationJob(
        encode,
        make_sampling(limit, body.temperature, body.top_p, body.stop, body.seed),
        streams=bool(body.stream),
        prompt_param="messages",
        limit_param="max_completion_tokens" if new else "max_tokens",
        most_tokens=service.settings.max_tokens,
    )


def _completion_job(service: Service, body: CompletionBody) -> GenerationJob:
    prompt = body.prompt
    return GenerationJob(
        lambda model: model.encode(prompt) if isinstance(prompt, str) else Prompt(tuple(prompt)),
        make_sampling(body.max_tokens, body.temperature, body.top_p, body.stop, body.seed),
        streams=bool(body.stream),
        prompt_param="prompt",
        limit_param="max_tokens",
        default_tokens=_COMPLETION_TOKENS,
        most_tokens=service.settings.max_tokens,
    )
