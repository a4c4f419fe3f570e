"""Token ids in the answers of `/v1/messages`, Anthropic's API."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained, contained_async
from agentlightning.instrumentation.vllm.capture import calls
from agentlightning.instrumentation.vllm.endpoints import sse
from agentlightning.instrumentation.vllm.endpoints.answer import Carried, captured_fields, wanted
from agentlightning.instrumentation.vllm.endpoints.fields import ExtraField
from agentlightning.instrumentation.vllm.endpoints.sse import as_json
from agentlightning.patching import Patch, Wrap

__all__ = ["RESPONSE_PATCHES", "SERVING_PATCHES"]

ROUTE = "/v1/messages"


def with_token_ids(create: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper around `create_messages`, which turns a chat answer into one of Anthropic's."""

    async def create_messages(serving: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        carried = await contained_async(f"{ROUTE}: asking for ids", _wanted, raw_request)
        if carried is None or not carried.response:
            return await create(serving, request, raw_request, *args, **kwargs)
        answer, context = await _context.collecting(lambda: create(serving, request, raw_request, *args, **kwargs))
        if isinstance(answer, AsyncGenerator):
            return _streamed(answer, context, carried)
        if hasattr(answer, "content"):
            contained(f"{ROUTE}: attaching ids", _attach, answer, context, carried)
        return answer

    return create_messages


async def _wanted(raw_request: Any) -> Carried:
    # Anthropic's request model drops what it does not know. Most bodies are not parsed a second time.
    body = await raw_request.body() if raw_request is not None else b""
    return wanted(json.loads(body).get("return_token_ids") if b'"return_token_ids"' in body else None)


def _attach(answer: Any, context: RequestContext, carried: Carried) -> None:
    for name, value in captured_fields(context, carried).items():
        setattr(answer, name, value)


async def _streamed(
    stream: AsyncGenerator[str, None], context: RequestContext, carried: Carried
) -> AsyncGenerator[str, None]:
    """The stream with the ids on its last event but one, which says how the message ended."""
    async with aclosing(stream):
        async for event in stream:
            if event.startswith("event: message_delta\n"):
                for each in contained(f"{ROUTE}: attaching ids", _edited, event, context, carried) or (event,):
                    yield each
            else:
                yield event


def _edited(event: str, context: RequestContext, carried: Carried) -> list[str]:
    """The event with the ids, after others like it where it would be too long."""
    head, _, data = event.partition("data: ")
    delta, fields = json.loads(data), captured_fields(context, carried)
    like = {**delta, "delta": dict.fromkeys(delta["delta"])}
    before: list[str] = []
    while True:
        event = f"{head}data: {as_json({**delta, **fields})}\n\n"
        if carried.whole or not fields or not sse.is_long(event):
            return [*before, event]
        # The prompt's ids first: they are in front of the others.
        moved = {name: fields.pop(name) for name in tuple(fields)[:1]}
        before += (f"{head}data: {as_json({**like, **part})}\n\n" for part in sse.parts(moved))


RESPONSE_PATCHES: tuple[Patch, ...] = (
    # Its model takes no extra attributes, and its route leaves out what is null.
    ExtraField("AnthropicMessagesResponse", "prompt_token_ids", list[int] | None, written_without_null=True),
    ExtraField("AnthropicMessagesResponse", "response_token_ids", list[list[int]] | None, written_without_null=True),
)
SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("AnthropicServingMessages.create_messages", ROUTE),
    Wrap("AnthropicServingMessages.create_messages", ("request", "raw_request"), with_token_ids),
)
