"""A gateway of the kind that others put in front of vLLM to have token ids: for comparison, and for nothing else.

As those of rLLM and miles it stands on FastAPI and httpx: it asks for ids, waits for the whole answer, keeps the ids in
dictionaries, by session, and passes on what is left of the answer without them. All else goes through.
`python -m benchmarks.proxy UPSTREAM PORT [logprobs]`: with the word, it asks for logprobs too.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

ITS_OWN = {"connection", "content-length", "host", "transfer-encoding"}
"""Headers of one connection, which are not passed on."""


def gateway(upstream: str, asks: Mapping[str, Any]) -> FastAPI:
    kept: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # vLLM closes a connection that has been idle for five seconds.
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=1)
        async with httpx.AsyncClient(base_url=upstream, limits=unlimited, timeout=None) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return JSONResponse({"error": {"message": "no streams"}}, 400)
        headers = {name: value for name, value in request.headers.items() if name not in ITS_OWN}
        response = await app.state.client.post(
            request.url.path, json={**body, "return_token_ids": True, **asks}, headers=headers
        )
        answer = response.json()
        prompt_token_ids = answer.pop("prompt_token_ids", None)
        for choice in answer.get("choices", ()):
            kept[request.headers.get("x-session-id", "")].append(
                {
                    "response_id": answer["id"],
                    "messages": body["messages"],
                    "prompt_token_ids": prompt_token_ids,
                    "token_ids": choice.pop("token_ids"),
                    "logprobs": choice.pop("logprobs", None),
                    "message": choice["message"],
                    "finish_reason": choice["finish_reason"],
                }
            )
        return JSONResponse(answer, response.status_code)

    @app.get("/{path:path}")
    async def others(path: str) -> Response:
        response = await app.state.client.get(f"/{path}")
        return Response(response.content, response.status_code, media_type=response.headers.get("content-type"))

    return app


if __name__ == "__main__":
    asks = {"logprobs": True} if sys.argv[3:] == ["logprobs"] else {}
    uvicorn.run(gateway(sys.argv[1], asks), port=int(sys.argv[2]), log_level="warning")
