"""The time that processes get to write down what they hold, where vLLM's main process stops them.

From 0.18 (as read; not yet in 0.15.1) it kills them right after their SIGTERM, unless it is given a --shutdown-timeout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from agentlightning.instrumentation.vllm import claims, recording
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["API_SERVER_PATCHES", "ENGINE_CORE_PATCHES"]

# What a recorder takes at most, and what vLLM does before it comes to it. Nobody waits longer than they take.
SECONDS = 7.0


def patient_with_api_servers(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `APIServerProcessManager.shutdown`."""

    def shutdown_patiently(manager: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        return shutdown(manager, max(timeout or 0.0, SECONDS), *args, **kwargs)

    return shutdown_patiently


def patient_with_engine_cores(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `CoreEngineProcManager.shutdown`."""

    def shutdown_patiently(manager: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        # Others have nothing to write down, and take their time to clean up.
        if timeout is not None and claims.frontend_is_elsewhere(sys.argv):
            timeout = max(timeout, SECONDS)
        return shutdown(manager, timeout, *args, **kwargs)

    return shutdown_patiently


def _manages(name: str) -> Callable[[ModuleType], bool]:
    return lambda module: recording.is_on() and hasattr(getattr(module, name, None), "shutdown")


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
)
