"""vLLM's protocol for tokens: /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cpumoe.text.generation import Prompt, TextModel
from cpumoe.text.serving.answer import CallAnswer, Document
from cpumoe.text.serving.body import StrictModel
from cpumoe.text.serving.errors import invalid
from cpumoe.text.serving.fields import Tokens
from cpumoe.text.serving.job import Call
from cpumoe.text.serving.openai_requests import Message, conversation
from cpumoe.text.serving.parameters import refuse_common
from cpumoe.text.serving.service import Service
from cpumoe.text.serving.tools import Tool


class TokenizeBody(StrictModel):
    """The body of /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def encoder(self) -> Callable[[TextModel], Prompt]:
        """Returns a function that encodes the text or the conversation.

        Raises:
            ApiError: a field is wrong; the message names it.
        """
        prompt, messages = self.prompt, self.messages
        if prompt is not None and messages is None:
            special = self.add_special_tokens is not False
            return lambda model: model.encode(prompt, add_special_tokens=special)
        if messages is None or prompt is not None:
            raise invalid("prompt: expected either prompt or messages", "prompt")
        if self.add_special_tokens:
            name = "add_special_tokens"
            raise invalid(
                f"{name} cannot be combined with messages; the chat template adds them", name
            )
        chat = conversation(messages)
        tools = [tool.document() for tool in self.tools or ()]

        arguments = self.chat_template_kwargs or {}
        return lambda model: model.encode_chat(chat, tools=tools, template_arguments=arguments)


class DetokenizeBody(StrictModel):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Tokens


def make_router(service: Service) -> APIRouter:
    """Returns the paths /tokenize and /detokenize."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await service.bodies.read(request, TokenizeBody)
        service.check_model(body.model)
        refuse_common(body.model_extra)
        encode = body.encoder()

        def call(model: TextModel) -> Document:
            tokens = encode(model).tokens
            texts = [model.decode([token]) for token in tokens] if body.return_token_strs else None
            return {
                "count": len(tokens),
                "max_model_len": model.context_length,
                "tokens": tokens,
                "token_strs": texts,
            }

        return CallAnswer(service.worker, Call(call, "messages" if body.messages else "prompt"))

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await service.bodies.read(request, DetokenizeBody)
        service.check_model(body.model)
        refuse_common(body.model_extra)
        call = Call(lambda model: {"prompt": model.decode(body.tokens)}, "tokens")
        return CallAnswer(service.worker, call)

    return router
