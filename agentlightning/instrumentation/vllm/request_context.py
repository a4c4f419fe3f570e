"""One HTTP request, from its arrival to its answer: whose it is, and what the engine was asked for it.

A context variable leads from the place where token ids are born back to the request that they are for: vLLM registers
a request to the engine in the task that serves the HTTP request, or in one that this has started.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentlightning.generation import new_id

__all__ = ["EngineRequest", "Prefix", "RequestContext", "collecting", "current", "enter", "opened"]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What one request to the engine consumes and produces.

    Attributes:
        request_id: as the frontend names it: vLLM's own suffix is not part of it.
        prompt_token_ids: the ids that went in; None for a prompt of embeddings, which has none.
        detokenizer: vLLM's, which keeps the ids that come out.
    """

    request_id: str
    prompt_token_ids: list[int] | None
    detokenizer: Any

    @property
    def token_ids(self) -> list[int]:
        """The ids that have come out so far: all of them, once the request has ended."""
        # Copied: vLLM extends its list for as long as the request lives.
        return list(self.detokenizer.output_token_ids)


class Prefix(NamedTuple):
    """The part of a path that names a rollout.

    Attributes:
        before: the root path, if the path came with it.
        taken: what was taken off the path behind that, encoded as it came.
    """

    before: str
    taken: str


@dataclass(slots=True)
class RequestContext:
    """Whose a request is, where it says so, and its requests to the engine, where an endpoint wants them.

    Attributes:
        rollout_id, attempt_id, session_id, trace_id, request_id: as its path or its headers say.
        endpoint: the path of its route.
        model: the one that it asks for, or the server's where it names none.
        base_id: what vLLM makes the ids of its answer and of its engine requests of.
        text_limit: from how many ids on a prompt of its may hold others than its text stands for.
        prefix: what was taken off its path, if anything was.
        scope: the HTTP request as ASGI has it, with what vLLM keeps in its `state`.
        collects: whether `engine_requests` are wanted.
    """

    rollout_id: str | None = None
    attempt_id: str | None = None
    session_id: str | None = None
    trace_id: str | None = None
    request_id: str | None = None
    endpoint: str | None = None
    model: str | None = None
    base_id: str | None = None
    text_limit: int | None = None
    prefix: Prefix | None = None
    scope: Mapping[str, Any] | None = None
    # Not for every endpoint: a beam search makes thousands, and nobody would read them.
    collects: bool = False
    engine_requests: list[EngineRequest] = field(default_factory=list)
    _call_id: str | None = None

    @property
    def call_id(self) -> str:
        """A UUID, made when it is first asked for: most requests are not kept."""
        if self._call_id is None:
            self._call_id = new_id()
        return self._call_id


_current: ContextVar[RequestContext | None] = ContextVar("agentlightning.request", default=None)


def current() -> RequestContext | None:
    """The request that this task works for; None where none was opened."""
    return _current.get()


def enter(context: RequestContext | None) -> None:
    """From here on this task, and those that it starts, work for `context`."""
    _current.set(context)


async def collecting(create: Callable[[], Awaitable[Any]]) -> tuple[Any, RequestContext]:
    """What `create()` answers, and the context that collects the engine requests made for it."""
    context = _current.get() or RequestContext()
    context.collects = True
    return await opened(create, context), context


async def opened(create: Callable[[], Awaitable[Any]], context: RequestContext) -> Any:
    """What `create()` answers in `context`: the one that is open by then, or one of its own.

    A server inside another program may have no door of ours, and run-batch has none. An answer that is a stream is made
    in the context to its end.
    """
    if _current.get() is context:
        return await create()
    token = _current.set(context)
    try:
        answer = await create()
    finally:
        _current.reset(token)
    return _within(context, answer) if isinstance(answer, AsyncGenerator) else answer


async def _within(context: RequestContext, stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The stream as it is, each step of it made in `context`: a generator runs in the context of who asks for more."""
    async with aclosing(stream):
        while True:
            token = _current.set(context)
            try:
                item = await anext(stream)
            except StopAsyncIteration:
                return
            finally:
                _current.reset(token)
            yield item
