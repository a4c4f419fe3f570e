"""Token ids in the answers of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from agentlightning.instrumentation.vllm import answer, releases
from agentlightning.instrumentation.vllm.answer import Carried, Endpoint, RequestField
from agentlightning.instrumentation.vllm.fields import ExtraField
from agentlightning.patching import Patch, Wrap

__all__ = ["RESPONSE_PATCHES", "SERVING_PATCHES"]


def attach(response: Any, request: Any, carried: Carried) -> None:
    """vLLM's answer has `prompt_token_ids` and each choice's `token_ids`: add `response_token_ids`."""
    if not carried.prompt:
        response.prompt_token_ids = None
    answer.add_response_token_ids(response)


def trim(stream: AsyncGenerator[str, None], request: Any, carried: Carried) -> AsyncGenerator[str, None]:
    """vLLM's stream has all that it should; its prompt ids may be one thing too many."""
    return stream if carried.prompt else answer.edited(stream, "prompt_token_ids", _drop_prompt_ids)


def _drop_prompt_ids(chunk: dict[str, Any]) -> None:
    if "prompt_token_ids" in chunk:
        chunk["prompt_token_ids"] = None


def _answers_chat(serving: Any) -> bool:
    # vLLM's Anthropic and Cohere endpoints are subclasses that turn a chat answer into one of theirs: chunks that
    # they do not expect would change it. A subclass from outside vLLM still answers chat requests.
    vllms_own = next((cls for cls in type(serving).__mro__ if cls.__module__.startswith("vllm.")), None)
    return vllms_own is None or vllms_own.__name__ == "OpenAIServingChat"


ENDPOINT = Endpoint("/v1/chat/completions", attach, trim, serves=_answers_chat)

RESPONSE_PATCHES: tuple[Patch, ...] = (
    ExtraField("ChatCompletionResponse", "response_token_ids", list[list[int]] | None),
)
SERVING_PATCHES: tuple[Patch, ...] = (
    RequestField("ChatCompletionRequest", "return_token_ids", releases.RETURN_TOKEN_IDS_SINCE),
    Wrap("OpenAIServingChat.create_chat_completion", ("request",), ENDPOINT.wrap),
)
