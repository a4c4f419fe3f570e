"""A program that serves vLLM's app itself, as trainers do: by its own uvicorn instead of vLLM's `serve_http`."""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import uvicorn
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.api_server import build_app, init_app_state
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from agentlightning.importhook import locate
from agentlightning.instrumentation.vllm._releases import SERVE_ARGUMENTS


async def serve(args: Any) -> None:
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    try:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        await uvicorn.Server(uvicorn.Config(app, host=args.host, port=args.port)).serve()
    finally:
        engine.shutdown()


if __name__ == "__main__":
    # Where it is changes from release to release.
    arguments = importlib.import_module(next(filter(locate, SERVE_ARGUMENTS.modules)))
    asyncio.run(serve(arguments.make_arg_parser(FlexibleArgumentParser()).parse_args()))
