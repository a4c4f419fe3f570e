"""What one server process has of ours: its door, and `GET /v1/agl/status`, a route of vLLM's own app."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import agentlightning
from agentlightning import settings
from agentlightning.instrumentation.vllm import _strict
from agentlightning.instrumentation.vllm._context import RequestContexts, ignored
from agentlightning.instrumentation.vllm._isolation import contained, failures
from agentlightning.instrumentation.vllm.capture import frontend, session
from agentlightning.patching import Patch, Status, Wrap

__all__ = ["STATUS_ROUTE", "app_patches", "server_patches"]

# Below /v1, which vLLM's own key guards; that is all that it has guarded in every release.
STATUS_ROUTE = "/v1/agl/status"

Statuses = Callable[[], Mapping[str, Status]]


def app_patches(statuses: Statuses) -> tuple[Patch, ...]:
    """The patch of vLLM's `build_app`, by which also programs get its app that serve it themselves.

    Args:
        statuses: gives each patch set's state.
    """

    def set_up(build_app: Callable[..., Any]) -> Callable[..., Any]:
        def build_app_and_set_up(args: Any, *others: Any, **options: Any) -> Any:
            app = build_app(args, *others, **options)
            contained("setting up an app", _set_up, app, statuses)
            return app

        return build_app_and_set_up

    return (Wrap("build_app", ("args",), set_up),)


def server_patches(statuses: Statuses) -> tuple[Patch, ...]:
    """The patch of vLLM's `serve_http`.

    To 0.28 `build_app` is in a module that `python -m` runs as the main program, which no import hook sees.
    """

    def set_up(serve_http: Callable[..., Any]) -> Callable[..., Any]:
        async def set_up_and_serve_http(app: Any, *args: Any, **kwargs: Any) -> Any:
            contained("setting up an app", _set_up, app, statuses)
            try:
                return await serve_http(app, *args, **kwargs)
            finally:
                # The engine is stopped, or will be in a moment. Who still waits for it is told by nobody: vLLM itself
                # waits then until they leave, or until it is killed.
                contained("recording what is under way", frontend.give_up_all)

        return set_up_and_serve_http

    return (Wrap("serve_http", ("app",), set_up),)


def _set_up(app: Any, statuses: Statuses) -> None:
    if any(getattr(route, "path", None) == STATUS_ROUTE for route in app.routes):
        return
    _add_route(app, statuses)
    _open_contexts(app)
    if session.is_on():
        contained("opening the store", frontend.start)


def _add_route(app: Any, statuses: Statuses) -> None:
    async def agl_status() -> dict[str, Any]:
        return _report(app, statuses())

    # Not in vLLM's schema: /openapi.json stays what it was.
    app.add_api_route(STATUS_ROUTE, agl_status, methods=["GET"], include_in_schema=False, response_model=None)


def _open_contexts(app: Any) -> None:
    # Not add_middleware, which raises where a library that vLLM brings along has built the stack by now, and which
    # would not be outermost: vLLM's authentication is to see the path without the prefix.
    build = app.build_middleware_stack
    # Built again, where the program adds middleware of its own, it is wrapped again.
    app.build_middleware_stack = lambda: RequestContexts(build())
    if app.middleware_stack is not None:
        app.middleware_stack = RequestContexts(app.middleware_stack)


def _report(app: Any, statuses: Mapping[str, Status]) -> dict[str, Any]:
    import vllm

    return {
        "agentlightning": agentlightning.__version__,
        "vllm": getattr(vllm, "__version__", None),
        "python": platform.python_version(),
        "pid": os.getpid(),
        # None and 1 both stand for one process, over the releases.
        "api_servers": getattr(getattr(app.state, "args", None), "api_server_count", None) or 1,
        "switches": {
            "AGL_INSTRUMENT": settings.instrument(),
            "AGL_RETURN_TOKEN_IDS": settings.return_token_ids(),
            "AGL_LOGPROBS": "on" if settings.logprobs() else "off",
        },
        "patches": {name: status.as_dict() for name, status in statuses.items()},
        "counters": {"failures": dict(failures), "ignored_ids": dict(ignored)},
        "limits": _strict.limits(app),
        "recording": session.report(),
    }
