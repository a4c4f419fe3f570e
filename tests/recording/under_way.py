"""A route for the tests: the number of unfinished engine requests that one API server follows."""

from __future__ import annotations

from typing import Any

from agentlightning.instrumentation.vllm.capture import frontend

ROUTE = "/under_way"


class UnderWay:
    """The middleware, for `vllm serve --middleware`."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != ROUTE:
            await self._app(scope, receive, send)
            return
        under_way = [*frontend._pending.values()]
        held = sum(len(each._requests) + len(each._parents) for each in under_way)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(held).encode()})
