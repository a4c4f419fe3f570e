"""The time that API servers get to write down what they hold, where vLLM runs several of them.

From 0.18 (as read; not yet in 0.15.1) it kills them right after their SIGTERM, unless it is given a --shutdown-timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from agentlightning.instrumentation.vllm import recording
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["MANAGER_PATCHES"]

# What a recorder takes at most, and what vLLM does before it comes to it. Nobody waits longer than they take.
SECONDS = 7.0


def patient(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `APIServerProcessManager.shutdown`."""

    def shutdown_patiently(manager: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        return shutdown(manager, max(timeout or 0.0, SECONDS), *args, **kwargs)

    return shutdown_patiently


def _has_no_patience(module: ModuleType) -> bool:
    manager = getattr(module, "APIServerProcessManager", None)
    return recording.is_on() and hasattr(manager, "shutdown")


MANAGER_PATCHES: tuple[Patch, ...] = (
    Where(_has_no_patience, Wrap("APIServerProcessManager.shutdown", ("timeout",), patient)),
)
