"""Token ids in the answers of `/v1/responses`: plain, streamed, in the background, and fetched again later."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints import sse
from agentlightning.instrumentation.vllm.endpoints.answer import (
    captured_fields,
    hides_reasoning,
    id_fields,
    return_token_ids_of,
)
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["SERVING_PATCHES"]

ROUTE = "/v1/responses"

MOVABLE_FIELDS = ("generations", "prompt_token_ids", "response_token_ids")
"""Fields that are moved out of a closing event, in this order, until it is short enough."""


def wrap_create(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_responses`."""

    async def create_responses(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        answer, _ = await _context.collect_engine_requests(create, serving, request, *args, **kwargs)
        return answer

    return create_responses


def wrap_full_generator(build: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `responses_full_generator`.

    It builds every finished response: the plain answer, the one in a stream's closing event, and the stored one to be
    fetched, which is the same object.
    """

    async def responses_full_generator(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = await build(serving, request, *args, **kwargs)
        if hasattr(response, "output"):
            contained(f"{ROUTE}: attaching ids", _attach, response, serving, request)
        return response

    return responses_full_generator


def _attach(response: Any, serving: Any, request: Any) -> None:
    fields = id_fields(return_token_ids_of(request))
    if hides_reasoning(serving, request):
        fields = replace(fields, response=False)
    for name, value in captured_fields(_context.current(), fields).items():
        setattr(response, name, value)


def wrap_stream_generator(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `responses_stream_generator`, whose closing event carries the response and its ids."""

    def responses_stream_generator(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        stream = generate(serving, request, *args, **kwargs)
        return stream if id_fields(return_token_ids_of(request)).unsplit else _split_closing_event(stream)

    return responses_stream_generator


async def _split_closing_event(stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Yield the stream's events; ids that make the closing event too long go into events before it."""
    in_progress = None
    async with aclosing(stream):
        async for event in stream:
            if getattr(event, "type", None) == "response.in_progress":
                in_progress = event
            elif in_progress is not None and hasattr(event, "response"):
                *before, event = contained(f"{ROUTE}: splitting a long event", _split, event, in_progress) or (event,)
                for each in before:
                    yield each
            yield event


def _split(event: Any, in_progress: Any) -> list[Any]:
    """Return the closing event, after events like `in_progress` with the ids that would make it too long."""
    response, fields = event.response, dict(event.response.model_extra or {})
    moved: dict[str, Any] = {}
    for name in MOVABLE_FIELDS:
        if name in fields and sse.is_long(event.model_dump_json(by_alias=True)):
            moved[name] = fields[name]
            # A copy: vLLM keeps the response, to be fetched whole.
            response = response.model_copy()
            delattr(response, name)
            event = event.model_copy(update={"response": response})
    before = [
        in_progress.model_copy(update={"response": in_progress.response.model_copy(update=part)})
        for part in sse.split_ids(moved)
    ]
    # vLLM numbers its events.
    for number, each in enumerate([*before, event], event.sequence_number):
        each.sequence_number = number
    return [*before, event]


SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("OpenAIServingResponses.create_responses", ROUTE),
    Wrap("OpenAIServingResponses.create_responses", ("request",), wrap_create),
    Wrap("OpenAIServingResponses.responses_full_generator", ("request",), wrap_full_generator),
    # From 0.10.1 on.
    Where(
        lambda module: hasattr(module.OpenAIServingResponses, "responses_stream_generator"),
        Wrap("OpenAIServingResponses.responses_stream_generator", ("request",), wrap_stream_generator),
    ),
)
