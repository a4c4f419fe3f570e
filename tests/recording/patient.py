"""A server that waits for its store as long as a busy machine takes: `--middleware=tests.recording.patient.Patient`."""

from __future__ import annotations

from collections.abc import Awaitable, MutableMapping
from typing import Any

from agentlightning.instrumentation.vllm._context import App
from agentlightning.instrumentation.vllm.continuation import recall

SECONDS = 60


class Patient:
    """ASGI: change nothing but how long calls of other servers are waited for."""

    def __init__(self, app: App) -> None:
        self._app = app
        recall.SECONDS = SECONDS

    def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> Awaitable[None]:
        return self._app(scope, receive, send)
