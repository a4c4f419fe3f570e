"""What the AgentOps SDK calls, besides OTLP, on the same store: logins, uploads, validation, and a page."""

from __future__ import annotations

from fastapi import FastAPI

from agentlightning.server.agentops.clients import Clients
from agentlightning.server.agentops.page import page
from agentlightning.server.agentops.routes import routes
from agentlightning.server.agentops.tokens import Tokens
from agentlightning.store.database import Database
from agentlightning.store.uploads import secret

__all__ = ["add_agentops"]


def add_agentops(app: FastAPI, database: Database, key: str | None) -> tuple[Tokens, Clients]:
    """Add the routes; returns who has a say in what is let in, and who is to be watched while the server runs."""
    app.state.tokens = Tokens(database.write(secret), key)
    app.state.clients = Clients()
    app.include_router(routes)
    app.include_router(page)
    return app.state.tokens, app.state.clients
