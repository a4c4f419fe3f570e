"""The apps that answer: vLLM's, and those of a program's own, which hand their requests to vLLM's serving classes.

Nothing of vLLM is called where a program makes an app of its own. What all of them have in common is Starlette, which
FastAPI is built upon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from agentlightning.importhook import locate
from agentlightning.instrumentation.vllm._carriers import names_rollout_in_key
from agentlightning.instrumentation.vllm._context import (
    RequestContext,
    RequestContextMiddleware,
    is_read,
    without_prefix,
)
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["PATCHES", "add_middleware"]

STARLETTE = "starlette.applications"


def add_middleware(app: Any) -> None:
    """Put our middleware around vLLM's app."""
    # Not by add_middleware, which raises if a library that vLLM brings along has already built the stack, and which
    # would not be outermost: vLLM's authentication must see the path without the prefix.
    # If the program adds middleware of its own, the stack is built again, and wrapped again.
    app.build_middleware_stack = functools.partial(_build, app.build_middleware_stack)
    if app.middleware_stack is not None:
        app.middleware_stack = RequestContextMiddleware(app.middleware_stack)


def _build(build: Callable[[], Any]) -> RequestContextMiddleware:
    return RequestContextMiddleware(build())


def _wrap(call: Callable[..., Any]) -> Callable[..., Any]:
    async def take_rollout_and_call(app: Any, scope: Any, receive: Any, send: Any) -> None:
        named = contained("looking for a rollout", _find_name, app, scope)
        if named is None or not any(named):
            await call(app, scope, receive, send)
        else:
            middleware = RequestContextMiddleware(functools.partial(call, app), reads_path=named.in_path)
            await middleware(scope, receive, send)

    return take_rollout_and_call


class _Named(NamedTuple):
    """The places of a request that name a rollout, to be taken off."""

    in_path: bool
    in_key: bool


def _find_name(app: Any, scope: Any) -> _Named:
    has_middleware = getattr(app.build_middleware_stack, "func", None) is _build
    if scope["type"] != "http" or has_middleware or is_read(scope):
        return _Named(False, False)
    in_path = "/rollout/" in scope["path"] and _is_prefixed(app, scope)
    return _Named(in_path, names_rollout_in_key(scope.get("headers", ())))


def _is_prefixed(app: Any, scope: Any) -> bool:
    """Tell whether a path has a route without its prefix alone: what has none may be forwarded as it came."""
    rest = without_prefix(scope, RequestContext())
    return rest is not scope and not _has_route(app, scope) and _has_route(app, rest)


def _has_route(app: Any, scope: Any) -> bool:
    return any(route.matches(scope)[0].value for route in app.routes)


PATCHES: tuple[Patch, ...] = (
    Where(
        lambda module: locate(STARLETTE) is not None,
        Wrap("Starlette.__call__", ("scope", "receive", "send"), _wrap, STARLETTE),
    ),
)
