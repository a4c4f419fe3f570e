"""The capture: where token ids are born, each request to the engine is tied to the HTTP request that it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentlightning.instrumentation.vllm import request_context
from agentlightning.instrumentation.vllm.containment import contained
from agentlightning.instrumentation.vllm.request_context import EngineRequest, RequestContext
from agentlightning.patching import Patch, Wrap

__all__ = ["CAPTURE_PATCHES"]


def tied(add_request: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `OutputProcessor.add_request`, which runs once for each request to the engine."""

    def add_request_and_tie(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        context = request_context.current()
        if context is None or not context.collects:
            return add_request(self, request, *args, **kwargs)
        # More input for a request that is known already (realtime) comes the same way.
        is_new = request.request_id not in self.request_states
        answer = add_request(self, request, *args, **kwargs)
        if is_new:
            contained("capturing a request", _tie, self.request_states[request.request_id], request, context)
        return answer

    return add_request_and_tie


def _tie(state: Any, request: Any, context: RequestContext) -> None:
    # A pooling request has no detokenizer, and gives out no ids.
    if state.detokenizer is not None:
        # From 0.14 vLLM appends eight characters to the id that the frontend gave.
        name = getattr(request, "external_req_id", None) or request.request_id
        context.engine_requests.append(EngineRequest(name, request.prompt_token_ids, state.detokenizer))


CAPTURE_PATCHES: tuple[Patch, ...] = (Wrap("OutputProcessor.add_request", ("request",), tied),)
