"""The path below which a reverse proxy serves the store."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["RootPathMiddleware"]

HEADER = "x-forwarded-prefix"

_ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~%-]+)+")


class RootPathMiddleware:
    """Remove the path of a proxy from a request's path, and keep it as the scope's `root_path`.

    Proxies that send `X-Forwarded-Prefix` have removed the path themselves, by convention (Traefik, Spring). Other
    proxies may keep the path or remove it: both are accepted.

    Args:
        root_path: the path without a slash at its end; empty without one.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            forwarded = Headers(scope=scope).get(HEADER, "").rstrip("/")
            # An ASGI server may know a path of its own.
            root_path = self._root_path or scope.get("root_path", "")
            path = scope["path"]
            if _ROOT_PATH.fullmatch(forwarded):
                root_path = forwarded
            elif root_path and f"{path}/".startswith(f"{root_path}/"):
                path = path.removeprefix(root_path) or "/"
            scope = {**scope, "root_path": root_path, "path": path}
        await self._app(scope, receive, send)
