"""Routes of the AgentOps SDK besides OTLP, on the same store: logins, uploads, validation, and web pages."""

from __future__ import annotations

from fastapi import FastAPI

from agentlightning.server.agentops.access_tokens import AccessTokens
from agentlightning.server.agentops.routes import routes
from agentlightning.server.agentops.session_pages import routes as session_pages
from agentlightning.server.agentops.silent_clients import SilentClients
from agentlightning.store.database import Database
from agentlightning.store.uploads import shared_secret

__all__ = ["ROUTES", "add_state"]

ROUTES = (routes, session_pages)


def add_state(app: FastAPI, database: Database, key: str | None) -> tuple[AccessTokens, SilentClients]:
    """Add the state that the routes need; return the tokens to accept, and the clients to watch while serving."""
    app.state.tokens = AccessTokens(database.write(shared_secret), key)
    app.state.clients = SilentClients()
    return app.state.tokens, app.state.clients
