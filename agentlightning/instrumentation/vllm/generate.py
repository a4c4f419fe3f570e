"""Token ids in the answers of `/inference/v1/generate`: the response ids are there, the prompt ids where asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentlightning.instrumentation.vllm import recording, releases
from agentlightning.instrumentation.vllm.answer import wanted
from agentlightning.instrumentation.vllm.containment import contained
from agentlightning.instrumentation.vllm.fields import RequestField
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]

ROUTE = "/inference/v1/generate"


def with_prompt_ids(serve: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `serve_tokens`."""

    async def serve_tokens(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        contained(f"{ROUTE}: asking for ids", _ask, request)
        return await serve(serving, request, *args, **kwargs)

    return serve_tokens


def _ask(request: Any) -> None:
    if request.return_token_ids is None and wanted(None).prompt:
        request.return_token_ids = True


SERVING_PATCHES: tuple[Patch, ...] = (
    # Before, its prompt ids are only what the client has sent itself.
    RequestField("GenerateRequest", "return_token_ids", releases.GENERATE_RETURN_TOKEN_IDS_SINCE),
    recording.calls("ServingTokens.serve_tokens", ROUTE),
    Wrap("ServingTokens.serve_tokens", ("request",), with_prompt_ids),
)
