"""Reads a request's body within limits of size, time, memory and work."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema
from starlette.requests import ClientDisconnect

from cpumoe.text.serving.errors import ApiError, gone, invalid, overloaded, refusal

_BODY_SECONDS = 60
# Larger bodies are parsed outside of the event loop.
_SMALL_BYTES = 1 << 16
# Bodies that wait to be parsed may together have this many times the largest allowed size.
_LARGEST_BODIES = 8
# Parsing takes about 0.2 us per string, list and object, and 0.03 us per number. It stops all other
# Python code. No conversation has so many parts, and few contexts have so many tokens.
_MOST_PARTS = 1 << 16
_MOST_VALUES = 1 << 19

_Body = TypeVar("_Body", bound=BaseModel)


def _failing_fast(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_failing_fast(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _failing_fast(value) for key, value in schema.items()}
    if schema.get("type") in ("list", "tuple", "set", "frozenset"):
        changed["fail_fast"] = True
    return changed


class StrictModel(BaseModel):
    """A JSON object whose values are not converted. Unknown fields stay in `model_extra`.

    Lists are read up to their first wrong element, because reporting all of them could take longer
    than the request itself.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Returns Pydantic's schema, with `FailFast` for every list in it."""
        schema: CoreSchema = _failing_fast(handler(source))
        return schema


class BodyReader:
    """Reads the bodies of all requests to a server.

    Attributes:
        bytes: bytes of bodies that are not parsed yet.
    """

    def __init__(self, max_bytes: int) -> None:
        """Reads bodies of at most `max_bytes`."""
        self._max_bytes = max_bytes
        self.bytes = 0
        self._parsing = asyncio.Lock()

    async def read(self, request: Request, model: type[_Body]) -> _Body:
        """Returns a request's body as a model.

        Raises:
            ApiError: the body is too large, too slow, no JSON, or does not fit the model.
        """
        media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if media_type != "application/json":
            # Browsers ask the server before they send this type to another site, so a web page
            # cannot use a server on its reader's computer.
            raise ApiError(415, f"Content-Type: expected application/json, got {media_type!r}")
        body = bytearray()
        try:
            await asyncio.wait_for(self._receive(request, body), _BODY_SECONDS)
            return await self._parse(model, bytes(body))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request's body took more than {_BODY_SECONDS} s") from None
        except ClientDisconnect:
            raise gone() from None
        except ValidationError as error:
            raise refusal(error) from None
        finally:
            self.bytes -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        measure = _Measure()
        async for chunk in request.stream():
            body += chunk
            self.bytes += len(chunk)
            if len(body) > self._max_bytes:
                message = f"the request's body: expected at most {self._max_bytes} bytes, got more"
                raise ApiError(413, message, code="request_too_large")
            if self.bytes > _LARGEST_BODIES * self._max_bytes:
                raise overloaded(1, "is still reading other requests")
            measure.add(chunk)

    async def _parse(self, model: type[_Body], body: bytes) -> _Body:
        if len(body) <= _SMALL_BYTES:
            return model.model_validate_json(body)
        # One at a time, because each may need several times its size in memory.
        async with self._parsing:
            return await asyncio.to_thread(model.model_validate_json, body)


class _Measure:
    """Counts the parts of a JSON text while it arrives, without parsing it."""

    def __init__(self) -> None:
        self._quotes = 0
        self._containers = 0
        self._commas = 0
        self._escape = b""

    @property
    def parts(self) -> int:
        """Number of strings, lists and objects that have begun."""
        return (self._quotes + 1) // 2 + self._containers

    @property
    def values(self) -> int:
        """Number of commas between values, which is about the number of values."""
        return self._commas

    def add(self, chunk: bytes) -> None:
        """Takes the next piece of the text.

        Raises:
            ApiError: the text has more parts than any request needs.
        """
        # Without escape sequences every quote begins or ends a string.
        plain = (self._escape + chunk).replace(rb"\\", b"").replace(rb"\"", b"")
        self._escape = plain[-1:] if plain.endswith(b"\\") else b""
        pieces = plain.split(b'"')
        outside = b"".join(pieces[self._quotes % 2 :: 2])
        self._quotes += len(pieces) - 1
        self._containers += outside.count(b"[") + outside.count(b"{")
        self._commas += outside.count(b",")
        if self.parts > _MOST_PARTS:
            raise _too_many(_MOST_PARTS, "strings, lists and objects")
        if self.values > _MOST_VALUES:
            raise _too_many(_MOST_VALUES, "values")


def _too_many(most: int, what: str) -> ApiError:
    return invalid(
        f"the request's body: expected at most {most} {what}, got more", code="request_too_complex"
    )
