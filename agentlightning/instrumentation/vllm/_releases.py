"""The home of each target in each vLLM release: the only code with version numbers.

Elsewhere only comments name releases, to explain a hazard. A target is found by its presence: each entry lists the
names that a module has had, newest first, and the one that vLLM imports is patched. Read from all 45 releases from
0.8.5 to 0.33.0; `make check-release` reads another.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any, NamedTuple


class Home(NamedTuple):
    """The names that a module has had, and the release that introduced it, if not all have it."""

    modules: tuple[str, ...]
    since: str | None = None


CHAT_PROTOCOL = Home(
    (
        "vllm.entrypoints.openai.chat_completion.protocol",  # from 0.15.0
        "vllm.entrypoints.openai.protocol",  # to 0.14.1
    )
)
CHAT_SERVING = Home(
    (
        "vllm.entrypoints.openai.chat_completion.serving",  # from 0.15.0
        "vllm.entrypoints.openai.serving_chat",  # to 0.14.1
    )
)
COMPLETION_SERVING = Home(
    (
        "vllm.entrypoints.openai.completion.serving",  # from 0.15.0
        "vllm.entrypoints.openai.serving_completion",  # to 0.14.1
    )
)
RESPONSES_SERVING = Home(
    (
        "vllm.entrypoints.openai.responses.serving",  # from 0.15.0
        "vllm.entrypoints.openai.serving_responses",  # to 0.14.1
    ),
    since="0.10.0",
)
MESSAGES_PROTOCOL = Home(("vllm.entrypoints.anthropic.protocol",), since="0.11.1")
MESSAGES_SERVING = Home(
    (
        "vllm.entrypoints.anthropic.serving",  # from 0.15.0
        "vllm.entrypoints.anthropic.serving_messages",  # to 0.14.1
    ),
    since="0.11.1",
)
BATCH_SERVING = Home(("vllm.entrypoints.openai.chat_completion.batch_serving",), since="0.19.0")
GENERATE_SERVING = Home(
    (
        "vllm.entrypoints.scale_out.token_in_token_out.serving",  # from 0.25.0
        "vllm.entrypoints.serve.disagg.serving",  # from 0.13.0
        "vllm.entrypoints.openai.serving_tokens",  # to 0.12.0
    ),
    since="0.11.1",
)
SERVING_BASE = Home(
    (
        "vllm.entrypoints.serve.engine.serving",  # from 0.24.0
        "vllm.entrypoints.openai.engine.serving",  # from 0.15.0
        "vllm.entrypoints.openai.serving_engine",  # to 0.14.1
    )
)
SAMPLING_PARAMS = Home(("vllm.sampling_params",))
OUTPUT_PROCESSOR = Home(("vllm.v1.engine.output_processor",))
ENGINE_CLIENT = Home(("vllm.v1.engine.async_llm",))
OFFLINE_ENGINE = Home(("vllm.v1.engine.llm_engine",))
OFFLINE_CALLS = Home(("vllm.entrypoints.llm",))
ENGINE_CORE = Home(("vllm.v1.engine.core",))
SCHEDULER = Home(("vllm.v1.core.sched.scheduler",))
CHAT_PREPARATION = Home(
    (
        "vllm.renderers.online_renderer",  # from 0.25.0
        "vllm.entrypoints.serve.render.serving",  # from 0.18.0
        "vllm.entrypoints.openai.engine.serving",  # from 0.15.0
        "vllm.entrypoints.openai.serving_engine",  # to 0.14.1
    )
)
CHAT_RENDERING = Home(
    (
        "vllm.renderers.base",  # from 0.17.0
        "vllm.renderers.protocol",  # in 0.16.0; in 0.15 it has something else
    ),
    since="0.16.0",
)
ENGINE_MESSAGES = Home(("vllm.v1.serial_utils",))
API_SERVER_MANAGER = Home(("vllm.v1.utils",))
ENGINE_CORE_MANAGER = Home(("vllm.v1.engine.utils",), since="0.9.2")
SERVE_ARGUMENTS = Home(
    (
        "vllm.entrypoints.common.cli_args",  # from 0.33.0
        "vllm.entrypoints.launchers.cli_args",  # from 0.29.0
        "vllm.entrypoints.openai.cli_args",  # to 0.28.0
    )
)
APP = Home(
    (
        "vllm.entrypoints.launchers.app",  # from 0.29.0
        "vllm.entrypoints.openai.api_server",  # to 0.28.0
    )
)
LAUNCHER = Home(
    (
        "vllm.entrypoints.launchers.launcher",  # from 0.29.0
        "vllm.entrypoints.launcher",  # to 0.28.0
    )
)

GRPC = (
    "smg_grpc_servicer.vllm.servicer",  # from 0.18.0
    "vllm.grpc",  # 0.14.0 to 0.17.1
)
"""Modules that only a gRPC server imports."""

NEWEST_KNOWN = "0.33.0"
"""The newest release that this table was read from."""

WHOLE_TOKEN_IDS_SINCE = "0.13.0"
"""The first release that gives all ids of chat and completions on request.

