"""A made-up vLLM: a package of that name with what the instrumentation patches, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

VERSION = "0.33.0"
PROMPT, RESPONSE = [1, 2], [3, 4]

PACKAGE = f'__version__ = "{VERSION}"\n'

CHAT_PROTOCOL = """\
from pydantic import BaseModel, ConfigDict

class ChatCompletionRequest(BaseModel):
    return_token_ids: bool | None = None

class ChatCompletionResponseChoice(BaseModel):
    index: int = 0
    token_ids: list[int] | None = None

class ChatCompletionResponse(BaseModel):
    model_config = ConfigDict(extra="allow")
    choices: list[ChatCompletionResponseChoice]
    prompt_token_ids: list[int] | None = None
"""

COMPLETION_PROTOCOL = """\
from pydantic import BaseModel, ConfigDict

class CompletionRequest(BaseModel):
    return_token_ids: bool | None = None
    echo: bool = False
    n: int = 1
    max_tokens: int = 16
    prompt_embeds: bytes | None = None

class CompletionResponseChoice(BaseModel):
    index: int = 0
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None

class CompletionResponse(BaseModel):
    model_config = ConfigDict(extra="allow")
    choices: list[CompletionResponseChoice]
"""

CHAT_SERVING = f"""\
from .protocol import ChatCompletionRequest, ChatCompletionResponse, ChatCompletionResponseChoice

class OpenAIServingChat:
    async def create_chat_completion(self, request, raw_request=None):
        if not request.return_token_ids:
            return ChatCompletionResponse(choices=[ChatCompletionResponseChoice()])
        choice = ChatCompletionResponseChoice(token_ids={RESPONSE})
        return ChatCompletionResponse(choices=[choice], prompt_token_ids={PROMPT})
"""

COMPLETION_SERVING = f"""\
from .protocol import CompletionRequest, CompletionResponse, CompletionResponseChoice

class OpenAIServingCompletion:
    async def create_completion(self, request, raw_request=None):
        return self.request_output_to_completion_response([], request)

    def request_output_to_completion_response(self, final_res_batch, request):
        if not request.return_token_ids:
            return CompletionResponse(choices=[CompletionResponseChoice()])
        choice = CompletionResponseChoice(prompt_token_ids={PROMPT}, token_ids={RESPONSE})
        return CompletionResponse(choices=[choice])

    async def completion_stream_generator(self, request, result_generator):
        yield "data: [DONE]\\n\\n"
"""

SAMPLING_PARAMS = """\
class SamplingParams:
    def _verify_args(self): ...
"""

OUTPUT_PROCESSOR = """\
class OutputProcessor:
    def add_request(self, request, prompt, parent_req=None, request_index=0, queue=None):
        pass

    def process_outputs(self, engine_core_outputs):
        pass

    def abort_requests(self, request_ids, internal):
        pass

    def propagate_error(self, error):
        pass
"""

ENGINE_CLIENT = """\
class AsyncLLM:
    def __init__(self, vllm_config=None):
        pass

    async def add_request(self, request_id, prompt, params, trace_headers=None):
        pass

    async def generate(self, prompt, sampling_params, request_id, trace_headers=None):
        yield
"""

OFFLINE_ENGINE = """\
class LLMEngine:
    def __init__(self, vllm_config):
        pass

    def add_request(self, request_id, prompt, params, trace_headers=None):
        pass

    def step(self):
        pass
"""

OFFLINE_CALLS = """\
class LLM:
    def generate(self, prompts, sampling_params=None):
        pass

    def chat(self, messages, sampling_params=None):
        pass

    def beam_search(self, prompts, params):
        pass
"""

ENGINE_CORE = """\
class EngineCore:
    def __init__(self):
        pass

    def shutdown(self):
        pass

class EngineCoreProc(EngineCore):
    def _send_engine_dead(self):
        pass
"""

SCHEDULER = """\
class Scheduler:
    def add_request(self, request):
        pass

    def update_from_output(self, scheduler_output, model_runner_output):
        pass

    def finish_requests(self, request_ids, finished_status):
        pass
"""

CHAT_RENDERING = """\
class BaseRenderer:
    async def render_chat_async(self, conversations, chat_params, tok_params=None):
        pass

    async def tokenize_prompts_async(self, prompts, params):
        pass
