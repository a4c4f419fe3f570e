"""Where each thing lives in which vLLM release: the only file with version numbers.

A target is found by what is there: each entry lists the names that a module has had, newest first, and whichever
vLLM imports is patched. Read from 38 releases between 0.8.5 and 0.33.0.
"""

from __future__ import annotations

CHAT_PROTOCOL = (
    "vllm.entrypoints.openai.chat_completion.protocol",  # from 0.15.0
    "vllm.entrypoints.openai.protocol",  # to 0.14.1
)
CHAT_SERVING = (
    "vllm.entrypoints.openai.chat_completion.serving",  # from 0.15.0
    "vllm.entrypoints.openai.serving_chat",  # to 0.14.1
)
COMPLETION_SERVING = (
    "vllm.entrypoints.openai.completion.serving",  # from 0.15.0
    "vllm.entrypoints.openai.serving_completion",  # to 0.14.1
)

SERVE_ARGUMENTS = (
    "vllm.entrypoints.launchers.cli_args",  # from 0.29.0
    "vllm.entrypoints.openai.cli_args",  # to 0.28.0
)
LAUNCHER = (
    "vllm.entrypoints.launchers.launcher",  # from 0.29.0
    "vllm.entrypoints.launcher",  # to 0.28.0
)

RETURN_TOKEN_IDS_SINCE = "0.10.2"
"""The first release whose chat and completions requests know `return_token_ids`."""
