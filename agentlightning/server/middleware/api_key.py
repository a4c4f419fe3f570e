"""API-key authentication (Bearer or Basic), and tokens of the AgentOps SDK on the routes that accept them."""

from __future__ import annotations

import base64
import hmac
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from agentlightning.server.errors import sentence

if TYPE_CHECKING:
    from agentlightning.server.agentops.access_tokens import AccessToken, AccessTokens

__all__ = ["LOGIN_PATHS", "PUBLIC_PATHS", "ApiKeyMiddleware", "token_of"]

PUBLIC_PATHS = ("/healthz", "/readyz")
"""Routes that need no key: they tell whether the server works, and nothing about its contents."""

LOGIN_PATHS = ("/v3/auth/token", "/public/v1/auth/access_token")
"""Routes that trade a key in the body for a token."""
# Routes that accept a token. None of the LightningStore routes does.
OTLP_PATHS = ("/v1/traces", "/v1/logs", "/v1/metrics")
SESSION_PREFIXES = ("/v4/", "/public/v1/")
SCOPE_KEY = "agentlightning.token"
CHALLENGE = {"WWW-Authenticate": 'Basic realm="agl store", charset="UTF-8"'}


def token_of(scope: Scope) -> AccessToken | None:
    """Return the token of a request; None if it came with a key, or without anything where no key is required."""
    return scope.get(SCOPE_KEY)


class ApiKeyMiddleware:
    """Refuse requests without the key, as Bearer or as the user or password of Basic.

    Args:
        key: the key; None if none is required.
        tokens: the tokens that replace the key on the AgentOps SDK's routes; None without those routes.
    """

    def __init__(self, app: ASGIApp, key: str | None, tokens: AccessTokens | None = None) -> None:
        self._app = app
        self._tokens = tokens
        self._is_key_required = key is not None
        self._keys: list[bytes] = []
        if key is not None:
            # In arguments and the environment, Python keeps bytes that are not UTF-8 as surrogate escapes.
            self._keys.append(key.encode("utf-8", "surrogateescape"))
            with suppress(UnicodeEncodeError):
                # Some clients, aiohttp and requests among them, send Latin-1.
                self._keys.append(key.encode("latin-1"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS or (self._tokens and scope["path"] in LOGIN_PATHS):
            await self._app(scope, receive, send)
            return
        scheme, _, credentials = Headers(scope=scope).get("authorization", "").partition(" ")
        scheme, credentials = scheme.lower(), credentials.strip()
        # A wrong token is refused even where no key is required.
        tokens = self._tokens if scheme == "bearer" and _accepts_tokens(scope["path"]) else None
        token = None if tokens is None else tokens.read(credentials)
        if token is not None:
            scope[SCOPE_KEY] = token
        elif (self._is_key_required or tokens is not None) and not self._is_key(scheme, credentials):
            await sentence(401, self._refusal(), CHALLENGE)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self) -> str:
        if not self._is_key_required:
            return "the token is from another store, or has expired"
        token = ", or a valid token from it," if self._tokens else ""
        return (
            f"the key of this store{token} is missing or wrong: send it as `Authorization: Bearer KEY`, or in the URL, "
            "http://agl:KEY@HOST"
        )

    def _is_key(self, scheme: str, credentials: str) -> bool:
        # Every candidate is compared, each in constant time: the time taken reveals nothing about the key.
        given = _given(scheme, credentials)
        matches = [hmac.compare_digest(each, key) for each in given for key in self._keys]
        return any(matches)


def _accepts_tokens(path: str) -> bool:
    return path in OTLP_PATHS or path.startswith(SESSION_PREFIXES)


def _given(scheme: str, credentials: str) -> list[bytes]:
    # ASGI decodes headers as Latin-1; this restores the bytes that the client sent.
    sent = credentials.encode("latin-1")
    if scheme == "bearer":
        return [sent]
    if scheme == "basic":
        try:
            user, _, password = base64.b64decode(sent, validate=True).partition(b":")
        except ValueError:
            return []
        return [user, password]
    return []
