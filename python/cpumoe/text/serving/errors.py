"""Errors that clients get, always in OpenAI's format."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

logger = logging.getLogger("cpumoe.text.serving")

_INVALID = "invalid_request_error"
_SERVER = "server_error"
_LONGEST_TEXT = 600
# For clients of other protocols, such as Ollama's.
_PROTOCOLS = (
    "this server has OpenAI's API (/v1/chat/completions, /v1/completions, /v1/models) "
    "and SGLang's /generate"
)


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        status: the HTTP status.
        message: text for people.
        type: OpenAI's class of errors.
        param: the field of the request that is at fault.
        code: name of the error for programs.
        headers: headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Makes an error; see the class."""
        # Both may contain long texts from the client.
        message = _shortened(message)
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = None if param is None else _shortened(param)
        self.code = code
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        """Returns the answer's body."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def _shortened(text: str) -> str:
    half = _LONGEST_TEXT // 2
    return text if len(text) <= _LONGEST_TEXT else f"{text[:half]} … {text[-half:]}"


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error for a request that is invalid or not supported."""
    return ApiError(400, message, param=param, code=code)


def overloaded(retry_after: int, why: str) -> ApiError:
    """Returns the error for a server that has no room for another request."""
    return ApiError(
        503,
        f"the server is busy: it {why}; try again later",
        type=_SERVER,
        code="overloaded",
        headers={"Retry-After": str(retry_after)},
    )


def stopping() -> ApiError:
    """Returns the error for requests that the end of the server interrupts."""
    return ApiError(
        503,
        "the server is stopping",
        type=_SERVER,
        code="stopping",
        headers={"Retry-After": "5"},
    )


def internal(message: str = "the server failed to answer; see its log") -> ApiError:
    """Returns the error for faults of the server or of the model's files."""
    return ApiError(
        500,
        message,
        type=_SERVER,
        code="internal_error",
    )


def gone() -> ApiError:
    """Returns the error that ends a request whose client has disconnected."""
    return ApiError(499, "the client has disconnected", code="client_closed_request")


def refusal(error: ValidationError) -> ApiError:
    """Returns the error for a body that is no JSON or whose fields are wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return invalid(first["msg"], code="invalid_json")
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    problem = first.get("ctx", {}).get("error") or first["msg"]
    return invalid(f"{param}: {problem}" if param else str(problem), param=param or None)


def encode_json(document: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Returns the document in UTF-8. Half a surrogate pair stays an escape sequence."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "backslashreplace")


def json_response(
    document: Mapping[str, Any] | Sequence[Any],
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Returns an answer of one JSON document."""
    return Response(
        encode_json(document), status, headers=dict(headers or {}), media_type="application/json"
    )


def install_handlers(app: FastAPI, on_error: Callable[[ApiError], None]) -> None:
    """Makes every error of the application and of the framework an `ApiError` for the client.

    Args:
        app: the application.
        on_error: called with each error.
    """

    async def answer(_: Request, error: Exception) -> Response:
        if not isinstance(error, ApiError):
            # After this answer, the framework logs the error with its traceback.
            error = internal()
        on_error(error)
        return json_response(error.document(), error.status, error.headers)

    async def answer_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {
            404: f"no such path: {request.url.path}; {_PROTOCOLS}",
            405: f"{request.url.path} does not accept {request.method}",
        }
        codes = {404: "not_found", 405: "method_not_allowed"}
        status = error.status_code
        message = messages.get(status) or error.detail or HTTPStatus(status).phrase
        headers = dict(error.headers or {})
        if "GET" in headers.get("Allow", ""):
            headers["Allow"] += ", HEAD"
        known = ApiError(status, message, code=codes.get(status), headers=headers)
        return await answer(request, known)

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(Exception, answer)
