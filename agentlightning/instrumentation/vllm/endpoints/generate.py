"""Token ids in the answers of `/inference/v1/generate`: it always has the response ids, and prompt ids on request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from agentlightning.instrumentation.vllm import _releases
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints import sse
from agentlightning.instrumentation.vllm.endpoints.answer import id_fields
from agentlightning.instrumentation.vllm.endpoints.fields import RequestField
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]

ROUTE = "/inference/v1/generate"


def wrap_serve_tokens(serve: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `serve_tokens`."""

    async def serve_tokens(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        has_asked = contained(f"{ROUTE}: asking for ids", _ask, request)
        answer = await serve(serving, request, *args, **kwargs)
        if has_asked and isinstance(answer, AsyncGenerator):
            return sse.split_long_events(answer, ROUTE)
        return answer

    return serve_tokens


def _ask(request: Any) -> bool:
    """Ask for prompt ids if the request does not say, and the server's default is to return them."""
    if request.return_token_ids is not None or not id_fields(None).prompt:
        return False
    request.return_token_ids = True
    return True


SERVING_PATCHES: tuple[Patch, ...] = (
    # Without this field, the only prompt ids are those that the client has sent itself.
    RequestField("GenerateRequest", "return_token_ids", _releases.GENERATE_RETURN_TOKEN_IDS_SINCE),
    calls.in_one_call("ServingTokens.serve_tokens", ROUTE),
    Wrap("ServingTokens.serve_tokens", ("request",), wrap_serve_tokens),
)
