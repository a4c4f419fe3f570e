"""Token ids in the answers of `/inference/v1/generate`: the response ids are there, the prompt ids where asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints import sse
from agentlightning.instrumentation.vllm.endpoints.answer import wanted
from agentlightning.instrumentation.vllm.endpoints.fields import RequestField
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]

ROUTE = "/inference/v1/generate"


def with_prompt_ids(serve: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `serve_tokens`."""

    async def serve_tokens(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        asked = contained(f"{ROUTE}: asking for ids", _ask, request)
        answer = await serve(serving, request, *args, **kwargs)
        return sse.split(answer, ROUTE) if asked and isinstance(answer, AsyncGenerator) else answer

    return serve_tokens


def _ask(request: Any) -> bool:
    """Ask for prompt ids where the request does not say, and whether that was done."""
    if request.return_token_ids is not None or not wanted(None).prompt:
        return False
    request.return_token_ids = True
    return True


SERVING_PATCHES: tuple[Patch, ...] = (
    # Before, its prompt ids are only what the client has sent itself.
    RequestField("GenerateRequest", "return_token_ids", _releases.GENERATE_RETURN_TOKEN_IDS_SINCE),
    calls.in_one_call("ServingTokens.serve_tokens", ROUTE),
    Wrap("ServingTokens.serve_tokens", ("request",), with_prompt_ids),
)
