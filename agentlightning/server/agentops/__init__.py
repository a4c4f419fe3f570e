"""What the AgentOps SDK calls, besides OTLP, on the same store: logins, uploads, validation, and a page."""

from __future__ import annotations

from fastapi import FastAPI

from agentlightning.server.agentops.clients import Clients
from agentlightning.server.agentops.page import page
from agentlightning.server.agentops.routes import routes
from agentlightning.server.agentops.tokens import Tokens
from agentlightning.store.database import Database
from agentlightning.store.uploads import shared_secret

__all__ = ["ROUTES", "add_state"]

ROUTES = (routes, page)


def add_state(app: FastAPI, database: Database, key: str | None) -> tuple[Tokens, Clients]:
    """Add what the routes need; returns who has a say in what is let in, and who is watched while the server runs."""
    app.state.tokens = Tokens(database.write(shared_secret), key)
    app.state.clients = Clients()
    return app.state.tokens, app.state.clients
