"""OpenAI's protocol: /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from cpumoe.text.generation import Prompt, TextModel
from cpumoe.text.serving.answer import Answer, Document
from cpumoe.text.serving.errors import json_response
from cpumoe.text.serving.fields import check_texts
from cpumoe.text.serving.generation_job import GenerationJob, Terms
from cpumoe.text.serving.openai_answers import ChatShape, CompletionShape
from cpumoe.text.serving.openai_requests import ChatBody, CompletionBody, OpenAiBody
from cpumoe.text.serving.service import Service

# OpenAI's default for /v1/completions. A chat has no limit by default.
_COMPLETION_TOKENS = 16


def make_router(service: Service) -> APIRouter:
    """Returns the paths below /v1."""
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await service.bodies.read(request, ChatBody)
        _check(service, body)
        check_texts(1, body.answers, service.worker.capacity, "messages")
        shape = ChatShape(service.name, body)
        return Answer(service.worker, _chat_jobs(service, body), shape, streams=bool(body.stream))

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body = await service.bodies.read(request, CompletionBody)
        _check(service, body)
        check_texts(len(body.prompt), body.answers, service.worker.capacity, "prompt")
        shape = CompletionShape(service.name, body)
        jobs = _completion_jobs(service, body)
        return Answer(service.worker, jobs, shape, streams=bool(body.stream))

    @router.get("/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model_card(service)]})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        service.check_model(name)
        return json_response(_model_card(service))

    return router


def _check(service: Service, body: OpenAiBody) -> None:
    service.check_model(body.model)
    body.check()


def _model_card(service: Service) -> Document:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "cpumoe",
        "max_model_len": service.context_length,
    }


def _chat_jobs(service: Service, body: ChatBody) -> list[GenerationJob]:
    messages = body.conversation()
    tools = [tool.document() for tool in body.offered_tools]
    names = dict(body.names)
    if body.forced_calls() is not None:
        names["json_schema"] = "tools"

    def encode(model: TextModel) -> Prompt:
        return model.encode_chat(messages, tools=tools, template_arguments=body.template_arguments)

    terms = Terms(bool(body.stream), "messages", names, None, service.settings.max_tokens)
    encode_once = _once(encode)
    return [GenerationJob(terms, encode_once, sampling) for sampling in body.samplings()]


def _completion_jobs(service: Service, body: CompletionBody) -> list[GenerationJob]:
    terms = Terms(
        bool(body.stream), "prompt", body.names, _COMPLETION_TOKENS, service.settings.max_tokens
    )
    special = body.add_special_tokens is not False
    samplings, jobs = body.samplings(), []
    for prompt in body.prompt:
        encode, text = encoder(prompt, add_special_tokens=special)
        more = {"text": text} if body.echo else {}
        jobs += [GenerationJob(terms, encode, sampling, **more) for sampling in samplings]
    return jobs


def encoder(
    prompt: str | list[int], *, add_special_tokens: bool = True
) -> tuple[Callable[[TextModel], Prompt], Callable[[TextModel], str]]:
    """Returns a function that encodes a prompt, and one that returns its text."""
    if not isinstance(prompt, str):
        return lambda _: Prompt(tuple(prompt)), lambda model: model.decode(prompt)
    encode = _once(lambda model: model.encode(prompt, add_special_tokens=add_special_tokens))
    return encode, lambda _: prompt


def _once(encode: Callable[[TextModel], Prompt]) -> Callable[[TextModel], Prompt]:
    """Returns a function that encodes a prompt once for several answers."""
    prompts: list[Prompt] = []

    def encode_once(model: TextModel) -> Prompt:
        if not prompts:
            prompts.append(encode(model))
        return prompts[0]

    return encode_once
