"""Where each thing lives in which vLLM release: the only file with version numbers.

A target is found by what is there: each entry lists the names that a module has had, newest first, and whichever
vLLM imports is patched. Read from 38 releases between 0.8.5 and 0.33.0.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Home(NamedTuple):
    """The names that a module has had over the releases, and the release that it came with, if not all have it."""

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
BATCH_SERVING = Home(("vllm.entrypoints.openai.chat_completion.batch_serving",), since="0.19.1")
GENERATE_SERVING = Home(
    (
        "vllm.entrypoints.scale_out.token_in_token_out.serving",  # from 0.25.0
        "vllm.entrypoints.serve.disagg.serving",  # from 0.13.0
        "vllm.entrypoints.openai.serving_tokens",  # to 0.12.0
    ),
    since="0.11.1",
)
OUTPUT_PROCESSOR = Home(("vllm.v1.engine.output_processor",))
SERVE_ARGUMENTS = Home(
    (
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
    "smg_grpc_servicer.vllm.servicer",  # as read in 0.18.1 and later
    "vllm.grpc",  # as read in 0.14.1 and 0.15.1
)
"""Imported by what serves gRPC, and by nothing else."""

RETURN_TOKEN_IDS_SINCE = "0.10.2"
"""The first release whose chat and completions requests know `return_token_ids`."""
GENERATE_RETURN_TOKEN_IDS_SINCE = "0.30.0"
"""The first whose `/inference/v1/generate` does."""


def is_before(version: str, since: str) -> bool:
    """Whether a release is older than `since`; a version that is not a release's (`dev`) is never older."""
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return len(numbers) == 3 and any(numbers) and numbers < [int(number) for number in since.split(".")]
