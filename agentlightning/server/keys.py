"""Who may ask: whoever has the key, as Bearer, or as user or password of Basic."""

from __future__ import annotations

import base64
import hmac
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from agentlightning.server.errors import sentence

__all__ = ["OPEN", "Keys"]

OPEN = ("/healthz", "/readyz")
"""What is answered without a key: whether the server works, and nothing of what is in it."""


class Keys:
    """ASGI middleware: without the key, nothing inside of it is reached."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        # What is no UTF-8 in an argument or in the environment is kept by Python in a way of its own.
        self._keys = [key.encode("utf-8", "surrogateescape")]
        with suppress(UnicodeEncodeError):
            # Some clients, aiohttp and requests among them, send Latin-1.
            self._keys.append(key.encode("latin-1"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or self._has_key(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        answer = sentence(
            401,
            "the key of this store is missing or wrong: send it as `Authorization: Bearer KEY`, or in the URL, "
            "http://agl:KEY@HOST",
            {"WWW-Authenticate": 'Basic realm="agl store", charset="UTF-8"'},
        )
        await answer(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        # All are compared, each in constant time: how long it takes tells nothing about the key.
        given = _given(scheme.lower(), credentials.strip())
        matches = [hmac.compare_digest(each, key) for each in given for key in self._keys]
        return any(matches)


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
