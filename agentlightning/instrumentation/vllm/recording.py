"""From the capture to the recorder: this process's recorder, and the calls that what it is given belongs to.

On the event loop a generation costs the same however long it is: vLLM's lists are taken as they are, and the thread
that writes makes of them what is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from agentlightning import settings
from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm import request_context, senders
from agentlightning.instrumentation.vllm.metrics import Observer
from agentlightning.instrumentation.vllm.request_context import RequestContext
from agentlightning.patching import Patch, Where, Wrap
from agentlightning.recorder import Recorder

__all__ = ["calls", "is_on", "keep", "recorder", "report"]

# An integer of Python's, and its place in a list.
BYTES_PER_ID = 36
# What else a generation holds on to.
BYTES_PER_GENERATION = 2000


def is_on() -> bool:
    """Whether generations are kept: `AGL_STORE` is set."""
    return settings.store() is not None


def recorder() -> Recorder:
    """The recorder of this process for the store that `AGL_STORE` names now.

    A program may be instrumented again with another store. What was recorded before goes to the store of that time,
    whose recorder stays until the process ends.
    """
    url = settings.store()
    assert url is not None, "asked for where nothing is kept"
    return _recorder(url, settings.queue_bytes())


@functools.cache
def _recorder(url: str, queue_bytes: int) -> Recorder:
    return Recorder(url, queue_bytes, senders.sender, Observer())


def keep(build: Callable[[], Generation], token_ids: int, more_bytes: int = 0) -> None:
    """Have a generation kept.

    Args:
        build: makes it, in the thread that writes.
        token_ids: how many ids it holds on to until then, as Python's integers.
        more_bytes: what else it holds on to, if that is much.
    """
    recorder().record(build, BYTES_PER_GENERATION + BYTES_PER_ID * token_ids + more_bytes)


def report() -> dict[str, Any] | None:
    """For the status: where generations are kept, and what has become of them; None where they are not kept."""
    if not is_on():
        return None
    return {"store": settings.without_secrets(settings.store() or ""), **asdict(recorder().counters())}


def calls(target: str, endpoint: str) -> Patch:
    """The patch of an endpoint's `create_*` method that makes all requests to the engine those of one call.

    Args:
        target: the method, as `Wrap` takes it.
        endpoint: the path of its route, for calls that come on none, as in run-batch.
    """

    def with_a_call(create: Callable[..., Any]) -> Callable[..., Any]:
        async def create_in_a_call(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            context = request_context.current() or RequestContext()
            context.endpoint = context.endpoint or endpoint
            # The endpoint that is built upon another has said it already.
            context.model = context.model or getattr(request, "model", None)
            return await request_context.opened(lambda: create(serving, request, *args, **kwargs), context)

        return create_in_a_call

    return Where(lambda module: is_on(), Wrap(target, ("request",), with_a_call))
