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
from agentlightning.instrumentation.vllm.endpoints.answer import IdFields, captured_fields, id_fields
from agentlightning.instrumentation.vllm.endpoints.fields import ExtraField
from agentlightning.patching import Patch, Wrap

__all__ = ["RESPONSE_PATCHES", "SERVING_PATCHES"]

ROUTE = "/v1/messages"


def wrap_create(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_messages`, which turns a chat answer into one of Anthropic's."""

    async def create_messages(serving: Any, request: Any, raw_request: Any = None, *args: Any, **kwargs: Any) -> Any:
        fields = await contained_async(f"{ROUTE}: asking for ids", _id_fields, raw_request)
        if fields is None or not fields.response:
            return await create(serving, request, raw_request, *args, **kwargs)
        answer, context = await _context.collect_engine_requests(create, serving, request, raw_request, *args, **kwargs)
        if isinstance(answer, AsyncGenerator):
            return _attach_to_stream(answer, context, fields)
        if hasattr(answer, "content"):
            contained(f"{ROUTE}: attaching ids", _attach, answer, context, fields)
        return answer

    return create_messages


async def _id_fields(raw_request: Any) -> IdFields:
    # Anthropic's request model drops unknown fields, so the body is parsed again, but only if it may have this one.
    body = await raw_request.body() if raw_request is not None else b""
    return id_fields(json.loads(body).get("return_token_ids") if b'"return_token_ids"' in body else None)


def _attach(answer: Any, context: RequestContext, fields: IdFields) -> None:
    for name, value in captured_fields(context, fields).items():
        setattr(answer, name, value)


async def _attach_to_stream(
    stream: AsyncGenerator[str, None], context: RequestContext, fields: IdFields
) -> AsyncGenerator[str, None]:
    """Yield the stream's events, with the ids on the last but one, which says how the message ended."""
    async with aclosing(stream):
        async for event in stream:
            if event.startswith("event: message_delta\n"):
                for each in contained(f"{ROUTE}: attaching ids", _with_ids, event, context, fields) or (event,):
                    yield each
            else:
                yield event


def _with_ids(event: str, context: RequestContext, fields: IdFields) -> list[str]:
    """Return the event with the ids, after events like it with those ids that would make it too long."""
    head, _, data = event.partition("data: ")
    delta, ids = json.loads(data), captured_fields(context, fields)
    like = {**delta, "delta": dict.fromkeys(delta["delta"])}
    before: list[str] = []
    while True:
        event = f"{head}data: {sse.as_json({**delta, **ids})}\n\n"
        if fields.unsplit or not ids or not sse.is_long(event):
            return [*before, event]
        # The prompt's ids are moved first: they come first.
        moved = {name: ids.pop(name) for name in tuple(ids)[:1]}
        before += (f"{head}data: {sse.as_json({**like, **part})}\n\n" for part in sse.split_ids(moved))


RESPONSE_PATCHES: tuple[Patch, ...] = (
    # This model takes no extra attributes, and its route leaves out nulls.
    ExtraField("AnthropicMessagesResponse", "prompt_token_ids", list[int] | None, written_without_null=True),
    ExtraField("AnthropicMessagesResponse", "response_token_ids", list[list[int]] | None, written_without_null=True),
)
SERVING_PATCHES: tuple[Patch, ...] = (
    calls.in_one_call("AnthropicServingMessages.create_messages", ROUTE),
    Wrap("AnthropicServingMessages.create_messages", ("request", "raw_request"), wrap_create),
)