Up to 0.10.1 requests have no `return_token_ids`; up to 0.11.0 gpt-oss answers have no ids, and completions streams show
prompt ids to clients that did not ask; up to 0.12 streams lose the ids of chunks that are left out while a parser waits
for more.
"""
CONTINUES_SINCE = "0.14.0"
"""The first release in which a chat goes on from exact ids."""
RENDERS_CHATS_SINCE = "0.16.0"
"""The first release whose chats are rendered and tokenised by a renderer; before that, by the serving class."""
GENERATE_RETURN_TOKEN_IDS_SINCE = "0.30.0"
"""The first release whose `/inference/v1/generate` has `return_token_ids`."""
HIDES_IDS_OF_REASONING_SINCE = "0.26.0"
"""The first release whose chat answers leave out response ids and logprobs whenever they leave out reasoning."""

REASONING_PARSERS = ("parser_cls", "parser", "reasoning_parser_cls", "reasoning_parser", "use_harmony")
"""Attributes of a serving object that are set if a reasoning parser is configured; each release has some of them.

`use_harmony`: gpt-oss is parsed without a parser being configured.
"""


def serves_grpc() -> bool:
    """Tell whether this process serves vLLM's gRPC."""
    return any(module in sys.modules for module in GRPC)


def uses_rust_frontend() -> bool:
    """Tell whether vLLM is configured to answer by its Rust frontend, without Python."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


def gives_token_ids(request_model: Any) -> bool:
    """Tell whether this vLLM gives all ids of a chat or completions answer if a request says `return_token_ids`."""
    return "return_token_ids" in request_model.model_fields and not is_before(_version(), WHOLE_TOKEN_IDS_SINCE)


def hides_ids_of_reasoning() -> bool:
    """Tell whether this vLLM's chat answers leave out response ids whenever they leave out reasoning."""
    return not is_before(_version(), HIDES_IDS_OF_REASONING_SINCE)


def is_v0_engine(engine: object) -> bool:
    """Tell whether an engine client is of the V0 engine, which releases up to 0.10 have."""
    # From 0.11 on, vllm.engine.async_llm_engine is another name for V1's AsyncLLM, whose own module is vllm.v1's.
    return type(engine).__module__.startswith("vllm.engine.")


def is_older_than(since: str) -> bool:
    """Tell whether this vLLM is older than a release."""
    return is_before(_version(), since)


def _version() -> str:
    return getattr(sys.modules.get("vllm"), "__version__", "")


@cache
def is_before(version: str, since: str) -> bool:
    """Tell whether a release is older than `since`; a version that is not a release's (`dev`) is never older."""
    older, newer = _release(version), _release(since)
    return older is not None and newer is not None and older < newer


def _release(version: str) -> tuple[int, ...] | None:
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, numbers.groups())) if numbers and any(map(int, numbers.groups())) else None
