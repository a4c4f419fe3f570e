"""The time that processes get to write down what they hold, where vLLM's main process stops them.

From 0.18 (as read; not yet in 0.15.1) it kills them right after their SIGTERM, unless it is given a --shutdown-timeout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any
from weakref import WeakSet

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import session
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["API_SERVER_PATCHES", "ENGINE_CORE_PATCHES"]

_headless: WeakSet[Any] = WeakSet()
"""The managers of engine cores whose frontend is on another machine."""

# What a recorder takes at most, and what vLLM does before it comes to it. Nobody waits longer than they take.
SECONDS = 7.0


def patient_with_api_servers(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `APIServerProcessManager.shutdown`."""

    def shutdown_patiently(manager: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        return shutdown(manager, max(timeout or 0.0, SECONDS), *args, **kwargs)

    return shutdown_patiently


def noting_where_clients_are(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `CoreEngineProcManager.__init__`, which is told whether its frontend is elsewhere (`--headless`)."""
    signature = inspect.signature(init)

    def init_and_note(manager: Any, *args: Any, **kwargs: Any) -> None:
        contained("reading where an engine's clients are", _note, signature, manager, *args, **kwargs)
        init(manager, *args, **kwargs)

    return init_and_note


def _note(signature: inspect.Signature, manager: Any, *args: Any, **kwargs: Any) -> None:
    if not signature.bind(manager, *args, **kwargs).arguments["local_client"]:
        _headless.add(manager)


def patient_with_engine_cores(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `CoreEngineProcManager.shutdown`."""

    def shutdown_patiently(manager: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        # Other engine cores have nothing to write down, and take their time to clean up.
        if timeout is not None and (manager in _headless or _releases.uses_rust_frontend()):
            timeout = max(timeout, SECONDS)
        return shutdown(manager, timeout, *args, **kwargs)

    return shutdown_patiently


def _manages(name: str) -> Callable[[ModuleType], bool]:
    return lambda module: session.is_on() and hasattr(getattr(module, name, None), "shutdown")


API_SERVER_PATCHES: tuple[Patch, ...] = (
    Where(
        _manages("APIServerProcessManager"),
        Wrap("APIServerProcessManager.shutdown", ("timeout",), patient_with_api_servers),
    ),
)
ENGINE_CORE_PATCHES: tuple[Patch, ...] = (
    Where(
        _manages("CoreEngineProcManager"),
        Wrap("CoreEngineProcManager.shutdown", ("timeout",), patient_with_engine_cores),
    ),
    Where(
        _manages("CoreEngineProcManager"),
        Wrap("CoreEngineProcManager.__init__", ("local_client",), noting_where_clients_are),
    ),
)
