"""The application: all routes on one database."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

import agentlightning
from agentlightning.server import errors
from agentlightning.server.keys import LOGINS, OPEN, Keys
from agentlightning.server.limits import ARRIVING_LIMIT, STRANGERS_LIMIT, WAITING_LIMIT, Bodies, Room
from agentlightning.server.metrics import Metrics, Watched
from agentlightning.server.origins import Origins
from agentlightning.server.page import routes as page
from agentlightning.server.routes import (
    about,
    generations,
    otlp,
    resources,
    rollouts,
    senders,
    spans,
    triplets,
    workers,
)
from agentlightning.server.transactions import Transactions
from agentlightning.store.database import Database

__all__ = ["create_app"]

DESCRIPTION = """\
A store of rollouts, attempts, spans, resources and workers: the LightningStore interface of Agent Lightning 0.3, on a
database; and of the generations that vLLM servers record. Errors are `{"detail": "one sentence"}`."""


def create_app(
    database: Database,
    *,
    key: str | None = None,
    cors_origins: Sequence[str] = (),
    is_own_name: Callable[[str], bool] | None = None,
    body_limit: int,
    agentops: bool = False,
    is_stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The store's application.

    Args:
        database: is closed with it.
        key: what whoever asks has to have; None where nothing is asked for.
        cors_origins: the pages that browsers let ask; `*` is any.
        is_own_name: whether a host is one that the server answers as; None where that may be any.
        body_limit: how many bytes the body of a request may have.
        agentops: have what the AgentOps SDK calls, too; needs PyJWT.
        is_stopping: whether the server is about to end: then nobody is let wait for rollouts.

    Raises:
        StoreUnavailable: the database cannot be used now, where it has to be at once.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.transactions = Transactions(database)
        async with nullcontext() if clients is None else clients.watched():
            yield
        await app.state.transactions.close()
        database.close()

    # Without the pages that FastAPI has for its document: they load what they show from another host.
    app = FastAPI(title="agl store", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.started_at = time.monotonic()
    app.state.metrics = Metrics()
    app.state.is_stopping = is_stopping
    app.state.room = Room(WAITING_LIMIT)
    routers = list(_ROUTES)
    tokens = clients = None
    if agentops:
        from agentlightning.server import agentops as of_agentops

        routers += of_agentops.ROUTES
        tokens, clients = of_agentops.add_state(app, database, key)
    for routes in routers:
        app.include_router(routes)
    # What FastAPI has itself differs from release to release.
    app.state.routes = [route for routes in routers for route in routes.routes]
    errors.add_handlers(app)
    # From the inside out.
    arriving = Room(ARRIVING_LIMIT)
    app.add_middleware(Bodies, limit=body_limit, arriving=arriving)
    if key is not None or tokens is not None:
        app.add_middleware(Keys, key=key, tokens=tokens)
        strangers = min(body_limit, STRANGERS_LIMIT)
        app.add_middleware(Bodies, limit=strangers, arriving=arriving, paths=(*OPEN, *LOGINS))
    app.add_middleware(Origins, allowed=cors_origins, is_own_name=is_own_name)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            # Else a browser that knows the key would use it for whatever page it shows.
            allow_credentials="*" not in cors_origins,
        )
    app.add_middleware(Watched, metrics=app.state.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


# A request is held against one after the other: those that come most stand first.
_ROUTES = (
    spans.routes,
    otlp.routes,
    generations.routes,
    senders.routes,
    rollouts.routes,
    triplets.routes,
    workers.routes,
    resources.routes,
    about.interface,
    about.root,
    page,
)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with what FastAPI does not know of."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=agentlightning.__version__, description=DESCRIPTION, routes=app.routes
        )
        schemas = document["components"]["schemas"]
        schemas["Error"] = {
            "title": "Error",
            "type": "object",
            "required": ["detail"],
            "properties": {"detail": {"type": "string", "description": "What is wrong, in one sentence."}},
        }
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic"},
        }
        document["security"] = [{}, {"bearer": []}, {"basic": []}]
        app.openapi_schema = document
    return app.openapi_schema