"""

CHAT_PREPARATION = """\
class OnlineRenderer:
    async def preprocess_chat(self, request, messages):
        pass
"""

ENGINE_MESSAGES = """\
class MsgpackEncoder:
    def encode(self, obj):
        pass

    def encode_into(self, obj, buf):
        pass

class MsgpackDecoder:
    def __init__(self, t=None):
        pass

    def decode(self, bufs):
        pass
"""

RESPONSES_SERVING = """\
class OpenAIServingResponses:
    async def create_responses(self, request, raw_request=None):
        pass

    async def responses_full_generator(self, request):
        pass
"""

MESSAGES_PROTOCOL = """\
from pydantic import BaseModel

class AnthropicMessagesResponse(BaseModel):
    id: str
"""

MESSAGES_SERVING = """\
class AnthropicServingMessages:
    async def create_messages(self, request, raw_request=None):
        pass
"""

BATCH_SERVING = """\
class OpenAIServingChatBatch:
    async def create_batch_chat_completion(self, request, raw_request=None):
        pass
"""

GENERATE_SERVING = """\
from pydantic import BaseModel

class GenerateRequest(BaseModel):
    return_token_ids: bool | None = None

class ServingTokens:
    async def serve_tokens(self, request, raw_request=None):
        pass
"""

SERVING_BASE = """\
class BaseServing:
    async def _check_model(self, request):
        pass
"""

ENVS = """\
import os

VLLM_USE_RUST_FRONTEND = bool(int(os.environ.get("VLLM_USE_RUST_FRONTEND", "0")))
"""

SERVE_ARGUMENTS = """\
def make_arg_parser(parser):
    parser.add_argument("--grpc", action="store_true")
    parser.add_argument("--headless", action="store_true")
    return parser

def validate_parsed_serve_args(args):
    print("validated", flush=True)
"""

LAUNCHER = """\
async def serve_http(app, sock, **uvicorn_kwargs):
    print("served", flush=True)
"""

APP = """\
from types import SimpleNamespace

class App:
    middleware_stack = None

    def __init__(self, args):
        self.state = SimpleNamespace(args=args)
        self.routes = []

    def add_api_route(self, path, endpoint, **options):
        self.routes.append(SimpleNamespace(path=path, endpoint=endpoint))

    def build_middleware_stack(self):
        return self

def build_app(args, supported_tasks=None):
    return App(args)
"""

# It imports what it serves with before the arguments are read, as vLLM does, and what answers only when it serves.
API_SERVER = """\
import argparse
import asyncio

from {launcher} import serve_http
from {serve_arguments} import make_arg_parser, validate_parsed_serve_args

{app}

def run_server(args):
    from vllm.v1.engine.async_llm import AsyncLLM as Engine
    app = build_app(args)
    app.state.engine_client = Engine()
    asyncio.run(serve_http(app, None))

def main():
    args = make_arg_parser(argparse.ArgumentParser()).parse_args()
    validate_parsed_serve_args(args)
    run_server(args)

if __name__ == "__main__":
    main()
"""

CLI = """\
import argparse

from vllm.entrypoints.openai.api_server import make_arg_parser, run_server, validate_parsed_serve_args

def main():
    parser = argparse.ArgumentParser()
    make_arg_parser(parser.add_subparsers(dest="subparser").add_parser("serve"))
    args = parser.parse_args()
    validate_parsed_serve_args(args)
    if args.grpc:
        import vllm.grpc
    if not args.headless:
        run_server(args)

if __name__ == "__main__":
    main()
