"""Token ids in the answers of `/v1/responses`: plain, streamed, in the background, and fetched again later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agentlightning.instrumentation.vllm import recording, request_context
from agentlightning.instrumentation.vllm.answer import captured_fields, hides_reasoning, said, wanted
from agentlightning.instrumentation.vllm.containment import contained
from agentlightning.patching import Patch, Wrap

__all__ = ["SERVING_PATCHES"]

ROUTE = "/v1/responses"


def collected(create: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `create_responses`."""

    async def create_responses(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        answer, _ = await request_context.collecting(lambda: create(serving, request, *args, **kwargs))
        return answer

    return create_responses


def with_token_ids(build: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `responses_full_generator`.

    It builds every response that was finished: the plain answer, the closing event's of a stream, and what is stored
    to be fetched, which is the same object.
    """

    async def responses_full_generator(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = await build(serving, request, *args, **kwargs)
        if hasattr(response, "output"):
            contained(f"{ROUTE}: attaching ids", _attach, response, serving, request)
        return response

    return responses_full_generator


def _attach(response: Any, serving: Any, request: Any) -> None:
    carried = wanted(said(request))
    if hides_reasoning(serving, request):
        carried = replace(carried, response=False)
    for name, value in captured_fields(request_context.current(), carried).items():
        setattr(response, name, value)


SERVING_PATCHES: tuple[Patch, ...] = (
    recording.calls("OpenAIServingResponses.create_responses", ROUTE),
    Wrap("OpenAIServingResponses.create_responses", ("request",), collected),
    Wrap("OpenAIServingResponses.responses_full_generator", ("request",), with_token_ids),
)
