"""The calls that other processes have answered, or this one before it was restarted: from the store of all of them.

What a store has of a call are its ids and its text. So a conversation is gone through from the latest call that is
known: if the template makes the text of a recorded prompt of its first messages, or if going on from the call before
makes the recorded ids of them, and if the recorded answer is what the next message says, that call is known, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from agentlightning.continuation import Match
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.generation import Choice, Generation
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.continuation import kept
from agentlightning.instrumentation.vllm.continuation.prompts import Conversation, Exact, keep, special_ids, whole_text
from agentlightning.store import Filters, Store, open_store

__all__ = ["SECONDS", "recall"]

SECONDS = 0.05
"""The most that a request waits."""

T = TypeVar("T")

_reading = threading.Lock()
_opened: tuple[tuple[int, str], Store] | None = None
"""The store, opened by the process of this id from this place."""


async def recall(conversation: Conversation, known: Match | None, context: RequestContext) -> None:
    """Keep the calls of a conversation that others have answered.

    What does not arrive in time is left: the next request may find it.

    Args:
        known: the latest call of the conversation that is known.
        context: the HTTP request.
    """
    # Before Python 3.11 it is not the built-in TimeoutError.
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_recall(conversation, known, context), SECONDS)


async def _recall(conversation: Conversation, known: Match | None, context: RequestContext) -> None:
    generations = await _in_a_thread(lambda: _read(_calls_like(context), kept.calls().count(conversation.key)))
    first = -1 if known is None else known.call.position
    for position, message in enumerate(conversation.messages[:-1]):
        if generations and position > first and message["role"] == "assistant":
            try:
                beginning = await conversation.up_to(position)
            except Exception:
                # No request of its own: an example that the agent has made up.
                continue
            await _keep_answers(beginning, generations)


async def _keep_answers(beginning: Conversation, generations: Sequence[Generation]) -> None:
    """Keep the recorded calls with these messages."""
    match = beginning.match()
    exact = await beginning.go_on(match) if match is not None else None
    ids = exact.ids() if isinstance(exact, Exact) else None
    special = special_ids(beginning.chat.tokenizer)
    known = {call.response_token_ids.tobytes() for call in kept.calls().with_messages(*beginning.place())}
    for generation in generations:
        turn, prompt = beginning.turn(), generation.prompt_token_ids
        if prompt is None:
            continue
        if generation.prompt_text != beginning.own:
            if not isinstance(exact, Exact) or prompt.tolist() != ids:
                continue
            turn.continued, turn.more, turn.rendered = exact.call, exact.more, exact.rendered
        for choice in generation.choices:
            if choice.token_ids and choice.token_ids.tobytes() not in known:
                ends = _ends(choice, special, beginning.chat.tokenizer.eos_token_id)
                more = prompt if turn.continued is None else turn.more
                keep(turn, more, choice.token_ids, _text(generation, choice), choice.finish_reason, ends)


def _ends(choice: Choice, special: set[int], eos_token_id: int | None) -> set[int]:
    """Return the ids that end an answer: its last, if that is such a one; a store does not know the model's."""
    last = choice.token_ids[-1] if choice.token_ids else None
    if choice.finish_reason == "stop" and last in special:
        return {last}
    return set() if eos_token_id is None else {eos_token_id}


def _text(generation: Generation, choice: Choice) -> str | None:
    is_told = json.loads(generation.sampling_params or "{}").get("include_stop_str_in_output", False)
    return whole_text(choice.text, choice.stop_reason, is_told)


def _calls_like(context: RequestContext) -> Filters:
    """Return the filters of the calls that a request may continue."""
    filters = Filters(
        rollout_id=context.rollout_id, agent_id=context.calling_agent_id, model=context.model, status="finished"
    )
    if context.rollout_id is None:
        filters["session_id"] = context.session_id
    else:
        filters["attempt_id"] = context.attempt_id
    return filters


def _read(filters: Filters, known: int) -> list[Generation]:
    """Return the generations of a store, unless it has no more than are known."""
    # Whoever waited for the one before has given up, and so would this one.
    if not _reading.acquire(blocking=False):
        return []
    try:
        until = time.monotonic() + SECONDS
        store = _store()
        found: list[Generation] = []
        if store.tally(**filters)["finished"] > known:
            for generation in store.generations(**filters):
                found.append(generation)
                if time.monotonic() > until:
                    break
        return found
    except (StoreUnavailable, StoreRefused):
        return []
    finally:
        _reading.release()


def _store() -> Store:
    global _opened
    place = session.settings.store
    assert place is not None
    # A connection of the process that this one was forked from is never used.
    if _opened is None or _opened[0] != (os.getpid(), place):
        _opened = (os.getpid(), place), open_store(place, read_only=True, patience=SECONDS)
    return _opened[1]


async def _in_a_thread(function: Callable[[], T]) -> T:
    """Return `function()`, run by a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def set_result(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result, failed = None, None
        try:
            result = function()
        except BaseException as error:
            failed = error
        # The loop may have ended meanwhile.
        if not loop.is_closed():
            loop.call_soon_threadsafe(set_result, result, failed)

    threading.Thread(target=run, name="agentlightning-recall", daemon=True).start()
    return await future
