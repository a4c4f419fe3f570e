"""Count what a server process still holds of its requests: `vllm serve --middleware tests.common.census.Census`."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from agentlightning.instrumentation.vllm._context import EngineRequest, RequestContext

PATH = "/census"
COUNTED = (RequestContext, EngineRequest)


class Census:
    """Answers `GET /census` from inside the server: how many objects of ours are alive, by class."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope.get("path") != PATH:
            await self._app(scope, receive, send)
            return
        gc.collect()
        alive = Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, COUNTED))
        body = json.dumps({counted.__name__: alive[counted.__name__] for counted in COUNTED}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})
