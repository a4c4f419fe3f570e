"""Guesses at which calls of a rollout were made by different agents, and what for, where none says so."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["guess_agents", "guess_purpose", "opening_of"]

# How templates begin what a user says: <|im_start|>user, <|start_header_id|>user, <start_of_turn>user, <|user|>, ...
# No less than a whole marker: a system prompt may have <user_info> and the like.
_USER = re.compile(
    r"<([|\uff5c])[^<>|\uff5c\n]{1,30}\1>user\b|<([|\uff5c])user\2>|<start_of_turn>user\b|\[INST\]", re.IGNORECASE
)

# Instructions of calls beside a conversation say at once what they want; those of a main agent may say it further down.
INSTRUCTIONS = 400
_PURPOSES = {
    "title": re.compile(r"\btitle generator\b|\b(?:generate|write|create)\b[^.\n]{0,40}\btitles?\b", re.IGNORECASE),
    "compaction": re.compile(r"\bsummari[sz](?:e|ing)\b[^.\n]{0,40}\bconversations?\b", re.IGNORECASE),
}


def guess_purpose(prompt: str | None) -> str | None:
    """Name what a call seems to be for, by the first of its instructions; None where they say nothing of it.

    Args:
        prompt: of a call that names no purpose, as the chat template rendered it, or its opening.
    """
    instructions = (opening_of(prompt) or "")[:INSTRUCTIONS]
    return next((purpose for purpose, says in _PURPOSES.items() if says.search(instructions)), None)


def guess_agents(prompts: Sequence[str | None]) -> list[int | None]:
    """Number the agents that calls seem to be of, by what stands in each prompt before the user's first message.

    That is the system prompt and the tools. It is a guess: one agent may change both, and two agents may share them.

    Args:
        prompts: the prompts of calls that name no agent, as the chat template rendered them, or their openings, in
            order.

    Returns:
        A number for each, from 1; None where its prompt shows no such part. All are None where all are alike, or where
        there are nearly as many as calls, as with a clock in the system prompt.
    """
    openings = [opening_of(prompt) for prompt in prompts]
    shown = [each for each in openings if each is not None]
    numbers = {each: number for number, each in enumerate(dict.fromkeys(shown), 1)}
    tells = len(numbers) == 2 or 2 < len(numbers) <= len(shown) // 2
    return [numbers.get(each or "") if tells else None for each in openings]


def opening_of(prompt: str | None) -> str | None:
    """Return what stands before the first message of a user, up to and with its marker."""
    match = _USER.search(prompt or "")
    return None if prompt is None or match is None else prompt[: match.end()]
