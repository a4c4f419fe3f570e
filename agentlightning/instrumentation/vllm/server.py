"""What one server process has of ours: its door, and `GET /v1/agl/status`, a route of vLLM's own app."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import agentlightning
from agentlightning import settings
from agentlightning.instrumentation.vllm import recording
from agentlightning.instrumentation.vllm.containment import contained, failures
from agentlightning.instrumentation.vllm.middleware import RequestContexts, ignored
from agentlightning.patching import Patch, Status, Wrap

__all__ = ["STATUS_ROUTE", "patches"]

# Below /v1, which vLLM's own key guards; that is all that it has guarded in every release.
STATUS_ROUTE = "/v1/agl/status"


def patches(status: Callable[[], Mapping[str, Status]]) -> tuple[Patch, ...]:
    """The patch of vLLM's `serve_http`; `status` gives each patch set's state."""

    def with_status_route(serve_http: Callable[..., Any]) -> Callable[..., Any]:
        async def serve_http_with_status_route(app: Any, *args: Any, **kwargs: Any) -> Any:
            contained(f"adding {STATUS_ROUTE}", _add_route, app, status)
            contained("opening request contexts", _wrap_middleware, app)
            if recording.is_on():
                contained("opening the store", recording.start)
            return await serve_http(app, *args, **kwargs)

        return serve_http_with_status_route

    return (Wrap("serve_http", ("app",), with_status_route),)


def _add_route(app: Any, status: Callable[[], Mapping[str, Status]]) -> None:
    async def agl_status() -> dict[str, Any]:
        return _report(app, status())

    # Not in vLLM's schema: /openapi.json stays what it was.
    app.add_api_route(STATUS_ROUTE, agl_status, methods=["GET"], include_in_schema=False, response_model=None)


def _wrap_middleware(app: Any) -> None:
    # Not add_middleware: a library that vLLM brings along has built the stack by then, and it would raise. Around the
    # stack it is outermost, so that vLLM's authentication sees the path without the prefix.
    app.middleware_stack = RequestContexts(app.middleware_stack or app.build_middleware_stack())


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
        },
        "patches": {name: status.as_dict() for name, status in statuses.items()},
        "counters": {"failures": dict(failures), "ignored_ids": dict(ignored)},
    }
