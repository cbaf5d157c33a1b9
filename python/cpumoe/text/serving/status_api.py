"""Paths for operators, load balancers and monitoring, which need no key."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from cpumoe import __version__
from cpumoe.text.serving.errors import ApiError, json_response
from cpumoe.text.serving.metrics import Metrics
from cpumoe.text.serving.service import Service


def make_router(service: Service, others: Sequence[APIRouter]) -> APIRouter:
    """Returns the paths of health, metrics and version.

    Args:
        service: the served model.
        others: the other paths, for the list of all paths.
    """
    router = APIRouter()

    @router.get("/")
    async def index() -> Response:
        routes = [route for one in (router, *others) for route in one.routes]
        paths = sorted({route.path for route in routes if isinstance(route, APIRoute)})
        return json_response({"name": "cpumoe", "version": __version__, "paths": paths})

    @router.get("/health")
    @router.get("/v1/health")
    async def health() -> Response:
        worker = service.worker
        status = "failed" if worker.broken else "ready" if worker.accepting else "stopping"
        return json_response({"status": status}, 200 if status == "ready" else 503)

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not isinstance(service.worker.observer, Metrics):
            raise ApiError(
                501,
                "metrics need prometheus_client, which is not installed: "
                'pip install "cpumoe[serve]"',
                code="not_installed",
            )
        content, media_type = service.worker.observer.exposition(request.headers.get("accept", ""))
        return Response(content, media_type=media_type)

    return router
