"""A gateway of the kind that others put in front of vLLM to have token ids: for comparison, and for nothing else.

It asks for ids, waits for the whole answer, keeps the ids in dictionaries, by session, and passes the answer on. All
else goes through. `python -m benchmarks.proxy UPSTREAM PORT`
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse


def gateway(upstream: str) -> FastAPI:
    kept: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(upstream, connector=aiohttp.TCPConnector(limit=0)) as session:
            app.state.session = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return JSONResponse({"error": {"message": "no streams"}}, 400)
        async with app.state.session.post(request.url.path, json={**body, "return_token_ids": True}) as response:
            answer = await response.json()
        for choice in answer.get("choices", ()):
            kept[request.headers.get("x-session-id", "")].append(
                {
                    "response_id": answer["id"],
                    "messages": body["messages"],
                    "prompt_token_ids": answer["prompt_token_ids"],
                    "token_ids": choice["token_ids"],
                    "finish_reason": choice["finish_reason"],
                }
            )
        return JSONResponse(answer, response.status)

    @app.get("/{path:path}")
    async def others(path: str) -> Response:
        async with app.state.session.get(f"/{path}") as response:
            return Response(await response.read(), response.status, media_type=response.content_type)

    return app


if __name__ == "__main__":
    uvicorn.run(gateway(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
