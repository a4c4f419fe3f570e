"""Token ids in the answers of `/v1/chat/completions/batch`: one choice for each conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints.answer import (
    NOTHING,
    Carried,
    add_response_token_ids,
    hides_reasoning,
    wanted,
)
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]

ROUTE = "/v1/chat/completions/batch"


def with_token_ids(create: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `create_batch_chat_completion`."""

    async def create_batch_chat_completion(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        carried = contained(f"{ROUTE}: asking for ids", _ask, request) or NOTHING
        # vLLM's chat hides ids and logprobs together with the reasoning; its batch hides the text alone.
        hidden = carried.response and contained(f"{ROUTE}: hiding reasoning", _hide, serving, request)
        answer, context = await _context.collecting(lambda: create(serving, request, *args, **kwargs))
        if carried.response and hasattr(answer, "choices"):
            if hidden:
                carried = replace(carried, response=False)
                contained(f"{ROUTE}: hiding reasoning", _drop_logprobs, answer)
            contained(f"{ROUTE}: attaching ids", _attach, answer, context, carried)
        return answer

    return create_batch_chat_completion


def _ask(request: Any) -> Carried:
    # Its default is False, unlike that of a chat request: whether it was said tells the set of fields.
    said = "return_token_ids" in request.model_fields_set
    carried = wanted(request.return_token_ids if said else None)
    if carried.response:
        request.return_token_ids = True
    return carried


def _hide(serving: Any, request: Any) -> bool:
    if not hides_reasoning(serving, request):
        return False
    request.return_token_ids = False
    return True


def _drop_logprobs(answer: Any) -> None:
    for choice in answer.choices:
        choice.logprobs = None


def _attach(answer: Any, context: RequestContext, carried: Carried) -> None:
    if carried.prompt:
        # The conversations are worked on side by side, so they are told apart by the number in their request's id.
        prompts = {
            int(request.request_id.rpartition("_")[2]): request.prompt_token_ids for request in context.engine_requests
        }
        for choice in answer.choices:
            choice.prompt_token_ids = prompts[choice.index]
    if carried.response:
        add_response_token_ids(answer)


SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("OpenAIServingChatBatch.create_batch_chat_completion", ROUTE),
    Wrap("OpenAIServingChatBatch.create_batch_chat_completion", ("request",), with_token_ids),
)