"""

Layout = Literal["bare", "to 0.14", "from 0.15", "from 0.29", "from 0.33"]


def _server(launcher: str, serve_arguments: str, app: str | None = None) -> dict[str, str]:
    """Return the modules that start a vLLM.

    Args:
        launcher: the module that holds `serve_http`.
        serve_arguments: the one that holds `validate_parsed_serve_args`.
        app: the one that holds `build_app`; `vllm.entrypoints.openai.api_server` itself if not given.
    """
    modules = {launcher: LAUNCHER, serve_arguments: SERVE_ARGUMENTS, **({app: APP} if app else {})}
    api_server = API_SERVER.format(
        launcher=f"vllm.{launcher}",
        serve_arguments=f"vllm.{serve_arguments}",
        app=f"from vllm.{app} import build_app" if app else APP,
    )
    return {
        "envs.py": ENVS,
        "grpc.py": "",
        "engine/async_llm_engine.py": "class AsyncLLMEngine:\n    pass\n",
        **{f"{name.replace('.', '/')}.py": text for name, text in modules.items()},
        "entrypoints/openai/api_server.py": api_server,
        "entrypoints/cli/main.py": CLI,
    }


TO_0_28 = _server("entrypoints.launcher", "entrypoints.openai.cli_args")
FROM_0_29 = _server("entrypoints.launchers.launcher", "entrypoints.launchers.cli_args", "entrypoints.launchers.app")
FROM_0_33 = _server("entrypoints.launchers.launcher", "entrypoints.common.cli_args", "entrypoints.launchers.app")
SERVING_FROM_0_15 = {
    "entrypoints/openai/chat_completion/protocol.py": CHAT_PROTOCOL,
    "entrypoints/openai/chat_completion/serving.py": CHAT_SERVING,
    "entrypoints/openai/completion/protocol.py": COMPLETION_PROTOCOL,
    "entrypoints/openai/completion/serving.py": COMPLETION_SERVING,
}

# Where these have been in every release that has them, or in the newest.
THE_SAME_EVERYWHERE = {
    "sampling_params.py": SAMPLING_PARAMS,
    "v1/engine/output_processor.py": OUTPUT_PROCESSOR,
    "v1/engine/async_llm.py": ENGINE_CLIENT,
    "v1/engine/llm_engine.py": OFFLINE_ENGINE,
    "entrypoints/llm.py": OFFLINE_CALLS,
    "v1/engine/core.py": ENGINE_CORE,
    "v1/engine/utils.py": "",
    "v1/core/sched/scheduler.py": SCHEDULER,
    "v1/serial_utils.py": ENGINE_MESSAGES,
    "renderers/online_renderer.py": CHAT_PREPARATION,
    "renderers/base.py": CHAT_RENDERING,
    "v1/utils.py": "",
    "entrypoints/serve/engine/serving.py": SERVING_BASE,
    "entrypoints/anthropic/protocol.py": MESSAGES_PROTOCOL,
    "entrypoints/anthropic/serving.py": MESSAGES_SERVING,
    "entrypoints/openai/chat_completion/batch_serving.py": BATCH_SERVING,
    "entrypoints/openai/responses/serving.py": RESPONSES_SERVING,
    "entrypoints/scale_out/token_in_token_out/serving.py": GENERATE_SERVING,
}

# Below vllm/.
MODULES: Mapping[Layout, Mapping[str, str]] = {
    "bare": {},
    "to 0.14": {
        "entrypoints/openai/protocol.py": CHAT_PROTOCOL + COMPLETION_PROTOCOL,
        "entrypoints/openai/serving_chat.py": CHAT_SERVING,
        "entrypoints/openai/serving_completion.py": COMPLETION_SERVING,
        **TO_0_28,
        **THE_SAME_EVERYWHERE,
    },
    "from 0.15": {**SERVING_FROM_0_15, **TO_0_28, **THE_SAME_EVERYWHERE},
    "from 0.29": {**SERVING_FROM_0_15, **FROM_0_29, **THE_SAME_EVERYWHERE},
    "from 0.33": {**SERVING_FROM_0_15, **FROM_0_33, **THE_SAME_EVERYWHERE},
}


def made_up_vllm(folder: Path, layout: Layout = "from 0.15", edits: Mapping[str, str] | None = None) -> None:
    """Write a package `vllm` into `folder`, to be put first on the path of a program.

    It is made up, for what no installed vLLM shows: releases that do not exist yet or are broken. What a real one
    answers is asked of a real one.

    Args:
        folder: where the package comes to lie.
        layout: where its modules are: as in these releases, or nowhere.
        edits: text in its files, and what stands there instead: how it differs from what the patches rely on.

    Raises:
        ValueError: if none of its files holds the text that an edit replaces.
    """
    package = folder / "vllm"
    files = {package / "__init__.py": PACKAGE}
    files |= {package / name: text for name, text in MODULES[layout].items()}
    for old, new in (edits or {}).items():
        if not any(old in text for text in files.values()):
            raise ValueError(f"the made-up vLLM has no {old!r}")
        files = {file: text.replace(old, new) for file, text in files.items()}
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for subpackage in filter(Path.is_dir, package.rglob("*")):
        (subpackage / "__init__.py").touch()
