"""Protection from other web pages: a browser sends whatever any page tells it to, and adds the key that it knows."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from agentlightning.server.errors import sentence

__all__ = ["OriginMiddleware", "is_from_own_page"]

SHOWN_LENGTH = 100
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing. CORS decides which of their answers a browser shows to pages of other origins."""


class OriginMiddleware:
    """Refuse changes requested by pages of other origins.

    Only browsers send `Origin` and `Sec-Fetch-Site`, and no page can forge them: a request without
    them is not from a page.

    Args:
        allowed: origins, as `https://HOST:PORT`, whose pages may make changes; `*` is any page that has the key itself.
        is_own_name: tells whether a host name is one of the server's; None to accept any. DNS rebinding gives a foreign
            page the server's origin, but not its name.
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
        if self._is_own_name is not None and host and not self._is_own_name(_host_name(host)):
            # Not 403: another name of the same server would work.
            refusal = (
                f"without a key, this server answers only as localhost or 127.0.0.1, not as {host[:SHOWN_LENGTH]!r}: "
                "use one of these names, or start the server with --api-key"
            )
            await sentence(421, refusal)(scope, receive, send)
        elif scope["method"] not in SAFE_METHODS and self._is_foreign(headers, f"{scope['scheme']}://{host}"):
            origin = headers.get("origin", "another origin")[:SHOWN_LENGTH]
            refusal = (
                f"pages of {origin} may not change anything here: start the server with --cors-origin ORIGIN to let "
                "pages of an origin do so"
            )
            await sentence(403, refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_foreign(self, headers: Headers, own: str) -> bool:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._allowed:
            return False
        # A key sent as Basic was typed into the browser: the page does not have it.
        if "*" in self._allowed and not headers.get("authorization", "").lower().startswith("basic"):
            return False
        if site is not None:
            # If a proxy has changed the host or the scheme, only the browser knows.
            return site in ("cross-site", "same-site")
        return origin is not None and origin != own


def is_from_own_page(scope: Scope) -> bool:
    """Tell whether a browser says that a page of this server itself makes a request.

    A program says nothing of it, and a page of an origin that may make changes is another one.
    """
    headers = Headers(scope=scope)
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    # Browsers send the header above only over HTTPS, and to their own machine.
    return headers.get("origin") == f"{scope['scheme']}://{headers.get('host', '')}"


def _host_name(host: str) -> str:
    """Return a host without its port, and without the brackets of IPv6."""
    name, bracket, _ = host.removeprefix("[").partition("]")
    return (name if bracket else host.partition(":")[0]).lower()
