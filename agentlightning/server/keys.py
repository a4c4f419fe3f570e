"""Who may ask: whoever has the key, as Bearer, or as user or password of Basic; and what a token is enough for."""

from __future__ import annotations

import base64
import hmac
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from agentlightning.server.errors import sentence

if TYPE_CHECKING:
    from agentlightning.server.agentops.tokens import Token, Tokens

__all__ = ["LOGINS", "OPEN", "Keys", "token_of"]

OPEN = ("/healthz", "/readyz")
"""What is answered without a key: whether the server works, and nothing of what is in it."""

LOGINS = ("/v3/auth/token", "/public/v1/auth/access_token")
"""What takes a key, and gives a token for it."""
# What a token is enough for: nothing of what the LightningStore routes have.
OTLP = ("/v1/traces", "/v1/logs", "/v1/metrics")
OF_SESSIONS = ("/v4/", "/public/v1/")
SCOPE = "agentlightning.token"
CHALLENGE = {"WWW-Authenticate": 'Basic realm="agl store", charset="UTF-8"'}


def token_of(scope: Scope) -> Token | None:
    """The token that a request came with; None where it came with a key, or with nothing where nothing is asked for."""
    return scope.get(SCOPE)


class Keys:
    """ASGI middleware: without the key, nothing inside of it is reached.

    Args:
        key: None where nothing is asked for.
        tokens: those that are as good as the key for what the AgentOps SDK calls; None where there are none.
    """

    def __init__(self, app: ASGIApp, key: str | None, tokens: Tokens | None = None) -> None:
        self._app = app
        self._tokens = tokens
        self._asks = key is not None
        self._keys: list[bytes] = []
        if key is not None:
            # What is no UTF-8 in an argument or in the environment is kept by Python in a way of its own.
            self._keys.append(key.encode("utf-8", "surrogateescape"))
            with suppress(UnicodeEncodeError):
                # Some clients, aiohttp and requests among them, send Latin-1.
                self._keys.append(key.encode("latin-1"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or (self._tokens and scope["path"] in LOGINS):
            await self._app(scope, receive, send)
            return
        scheme, _, credentials = Headers(scope=scope).get("authorization", "").partition(" ")
        scheme, credentials = scheme.lower(), credentials.strip()
        # A token that is wrong is refused also where nobody has to have one.
        tokens = self._tokens if scheme == "bearer" and _takes_tokens(scope["path"]) else None
        token = None if tokens is None else tokens.read(credentials)
        if token is not None:
            scope[SCOPE] = token
        elif (self._asks or tokens is not None) and not self._is_key(scheme, credentials):
            await sentence(401, self._objection(), CHALLENGE)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _objection(self) -> str:
        if not self._asks:
            return "the token is of another store, or has expired"
        also = " or a token of it that has not expired" if self._tokens else ""
        return (
            f"the key of this store{also} is missing or wrong: send it as `Authorization: Bearer KEY`, or in the URL, "
            "http://agl:KEY@HOST"
        )

    def _is_key(self, scheme: str, credentials: str) -> bool:
        # All are compared, each in constant time: how long it takes tells nothing about the key.
        given = _given(scheme, credentials)
        matches = [hmac.compare_digest(each, key) for each in given for key in self._keys]
        return any(matches)


def _takes_tokens(path: str) -> bool:
    return path in OTLP or path.startswith(OF_SESSIONS)


def _given(scheme: str, credentials: str) -> list[bytes]:
    # Headers are latin-1 to ASGI; what the client sent were bytes.
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
