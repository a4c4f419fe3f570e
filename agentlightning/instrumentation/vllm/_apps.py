"""The apps that answer: vLLM's, and those of a program's own, which hand their requests to vLLM's serving classes.

Nothing of vLLM is called where a program makes an app of its own. What all of them have in common is Starlette, which
FastAPI is built upon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from agentlightning.importhook import locate
from agentlightning.instrumentation.vllm._carriers import names_rollout_in_key
from agentlightning.instrumentation.vllm._context import RequestContextMiddleware
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["PATCHES", "add_middleware"]

STARLETTE = "starlette.applications"

_with_middleware: WeakSet[Any] = WeakSet()


def add_middleware(app: Any) -> None:
    """Put our middleware around vLLM's app."""
    # Not by add_middleware, which raises if a library that vLLM brings along has already built the stack, and which
    # would not be outermost: vLLM's authentication must see the path without the prefix.
    build = app.build_middleware_stack
    # If the program adds middleware of its own, the stack is built again, and wrapped again.
    app.build_middleware_stack = lambda: RequestContextMiddleware(build())
    if app.middleware_stack is not None:
        app.middleware_stack = RequestContextMiddleware(app.middleware_stack)
    _with_middleware.add(app)


def _wrap(call: Callable[..., Any]) -> Callable[..., Any]:
    async def take_rollout_and_call(app: Any, scope: Any, receive: Any, send: Any) -> None:
        if app not in _with_middleware and contained("looking for a rollout", _names_rollout, app, scope):
            await RequestContextMiddleware(functools.partial(call, app))(scope, receive, send)
        else:
            await call(app, scope, receive, send)

    return take_rollout_and_call


def _names_rollout(app: Any, scope: Any) -> bool:
    if scope["type"] != "http":
        return False
    if "/rollout/" in scope["path"]:
        # A route of the program's own may begin so, or take any path and hand it on.
        return not any(route.matches(scope)[0].value for route in app.routes)
    return names_rollout_in_key(scope.get("headers", ()))


PATCHES: tuple[Patch, ...] = (
    Where(
        lambda module: locate(STARLETTE) is not None,
        Wrap("Starlette.__call__", ("scope", "receive", "send"), _wrap, STARLETTE),
    ),
)
