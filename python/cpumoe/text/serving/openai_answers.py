"""Writes answers in OpenAI's protocol, whole and as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from cpumoe.text.generation import Generation, Piece, TokenLogprob, ToolCall
from cpumoe.text.serving.answer import Document
from cpumoe.text.serving.generation_job import GenerationJob
from cpumoe.text.serving.openai_logprobs import CompletionLogprobs, characters, chat_logprobs
from cpumoe.text.serving.openai_requests import ChatBody, CompletionBody, OpenAiBody
from cpumoe.text.serving.tools import ForcedCalls


class OpenAiShape:
    """The common part of answers to chats and to plain completions."""

    prefix = ""
    kind = ""
    event_kind = ""

    def __init__(self, model: str, body: OpenAiBody) -> None:
        """Prepares the answer to a request.

        Args:
            model: the model's name for clients.
            body: the request.
        """
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }
        options = body.stream_options
        self._usage_last = options is not None and bool(options.include_usage)
        self._usage_always = options is not None and bool(options.continuous_usage_stats)
        self._answers = body.answers

    def whole(self, jobs: Sequence[GenerationJob], results: Sequence[Generation]) -> Document:
        """Returns the answer as one document."""
        choices = [
            self.choice(index, *both) for index, both in enumerate(zip(jobs, results, strict=True))
        ]
        return {**self._head, "choices": choices, "usage": self._usage(jobs)}

    def begin(self, jobs: Sequence[GenerationJob], index: int) -> list[Document]:
        """Returns the events before a choice's first text."""
        return []

    def piece(self, jobs: Sequence[GenerationJob], index: int, piece: Piece) -> list[Document]:
        """Returns the events of a choice's next piece."""
        return [self.event(jobs, choice) for choice in self.deltas(jobs[index], index, piece)]

    def end(self, jobs: Sequence[GenerationJob], index: int, result: Generation) -> list[Document]:
        """Returns the events after a choice's last piece."""
        return [self.event(jobs, choice) for choice in self.last(jobs[index], index, result)]

    def close(self, jobs: Sequence[GenerationJob]) -> list[Document]:
        """Returns the events after all choices."""
        if not self._usage_last:
            return []
        return [
            {**self._head, "object": self.event_kind, "choices": [], "usage": self._usage(jobs)}
        ]

    def choice(self, index: int, job: GenerationJob, result: Generation) -> Document:
        """Returns a whole text as a choice."""
        raise NotImplementedError

    def deltas(self, job: GenerationJob, index: int, piece: Piece) -> list[Document]:
        """Returns a piece as choices of events."""
        raise NotImplementedError

    def last(self, job: GenerationJob, index: int, result: Generation) -> list[Document]:
        """Returns a text's end as choices of events."""
        raise NotImplementedError

    def event(self, jobs: Sequence[GenerationJob], choice: Document) -> Document:
        """Returns an event with one choice."""
        event = {**self._head, "object": self.event_kind, "choices": [choice]}
        if self._usage_always:
            event["usage"] = self._usage(jobs)
        elif self._usage_last:
            event["usage"] = None
        return event

    def _usage(self, jobs: Sequence[GenerationJob]) -> Document:
        # The answers to one prompt are consecutive.
        prompt = sum(job.prompt_tokens for job in jobs[:: self._answers])
        completion = sum(job.completion_tokens for job in jobs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


class CompletionShape(OpenAiShape):
    """Answers of /v1/completions."""

    prefix = "cmpl"
    kind = event_kind = "text_completion"

    def __init__(self, model: str, body: CompletionBody) -> None:
        """Prepares the answer to a request; see the base class."""
        super().__init__(model, body)
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs is not None
        self._offsets: dict[int, CompletionLogprobs] = {}
        self._sent: dict[int, int] = {}

    def choice(self, index: int, job: GenerationJob, result: Generation) -> Document:
        """Returns a whole text as a choice."""
        text = (job.prompt_text if self._echo else "") + result.text
        prompt = result.prompt_logprobs or ()
        # Characters of tokens that the tokenizer adds before the text.
        before = max(0, characters(prompt) - len(job.prompt_text))
        tokens = (*prompt, *(result.logprobs or ()))
        return self._choice(index, text, tokens, result.finish_reason, before=before)

    def begin(self, jobs: Sequence[GenerationJob], index: int) -> list[Document]:
        """Returns the events before a choice's first text: the prompt, if it is echoed."""
        if not self._echo or self._logprobs:
            return []
        return [self.event(jobs, self._choice(index, jobs[index].prompt_text, (), None))]

    def deltas(self, job: GenerationJob, index: int, piece: Piece) -> list[Document]:
        """Returns a piece as choices of events."""
        if self._echo and self._logprobs:
            # Log probabilities of the prompt come first, and are part of the result.
            return []
        self._sent[index] = self._sent.get(index, 0) + len(piece.logprobs)
        return [self._choice(index, piece.text, piece.logprobs, None)]

    def last(self, job: GenerationJob, index: int, result: Generation) -> list[Document]:
        """Returns a text's end as choices of events."""
        if self._echo and self._logprobs:
            return [self.choice(index, job, result)]
        tokens = (result.logprobs or ())[self._sent.get(index, 0) :]
        return [self._choice(index, "", tokens, result.finish_reason)]

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenLogprob],
        reason: str | None,
        *,
        before: int = 0,
    ) -> Document:
        logprobs = None
        if self._logprobs:
            offsets = self._offsets.setdefault(index, CompletionLogprobs())
            logprobs = offsets.document(tokens, before=before)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class ChatShape(OpenAiShape):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def __init__(self, model: str, body: ChatBody) -> None:
        """Prepares the answer to a request; see the base class."""
        super().__init__(model, body)
        self._logprobs = bool(body.logprobs)
        self._forced: ForcedCalls | None = body.forced_calls()
        # The client's limit of calls, whatever the model does.
        self._most_calls = 1 if body.parallel_tool_calls is False else None
        self._sent: dict[int, int] = {}
        self._calls: dict[int, int] = {}

    def choice(self, index: int, job: GenerationJob, result: Generation) -> Document:
        """Returns a whole text as a choice."""
        text, calls = result.text, self._all_calls(result)
        if self._forced is not None:
            text = ""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if result.reasoning:
            message["reasoning_content"] = result.reasoning
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [_tool_call(call) for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(result.logprobs or ()) if self._logprobs else None,
            "finish_reason": _reason(result, calls),
        }

    def begin(self, jobs: Sequence[GenerationJob], index: int) -> list[Document]:
        """Returns the events before a choice's first text: the role."""
        content = None if self._forced is not None else ""
        return [self.event(jobs, _delta(index, {"role": "assistant", "content": content}))]

    def deltas(self, job: GenerationJob, index: int, piece: Piece) -> list[Document]:
        """Returns a piece as choices of events."""
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if self._forced is not None:
            delta |= self._forced_delta(index, piece.text)
        elif piece.text:
            delta["content"] = piece.text
        new = piece.tool_calls
        if self._most_calls is not None:
            new = new[: self._most_calls - self._calls.get(index, 0)]
        if new:
            delta |= self._new_calls(index, new)
        self._sent[index] = self._sent.get(index, 0) + len(piece.logprobs)
        if not delta and not piece.logprobs:
            return []
        return [_delta(index, delta, self._worded(piece.logprobs))]

    def last(self, job: GenerationJob, index: int, result: Generation) -> list[Document]:
        """Returns a text's end as choices of events."""
        calls = self._all_calls(result)
        # Calls that were not sent yet. Forced calls wait until they are complete.
        new = calls[self._calls.get(index, 0) :]
        choices = [_delta(index, self._new_calls(index, new))] if new else []
        tokens = (result.logprobs or ())[self._sent.get(index, 0) :]
        logprobs = self._worded(tokens) if tokens else None
        return [*choices, _delta(index, {}, logprobs, _reason(result, calls))]

    def _all_calls(self, result: Generation) -> Sequence[ToolCall]:
        """Returns the calls in the reply's own format, else those in the text of forced calls."""
        calls = result.tool_calls
        if self._forced is not None and result.text and not calls:
            calls = self._forced.calls(result.text)
        return calls[: self._most_calls]

    def _worded(self, tokens: Sequence[TokenLogprob]) -> Document | None:
        return chat_logprobs(tokens) if self._logprobs else None

    def _forced_delta(self, index: int, text: str) -> Document:
        """Returns new arguments of a named function. Other calls wait until they are complete."""
        assert self._forced is not None
        if not self._forced.named or not text:
            return {}
        if index in self._calls:
            return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
        return self._new_calls(index, self._forced.calls(text))

    def _new_calls(self, index: int, calls: Sequence[ToolCall]) -> Document:
        first = self._calls.get(index, 0)
        self._calls[index] = first + len(calls)
        return {
            "tool_calls": [
                {"index": number, **_tool_call(call)} for number, call in enumerate(calls, first)
            ]
        }


def _delta(
    index: int, delta: Document, logprobs: Document | None = None, reason: str | None = None
) -> Document:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _tool_call(call: ToolCall) -> Document:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _reason(result: Generation, calls: Sequence[ToolCall]) -> str:
    """Returns the finish reason, which is "tool_calls" only if the answer was not cut off."""
    return "tool_calls" if calls and result.finish_reason == "stop" else result.finish_reason
