"""A program with an engine of its own, as trainers have one: it calls `AsyncLLM`, and serves it by two apps.

One is vLLM's, with an API key. The other is a trainer's, which hands its requests to vLLM's serving class.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.api_server import build_app, init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

import agentlightning as agl
from agentlightning.importhook import locate
from agentlightning.instrumentation.vllm._releases import SERVE_ARGUMENTS

PROMPT: Any = {"prompt_token_ids": [1, 2, 3]}
TWO = SamplingParams(max_tokens=2, ignore_eos=True)


async def last(stream: AsyncIterator[Any]) -> Any:
    return [output async for output in stream][-1]


def baggage(rollout_id: str) -> dict[str, str]:
    return {"Baggage": f"agentlightning.rollout_id={rollout_id}", "x-agl-purpose": "review"}


async def call(engine: AsyncLLM) -> dict[str, str]:
    """Call the engine in every way that names a rollout; return what is an error."""
    with agl.rollout("ro-block", attempt_id="at-1", agent_id="planner"):
        task = asyncio.create_task(last(engine.generate(PROMPT, TWO, "in a task")))
        stream = engine.generate(PROMPT, TWO, "iterated later")
        with agl.rollout("ro-inner"):
            await last(engine.generate(PROMPT, SamplingParams(max_tokens=2, n=2), "inner"))
    await task
    await last(stream)
    await last(engine.generate(PROMPT, TWO, "baggage", trace_headers=baggage("ro-baggage")))
    await last(engine.generate(PROMPT, TWO, "agl/ro-id/at-id/critic/1"))
    with agl.rollout("ro-first"):
        await last(engine.generate(PROMPT, TWO, "agl/ro-third/2", trace_headers=baggage("ro-second")))
    await last(engine.generate(PROMPT, TWO, "agl/ro-third/3", trace_headers=baggage("ro-second")))
    await last(engine.generate(PROMPT, TWO, "agl/../4"))
    refusal = "none"
    try:
        with agl.rollouts(["ro-a", "ro-b"]):
            await last(engine.generate(PROMPT, TWO, "refused"))
    except ValueError as error:
        refusal = str(error)
    await last(engine.generate(PROMPT, TWO, "nameless"))
    with agl.rollout("ro-left"):
        async for _ in engine.generate(PROMPT, SamplingParams(max_tokens=500, ignore_eos=True), "left"):
            break
    return {"rollouts": refusal}


async def serve(engine: AsyncLLM, args: Any) -> dict[str, int]:
    """Ask both apps, and return the statuses of the answers."""
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)

    @app.post("/ask")
    async def ask() -> None:
        with agl.rollout("ro-handler"):
            await last(engine.generate(PROMPT, TWO, "handler"))

    own_app = FastAPI()

    @own_app.post("/rollouts/chat")
    async def chat(request: ChatCompletionRequest, raw_request: Request) -> Any:
        return await app.state.openai_serving_chat.create_chat_completion(request, raw_request)

    body = {"model": args.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    vllms, own = (
        httpx.AsyncClient(transport=httpx.ASGITransport(each), base_url="http://x") for each in (app, own_app)
    )
    chats = "/v1/chat/completions"
    answers = {}
    # A server that is started in a block serves others, who name their calls by themselves.
    with agl.rollout("ro-around"):
        key = {"authorization": "Bearer secret"}
        answers["prefix"] = await vllms.post(f"/rollout/ro-prefix{chats}", json=body, headers=key)
        answers["header"] = await vllms.post(chats, json=body, headers={**key, "x-agl-rollout-id": "ro-header"})
        key = {"authorization": "Bearer secret@rollout=ro-key"}
        answers["key"] = await vllms.post(chats, json=body, headers=key)
        answers["wrong key"] = await vllms.post(
            f"/rollout/ro-wrong{chats}", json=body, headers={"authorization": "Bearer wrong"}
        )
        answers["handler"] = await vllms.post("/rollout/ro-http/ask", json={})
    answers["own app"] = await own.post("/rollouts/chat", json=body, headers={"x-agl-rollout-id": "ro-own"})
    answers["own prefix"] = await own.post("/rollout/ro-own-prefix/rollouts/chat", json=body)
    key = {"authorization": "Bearer any@rollout=ro-own-key"}
    answers["own key"] = await own.post("/rollouts/chat", json=body, headers=key)
    return {name: answer.status_code for name, answer in answers.items()}


async def main(args: Any, file: Path) -> None:
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    try:
        errors = await call(engine)
        file.write_text(json.dumps({"errors": errors, "statuses": await serve(engine, args)}))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    # Where it is changes from release to release.
    arguments = importlib.import_module(next(filter(locate, SERVE_ARGUMENTS.modules)))
    asyncio.run(main(arguments.make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[2:]), Path(sys.argv[1])))
