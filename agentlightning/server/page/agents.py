"""Guesses at which calls of a rollout were made by different agents, where none says so."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["guess_agents"]

# How templates begin what a user says: <|im_start|>user, <start_of_turn>user, <|user|>, [INST], ...
_USER = re.compile(r"<[^<>\n]{0,30}>?\s*user\b|\[INST\]", re.IGNORECASE)


def guess_agents(prompts: Sequence[str | None]) -> list[int | None]:
    """Number the agents that calls seem to be of, by what stands in each prompt before the user's first message.

    That is the system prompt and the tools. It is a guess: one agent may change both, and two agents may share them.

    Args:
        prompts: the prompts of calls that name no agent, as the chat template rendered them, in order.

    Returns:
        A number for each, from 1; None where its prompt shows no such part. All are None where all are alike.
    """
    openings = [_opening(prompt) for prompt in prompts]
    numbers = {each: number for number, each in enumerate(dict.fromkeys(filter(None, openings)), 1)}
    return [numbers.get(each or "") if len(numbers) > 1 else None for each in openings]


def _opening(prompt: str | None) -> str | None:
    """Return what stands before the first message of a user, up to and with its marker."""
    match = _USER.search(prompt or "")
    return None if prompt is None or match is None else prompt[: match.end()]
