"""Which web pages may ask: a browser sends what any page makes it send, with the key that it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from agentlightning.server.errors import sentence

__all__ = ["Origins"]

SHOWN = 100
HARMLESS = ("GET", "HEAD", "OPTIONS")
"""What changes nothing. Of what they answer, a browser gives pages of other origins what CORS allows."""


class Origins:
    """ASGI middleware: nothing inside of it is changed by a page of another origin.

    Only browsers say on whose behalf they ask, and no page can make them say otherwise: who says nothing is none.

    Args:
        allowed: the origins, as `https://HOST:PORT`, whose pages may; `*` is any that has the key itself.
        is_own_name: whether a host is one that the server goes by; None where that may be any. A page whose host is
            made to mean this machine (DNS rebinding) has the origin of the server, but not its name.
    """

    def __init__(
        self, app: ASGIApp, allowed: Collection[str] = (), is_own_name: Callable[[str], bool] | None = None
    ) -> None:
        self._app = app
        self._allowed = allowed
        self._is_own_name = is_own_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._is_own_name is not None and host and not self._is_own_name(_name(host)):
            # Not 403: another name of the same server would do.
            objection = (
                f"this server asks for no key, and so answers as localhost or 127.0.0.1 alone, not as {host[:SHOWN]!r}:"
                " ask it by one of these names, or start it with --api-key"
            )
            await sentence(421, objection)(scope, receive, send)
        elif scope["method"] not in HARMLESS and self._is_foreign(headers, f"{scope['scheme']}://{host}"):
            origin = headers.get("origin", "another origin")[:SHOWN]
            objection = (
                f"a page of {origin} may change nothing here: --cors-origin ORIGIN of the server lets those of an "
                "origin do so"
            )
            await sentence(403, objection)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_foreign(self, headers: Headers, own: str) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._allowed:
            return False
        # A browser sends a key that it was asked for by itself, as Basic: that is not the page's.
        if "*" in self._allowed and not headers.get("authorization", "").lower().startswith("basic"):
            return False
        if site is not None:
            # Where a proxy has changed the host or the scheme, the browser alone knows.
            return site in ("cross-site", "same-site")
        return origin is not None and origin != own


def _name(host: str) -> str:
    """The host without its port, and without the brackets of IPv6."""
    name, bracket, _ = host.removeprefix("[").partition("]")
    return (name if bracket else host.partition(":")[0]).lower()
