"""The application of `agl store`: all routes on one database."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

import agentlightning
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.server import errors
from agentlightning.server.drift import DriftIndex
from agentlightning.server.limits import ARRIVING_LIMIT, UNAUTHENTICATED_LIMIT, WAITING_LIMIT
from agentlightning.server.middleware.api_key import LOGIN_PATHS, PUBLIC_PATHS, ApiKeyMiddleware
from agentlightning.server.middleware.error_pages import ErrorPageMiddleware
from agentlightning.server.middleware.head import HeadMiddleware
from agentlightning.server.middleware.metrics import Metrics, MetricsMiddleware
from agentlightning.server.middleware.origins import OriginMiddleware
from agentlightning.server.middleware.request_body import ByteBudget, RequestBodyMiddleware
from agentlightning.server.middleware.root_path import RootPathMiddleware
from agentlightning.server.page import routes as page
from agentlightning.server.routes import (
    about,
    drift,
    generations,
    otlp,
    prune,
    resources,
    rollouts,
    senders,
    spans,
    trajectories,
    triplets,
    workers,
)
from agentlightning.server.summaries import Summaries
from agentlightning.server.transactions import Transactions
from agentlightning.store import watermarks
from agentlightning.store.database import Database

__all__ = ["create_app"]

logger = logging.getLogger("agentlightning.store")

DESCRIPTION = """\
A store of rollouts, attempts, spans, resources and workers, with the LightningStore interface of Agent Lightning 0.3,
and of the generations that vLLM servers record. Errors are `{"detail": "one sentence"}`."""


def create_app(
    database: Database,
    *,
    key: str | None = None,
    cors_origins: Sequence[str] = (),
    is_own_name: Callable[[str], bool] | None = None,
    body_limit: int,
    agentops: bool = False,
    root_path: str = "",
    is_stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Create the store's application.

    Args:
        database: the store; closed when the application shuts down.
        key: the key that requests need; None if they need none.
        cors_origins: origins whose pages browsers let read and change the store; `*` is any.
        is_own_name: tells whether the server answers to a host name; None if it answers to any.
        body_limit: largest body of a request, in bytes.
        agentops: also serve the AgentOps SDK's routes; needs PyJWT.
        root_path: the path below which a proxy serves the store, without a slash at its end; empty without one.
        is_stopping: tells whether the server is shutting down; waits for rollouts then end at once.

    Raises:
        StoreUnavailable: `agentops` needs to read the database now, and cannot.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.transactions = Transactions(database)
        app.state.drift = DriftIndex(app.state.transactions)
        app.state.summaries = Summaries(app.state.transactions)
        try:
            await app.state.transactions.write(watermarks.note_start)
        except (StoreUnavailable, StoreRefused) as error:
            logger.warning("the start cannot be noted now, so senders may count as silent too early: %s", error)
        async with nullcontext() if clients is None else clients.watched():
            yield
        await app.state.drift.close()
        await app.state.summaries.close()
        await app.state.transactions.close()
        database.close()

    # FastAPI's own pages for the OpenAPI document load their assets from another host.
    app = FastAPI(title="agl store", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.started_at = time.monotonic()
    app.state.metrics = Metrics()
    app.state.is_stopping = is_stopping
    app.state.asks_for_key = key is not None
    app.state.body_budget = ByteBudget(WAITING_LIMIT)
    routers = list(_ROUTES)
    tokens = clients = None
    if agentops:
        from agentlightning.server import agentops as agentops_server

        routers += agentops_server.ROUTES
        tokens, clients = agentops_server.add_state(app, database, key)
    for routes in routers:
        app.include_router(routes)
    # Not `app.routes`: the routes that FastAPI adds differ from release to release.
    app.state.routes = [route for routes in routers for route in routes.routes]
    errors.add_handlers(app)
    # The middleware added last is the outermost.
    arriving = ByteBudget(ARRIVING_LIMIT)
    app.add_middleware(RequestBodyMiddleware, limit=body_limit, arriving=arriving)
    if key is not None or tokens is not None:
        app.add_middleware(ApiKeyMiddleware, key=key, tokens=tokens)
        app.add_middleware(
            RequestBodyMiddleware,
            limit=min(body_limit, UNAUTHENTICATED_LIMIT),
            arriving=arriving,
            paths=(*PUBLIC_PATHS, *LOGIN_PATHS),
        )
    app.add_middleware(OriginMiddleware, allowed=cors_origins, is_own_name=is_own_name)
    app.add_middleware(ErrorPageMiddleware)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            # With `*`, a browser that knows the key would otherwise use it for any page.
            allow_credentials="*" not in cors_origins,
        )
    app.add_middleware(MetricsMiddleware, metrics=app.state.metrics)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(RootPathMiddleware, root_path=root_path)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


# Matched in this order: the routes with the most requests come first.
_ROUTES = (
    spans.routes,
    otlp.routes,
    generations.routes,
    senders.routes,
    rollouts.routes,
    prune.routes,
    triplets.routes,
    trajectories.routes,
    drift.routes,
    workers.routes,
    resources.routes,
    about.interface,
    about.root,
    page,
)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, with errors and keys, which FastAPI does not know about."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=agentlightning.__version__, description=DESCRIPTION, routes=app.routes
        )
        schemas = document["components"]["schemas"]
        schemas["Error"] = {
            "title": "Error",
            "type": "object",
            "required": ["detail"],
            "properties": {"detail": {"type": "string", "description": "What went wrong, in one sentence."}},
        }
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic"},
        }
        document["security"] = [{}, {"bearer": []}, {"basic": []}]
        app.openapi_schema = document
    return app.openapi_schema
