"""A driver of Ray whose actors generate as those of trainers do.

One serves vLLM's app and calls `AsyncLLM`, as verl's `vLLMHttpServer`; the other has an `LLM`, as OpenRLHF's
`LLMRayActor`.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import ray  # pyright: ignore[reportMissingImports]

import agentlightning as agl

PROMPT = [1, 2, 3]
STORE_SECONDS = 60


@ray.remote
class Server:
    async def launch(self, arguments: Sequence[str], port: int) -> None:
        import uvicorn
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        from agentlightning.importhook import locate
        from agentlightning.instrumentation.vllm._releases import SERVE_ARGUMENTS

        # Where it is changes from release to release.
        parser = importlib.import_module(next(filter(locate, SERVE_ARGUMENTS.modules)))
        args = parser.make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        usage = UsageContext.OPENAI_API_SERVER
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=usage)
        self.engine = AsyncLLM.from_vllm_config(vllm_config=config, usage_context=usage)
        tasks = await self.engine.get_supported_tasks()
        options = {"supported_tasks": tasks, "model_config": self.engine.model_config}
        known = inspect.signature(build_app).parameters
        app = build_app(args, **{name: value for name, value in options.items() if name in known})
        await init_app_state(self.engine, app.state, args, tasks)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port))
        self.task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.1)

    async def generate(self, prompt_ids: list[int], sampling_params: Any, request_id: str) -> list[int]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        outputs = self.engine.generate(
            prompt=TokensPrompt(prompt_token_ids=prompt_ids),  # pyright: ignore[reportCallIssue]
            sampling_params=SamplingParams(**sampling_params),
            request_id=request_id,
        )
        return [list(output.outputs[0].token_ids) async for output in outputs][-1]


@ray.remote
class Offline:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        from vllm import LLM

        self.llm = LLM(*args, **kwargs)

    def generate(self, prompts: list[list[int]], rollout_ids: list[str]) -> list[list[int]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(max_tokens=2, ignore_eos=True)
        with agl.rollouts(rollout_ids):
            outputs = self.llm.generate(
                [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],  # pyright: ignore[reportCallIssue]
                params,
            )
        return [list(output.outputs[0].token_ids) for output in outputs]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def wait_until_written(store: str, count: int) -> None:
    """Wait for so many generations: a killed actor writes nothing more."""
    deadline = time.monotonic() + STORE_SECONDS
    while time.monotonic() < deadline:
        with agl.open_store(store, read_only=True) as opened:
            if sum(opened.tally().values()) >= count:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{count} generations are not written after {STORE_SECONDS} s")


def main(store: str, told: Path, port: int, model: str, *options: str) -> None:
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
    generated = {}
    # What the decorator has made of them, which is unknown here.
    make_server, make_offline = cast("Any", Server).remote, cast("Any", Offline).remote
    server = make_server()
    ray.get(server.launch.remote(["--model", model, *options], port))
    params = {"max_tokens": 2, "ignore_eos": True}
    generated["ro-actor"] = ray.get(server.generate.remote(PROMPT, params, "agl/ro-actor/at-1/7"))
    url = f"http://127.0.0.1:{port}/rollout/ro-http/v1/completions"
    answer = post(url, {"model": model, "prompt": PROMPT, **params, "return_token_ids": True})
    generated["ro-http"] = answer["choices"][0]["token_ids"]
    wait_until_written(store, len(generated))
    ray.kill(server)

    small = {"max_model_len": 1024, "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 256 << 20}
    offline = make_offline(model, **small)
    both = ray.get(offline.generate.remote([PROMPT, PROMPT[:2]], ["ro-first", "ro-second"]))
    generated["ro-first"], generated["ro-second"] = both
    wait_until_written(store, len(generated))
    ray.shutdown()
    told.write_text(json.dumps(generated))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
