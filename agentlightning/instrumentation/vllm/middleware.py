"""ASGI: what stands before a route in the path, taken off before vLLM looks at it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

__all__ = ["RolloutPrefix"]

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

MAX_ID_LENGTH = 256

# On the path as it was sent: an encoded slash is part of an id, not the end of it.
_PREFIX = re.compile(rb"/rollout/(?P<rollout>[^/]+)(?:/attempt/(?P<attempt>[^/]+))?(?P<rest>/.*)", re.DOTALL)


class RolloutPrefix:
    """Makes `/rollout/{rollout_id}[/attempt/{attempt_id}]/v1/...` the same as `/v1/...`.

    It is to be outermost, so that whoever guards a path sees the one that is routed. A prefix that is not well formed
    is left on, and vLLM answers as to any path that it does not know.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Any, send: Any) -> Awaitable[None]:
        # Looked at first, since it runs for every request.
        if "/rollout/" in scope.get("path", "") and scope["type"] in ("http", "websocket"):
            scope = _without_prefix(scope)
        return self._app(scope, receive, send)


def _without_prefix(scope: Scope) -> Scope:
    root = scope.get("root_path", "").encode()
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    # Both ways of reaching a server behind a proxy: with --root-path still on, or taken off by the proxy.
    before = root if root and path.startswith(root + b"/") else b""
    match = _PREFIX.fullmatch(path[len(before) :])
    if match is None or not all(_is_id(unquote(part)) for part in match.group("rollout", "attempt") if part):
        return scope
    rest = before + match["rest"]
    # Decoded as the server decodes it, and once: what is guarded and what is routed are both read from "path".
    return {**scope, "path": unquote(rest), "raw_path": rest}


def _is_id(value: str) -> bool:
    return len(value) <= MAX_ID_LENGTH and value.isprintable()
