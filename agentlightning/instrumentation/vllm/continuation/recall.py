"""The calls that other processes have answered, or this one before it was restarted: from the store of all of them.

What a store has of a call are its ids and its text. So a conversation is gone through from the latest call that is
known: if the template makes the text of a recorded prompt of its first messages, and the tokenizer its ids, or if going
on from the call before makes the recorded ids of them, that call is known, too.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Sequence

from agentlightning.continuation import Match
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm._isolation import contained_async
from agentlightning.instrumentation.vllm.continuation import kept, reading
from agentlightning.instrumentation.vllm.continuation.parsing import possible_tool_choices
from agentlightning.instrumentation.vllm.continuation.prompts import Conversation, Turn, keep
from agentlightning.instrumentation.vllm.continuation.reading import Log, RecordedCall
from agentlightning.store import Filters

__all__ = ["SECONDS", "forget", "recall"]

SECONDS = 0.05
"""The most that a request waits."""

_under_way: set[asyncio.Task[None]] = set()


def forget() -> None:
    """Forget all calls, and close the store: the patches that use them are being removed."""
    kept.forget()
    reading.close()


async def recall(conversation: Conversation, known: Match | None, context: RequestContext) -> bool:
    """Keep the calls of a conversation that others have answered; tell whether the store is available.

    What does not arrive in time is left: the next request goes on from there.

    Args:
        known: the latest call of the conversation that is known.
        context: the HTTP request.
    """
    reader = reading.reader()
    first = -1 if known is None else known.call.position
    deadline = time.monotonic() + SECONDS
    task = asyncio.create_task(
        contained_async("reading calls of others", _recall, conversation, first, context, deadline)
    )
    # Kept here: the loop alone would not keep it from being collected.
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    # Not cancelled when time is up: vLLM's renderer may swallow that, or leave its work half done. It ends by itself,
    # after the one step that it is at.
    await asyncio.wait({task}, timeout=SECONDS)
    return reader.is_available()


async def _recall(conversation: Conversation, first: int, context: RequestContext, deadline: float) -> None:
    reader, calls = reading.reader(), kept.calls()
    log = reader.log((conversation.key, context.model), calls.knows(conversation.key))
    await reader.read_on(log, _calls_like(context), context.served_model or context.model, deadline)
    for position, message in enumerate(conversation.messages[:-1]):
        if position <= first or message["role"] != "assistant":
            continue
        place, seen = conversation.fingerprints[position], len(log.seen)
        if not log.calls or time.monotonic() > deadline:
            return
        if log.tried.get(place) == seen:
            continue
        try:
            beginning = await conversation.up_to(position)
        except Exception:
            # No request of its own: an example that the agent has made up.
            log.note_tried(place, seen)
            continue
        if await _keep_calls(beginning, log, deadline):
            log.note_tried(place, seen)


async def _keep_calls(beginning: Conversation, log: Log, deadline: float) -> bool:
    """Keep the recorded calls with these messages; tell whether there was time to look for all of them."""
    found = list(log.calls.items())
    same_text = [(name, call) for name, call in found if call.rendered == beginning.rendered]
    if same_text:
        if time.monotonic() > deadline:
            return False
        # A model of the same name may have another vocabulary.
        ids = array("i", await beginning.chat.tokenise(beginning.own, is_whole=True))
        for name, call in same_text:
            if call.prompt_token_ids == ids:
                _keep(beginning.turn(), ids, name, call, log, beginning)
    match = beginning.match()
    longer = [(name, call) for name, call in found if call.rendered is None]
    longer = [each for each in longer if match and len(each[1].prompt_token_ids) > match.call.length]
    if match is None or not longer:
        return True
    if time.monotonic() > deadline:
        return False
    exact = await beginning.go_on(match)
    if isinstance(exact, str):
        return True
    length = exact.call.length + len(exact.more)
    longer = [each for each in longer if len(each[1].prompt_token_ids) == length]
    ids = array("i", exact.ids() if longer else ())
    for name, call in longer:
        if call.prompt_token_ids == ids:
            turn = beginning.turn()
            turn.continued, turn.more, turn.rendered = exact.call, exact.more, exact.rendered
            _keep(turn, exact.more, name, call, log, beginning)
    return True


def _keep(turn: Turn, more: Sequence[int], name: str, call: RecordedCall, log: Log, beginning: Conversation) -> None:
    tokenizer, request = beginning.chat.tokenizer, beginning.chat.request
    ends = {each for each in (tokenizer.eos_token_id, *call.stop_token_ids) if each is not None}
    # A store does not know with which of these the answer was parsed.
    turn.parsed_as = possible_tool_choices(request), True
    for answer in call.answers:
        # What this server has answered is where it belongs: with other tools, say, no such text continues it.
        if not kept.calls().has(turn.key, call.prompt_token_ids, answer.token_ids):
            keep(turn, more, *answer, ends)
    log.take(name)
    # What goes on from this one may be found now.
    log.tried.clear()


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
