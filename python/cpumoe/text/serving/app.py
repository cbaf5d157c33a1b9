"""The application: paths, access to them, and the worker's lifetime."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cpumoe.text.generation import TextModel
from cpumoe.text.serving import openai_api, sglang_api, status_api, tokens_api
from cpumoe.text.serving.body import BodyReader
from cpumoe.text.serving.errors import ApiError, install_handlers
from cpumoe.text.serving.metrics import Metrics, has_metrics
from cpumoe.text.serving.service import Service
from cpumoe.text.serving.settings import Settings
from cpumoe.text.serving.worker import Worker


def create_app(model: TextModel, settings: Settings | None = None) -> FastAPI:
    """Returns an ASGI application that serves a model.

    One thread calls the model. It runs from the application's start-up to its shutdown.
    `app.state.service` is the `Service`.
    """
    settings = settings or Settings()
    name = settings.served_model_name or model.name
    worker = Worker(model, queue=settings.queue)
    if has_metrics():
        worker.observer = Metrics(worker, name)
    service = Service(
        name,
        model.context_length,
        int(time.time()),
        settings,
        worker,
        BodyReader(settings.max_request_bytes),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.close()

    # No documentation pages, because they would load scripts from other sites.
    app = FastAPI(
        title="cpumoe", openapi_url=None, lifespan=lifespan, redirect_slashes=False, debug=False
    )
    app.state.service = service
    app.add_middleware(_Paths)
    install_handlers(app, worker.observer.failed)
    allowed = [Depends(_key_check(settings.api_key))] if settings.api_key else []
    routers = [api.make_router(service) for api in (openai_api, sglang_api, tokens_api)]
    for router in routers:
        app.include_router(router, dependencies=allowed)
    app.include_router(status_api.make_router(service, routers))
    return app


class _Paths:
    """Lets paths end with a slash, and allows HEAD wherever GET is allowed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # A copy, because the server before it uses its own scope to omit the body for HEAD.
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


def _key_check(key: str) -> Callable[[Request], Awaitable[None]]:
    """Returns a check that a request presents the key as OpenAI's clients do."""
    expected = b"Bearer " + key.encode()

    async def check(request: Request) -> None:
        # The header's bytes, which may be no text.
        presented = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(presented, expected):
            problem = "is wrong" if presented else "is missing; send 'Authorization: Bearer KEY'"
            raise ApiError(
                401,
                f"the API key {problem}",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check
