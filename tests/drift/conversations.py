"""Conversations of two calls in a store, of which the history has another answer than the model gave."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from agentlightning.generation import Choice, Generation
from agentlightning.sender import Sender
from agentlightning.store import Store
from tests.common.generations import START, generation
from tests.drift.templates import CHATML, Template

__all__ = ["TEMPLATE", "call_of", "conversation", "record", "sender"]

TEMPLATE = Template("chatml", CHATML)
QUESTION = {"role": "user", "content": "Is it cold?"}
AGAIN = {"role": "user", "content": "And tomorrow?"}


def sender() -> Sender:
    return Sender(host="h", pid=1, started_at=START, version="1", vocabulary=TEMPLATE.vocabulary)


def conversation(
    rollout: str, answer: str, first: int = 1, model: str = "m", stop: str | None = "<|im_end|>"
) -> Sequence[Generation]:
    """Make two calls of a rollout; the history has the first answer as "It is.".

    Args:
        stop: the token that ends the first answer; None where a string ended it.
    """
    history = [QUESTION, {"role": "assistant", "content": "It is.", "tool_calls": []}, AGAIN]
    return [
        call_of(rollout, first, TEMPLATE.prompt([QUESTION]), answer, model, stop),
        call_of(rollout, first + 1, TEMPLATE.prompt(history), "Yes.", model),
    ]


def call_of(
    rollout: str, number: int, prompt: Sequence[int], answer: str, model: str, stop: str | None = "<|im_end|>"
) -> Generation:
    """Make a call of a rollout."""
    ids = array("i", [*TEMPLATE.encode(answer), *([TEMPLATE.id_of(stop)] if stop else [])])
    choice = Choice(token_ids=ids, logprobs=array("f", [-0.5] * len(ids)), finish_reason="stop")
    fields: dict[str, Any] = {"rollout_id": rollout, "attempt_id": "a", "model": model, "cached_tokens": 16}
    return generation(number, **fields, prompt_token_ids=array("i", prompt), choices=[choice])


def record(store: Store, *calls: Generation, registered: bool = True) -> None:
    who = sender()
    if registered:
        store.register_sender(who)
    store.add(calls, who.id)
