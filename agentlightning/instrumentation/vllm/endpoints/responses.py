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
from agentlightning.instrumentation.vllm.endpoints.answer import captured_fields, hides_reasoning, said, wanted
from agentlightning.patching import Patch, Where, Wrap

__all__ = ["SERVING_PATCHES"]

ROUTE = "/v1/responses"


def collected(create: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `create_responses`."""

    async def create_responses(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        answer, _ = await _context.collecting(lambda: create(serving, request, *args, **kwargs))
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
    for name, value in captured_fields(_context.current(), carried).items():
        setattr(response, name, value)


def with_short_events(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `responses_stream_generator`, whose closing event carries the response and its ids."""

    def responses_stream_generator(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        stream = generate(serving, request, *args, **kwargs)
        return stream if wanted(said(request)).whole else _shortened(stream)

    return responses_stream_generator


async def _shortened(stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The stream, in which ids for which the closing event has no room are on events before it."""
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
    """The closing event, after others like `in_progress` that carry ids where it would be too long with them."""
    response, fields = event.response, dict(event.response.model_extra or {})
    moved: dict[str, Any] = {}
    for name in IDS:
        if name in fields and sse.is_long(event.model_dump_json(by_alias=True)):
            moved[name] = fields[name]
            # A copy: vLLM keeps the response, to be fetched whole.
            response = response.model_copy()
            delattr(response, name)
            event = event.model_copy(update={"response": response})
    before = [
        in_progress.model_copy(update={"response": in_progress.response.model_copy(update=part)})
        for part in sse.parts(moved)
    ]
    # vLLM numbers its events.
    for number, each in enumerate([*before, event], event.sequence_number):
        each.sequence_number = number
    return [*before, event]


IDS = ("generations", "prompt_token_ids", "response_token_ids")
"""Fields that leave a closing event that is too long, in this order, until it is short enough."""

SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("OpenAIServingResponses.create_responses", ROUTE),
    Wrap("OpenAIServingResponses.create_responses", ("request",), collected),
    Wrap("OpenAIServingResponses.responses_full_generator", ("request",), with_token_ids),
    # From 0.10.1.
    Where(
        lambda module: hasattr(module.OpenAIServingResponses, "responses_stream_generator"),
        Wrap("OpenAIServingResponses.responses_stream_generator", ("request",), with_short_events),
    ),
)
