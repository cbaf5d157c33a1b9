"""Reading a request's body within bounds of size, time, memory and work."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema
from starlette.requests import ClientDisconnect

from cpumoe.serving.errors import ApiError, gone, invalid, overloaded, refusal

_BODY_SECONDS = 60
# Above, a body is parsed off the event loop.
_SMALL_BYTES = 1 << 16
# Bodies that are there at the same time, unparsed, have so many times the size of the largest.
_LARGEST_BODIES = 8
# Parsing takes about 0.2 us per string, list and object, and 0.03 us per number, during which no
# other Python code runs. No conversation has so many, and few contexts so many tokens.
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
    """A JSON object whose values are not converted; fields without a name stay in `model_extra`.

    Lists are read up to their first wrong element: a report of each would take longer than
    everything else that a request may ask for.
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
        bytes: of bodies that are there, but not parsed yet.
    """

    def __init__(self, max_bytes: int) -> None:
        """Reads bodies of at most `max_bytes`."""
        self._max_bytes = max_bytes
        self.bytes = 0
        self._parsing = asyncio.Lock()

    async def read(self, request: Request, model: type[_Body]) -> _Body:
        """Returns a request's body as a model.

        Raises:
            ApiError: it is too large, too slow, no JSON, or not what the model expects.
        """
        media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if media_type != "application/json":
            # Browsers ask before they send this type to another site, so no web page that its user
            # visits can make a server on the same computer work.
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
                message = f"the request's body is larger than {self._max_bytes} bytes"
                raise ApiError(413, message, code="request_too_large")
            if self.bytes > _LARGEST_BODIES * self._max_bytes:
                raise overloaded(1, "other requests are still being read")
            measure.add(chunk)

    async def _parse(self, model: type[_Body], body: bytes) -> _Body:
        if len(body) <= _SMALL_BYTES:
            return model.model_validate_json(body)
        # One at a time: each may take a few times its size in memory.
        async with self._parsing:
            return await asyncio.to_thread(model.model_validate_json, body)


class _Measure:
    """Counts what a JSON text consists of while it comes, without parsing it."""

    def __init__(self) -> None:
        self._quotes = 0
        self._containers = 0
        self._commas = 0
        self._escape = b""

    @property
    def parts(self) -> int:
        """Strings, lists and objects that have begun."""
        return (self._quotes + 1) // 2 + self._containers

    @property
    def values(self) -> int:
        """Commas between values, and so about as many values."""
        return self._commas

    def add(self, chunk: bytes) -> None:
        """Takes the next piece of the text.

        Raises:
            ApiError: it has more parts than any request needs.
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
    return invalid(f"the request's body has more than {most} {what}", code="request_too_complex")
