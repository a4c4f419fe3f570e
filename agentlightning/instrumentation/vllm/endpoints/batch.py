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
    NO_IDS,
    IdFields,
    add_response_token_ids,
    hides_reasoning,
    id_fields,
)
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]

ROUTE = "/v1/chat/completions/batch"


def wrap_create(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_batch_chat_completion`."""

    async def create_batch_chat_completion(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        fields = contained(f"{ROUTE}: asking for ids", _ask, request) or NO_IDS
        # vLLM's chat hides ids and logprobs together with the reasoning; its batch endpoint hides only the text.
        hidden = fields.response and contained(f"{ROUTE}: hiding reasoning", _hide, serving, request)
        answer, context = await _context.collect_engine_requests(create, serving, request, *args, **kwargs)
        if fields.response and hasattr(answer, "choices"):
            if hidden:
                fields = replace(fields, response=False)
                contained(f"{ROUTE}: hiding reasoning", _drop_logprobs, answer)
            contained(f"{ROUTE}: attaching ids", _attach, answer, context, fields)
        return answer

    return create_batch_chat_completion


def _ask(request: Any) -> IdFields:
    # Unlike a chat request's, its default is False: the set of fields tells whether the client has set it.
    is_set = "return_token_ids" in request.model_fields_set
    fields = id_fields(request.return_token_ids if is_set else None)
    if fields.response:
        request.return_token_ids = True
    return fields


def _hide(serving: Any, request: Any) -> bool:
    if not hides_reasoning(serving, request):
        return False
    request.return_token_ids = False
    return True


def _drop_logprobs(answer: Any) -> None:
    for choice in answer.choices:
        choice.logprobs = None


def _attach(answer: Any, context: RequestContext, fields: IdFields) -> None:
    if fields.prompt:
        # The conversations run concurrently, so the number in each engine request's id tells them apart.
        prompts = {
            int(request.request_id.rpartition("_")[2]): request.prompt_token_ids for request in context.engine_requests
        }
        for choice in answer.choices:
            choice.prompt_token_ids = prompts[choice.index]
    if fields.response:
        add_response_token_ids(answer)


SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("OpenAIServingChatBatch.create_batch_chat_completion", ROUTE),
    Wrap("OpenAIServingChatBatch.create_batch_chat_completion", ("request",), wrap_create),
)
