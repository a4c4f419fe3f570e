"""Give processes time to write what they have recorded when vLLM's main process stops them.

From 0.18 on (as read; not yet in 0.15.1) vLLM kills them right after their SIGTERM, unless it is given a
--shutdown-timeout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any
from weakref import WeakSet

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["API_SERVER_PATCHES", "ENGINE_CORE_PATCHES"]

_headless: WeakSet[Any] = WeakSet()
"""The managers of engine cores whose frontend is on another machine."""

# The longest that a recorder takes, after what vLLM does first. vLLM waits no longer than the processes take.
SECONDS = 7.0


def wrap_api_server_shutdown(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `APIServerProcessManager.shutdown`."""

    def shutdown_with_time(manager: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        return shutdown(manager, max(timeout or 0.0, SECONDS), *args, **kwargs)

    return shutdown_with_time


def wrap_engine_core_init(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `CoreEngineProcManager.__init__`, which is told whether its frontend is elsewhere (`--headless`)."""
    signature = inspect.signature(init)

    def init_and_note(manager: Any, *args: Any, **kwargs: Any) -> None:
        contained("reading where an engine's clients are", _note, signature, manager, *args, **kwargs)
        init(manager, *args, **kwargs)

    return init_and_note


def _note(signature: inspect.Signature, manager: Any, *args: Any, **kwargs: Any) -> None:
    if not signature.bind(manager, *args, **kwargs).arguments["local_client"]:
        _headless.add(manager)


def wrap_engine_core_shutdown(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `CoreEngineProcManager.shutdown`."""

    def shutdown_with_time(manager: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        # Other engine cores have nothing to write, and are slow to clean up.
        if timeout is not None and (manager in _headless or _releases.uses_rust_frontend()):
            timeout = max(timeout, SECONDS)
        return shutdown(manager, timeout, *args, **kwargs)

    return shutdown_with_time


def _has_shutdown(manager: str) -> Callable[[ModuleType], bool]:
    return lambda module: session.is_recording and hasattr(getattr(module, manager, None), "shutdown")


API_SERVER_PATCHES: tuple[Patch, ...] = (
    Where(
        _has_shutdown("APIServerProcessManager"),
        Wrap("APIServerProcessManager.shutdown", ("timeout",), wrap_api_server_shutdown),
    ),
)
ENGINE_CORE_PATCHES: tuple[Patch, ...] = (
    Where(
        _has_shutdown("CoreEngineProcManager"),
        Wrap("CoreEngineProcManager.shutdown", ("timeout",), wrap_engine_core_shutdown),
    ),
    Where(
        _has_shutdown("CoreEngineProcManager"),
        Wrap("CoreEngineProcManager.__init__", ("local_client",), wrap_engine_core_init),
    ),
)
