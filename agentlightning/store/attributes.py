"""Attributes of spans that name a model's answer, a reward or a session, in the conventions of Agent Lightning."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

__all__ = [
    "ANNOTATION",
    "GENERATION",
    "NOTE",
    "OUTCOME",
    "PROJECT",
    "RESPONSE",
    "TAGS",
    "has_failed",
    "links",
    "response_id",
    "reward",
    "reward_attributes",
]

RESPONSE = "gen_ai.response.id"
"""Attribute with the `id` of a model's answer."""
ANNOTATION = "agentlightning.annotation"
"""Name of the spans that `emit_reward` of Agent Lightning 0.3 makes."""
GENERATION = "agentlightning.generation_id"
"""Attribute of a reward: the id of the generation that it belongs to."""
OUTCOME = "agentlightning.outcome"
"""Attribute of a reward: true if it belongs to the last call of its attempt, whenever it was given."""
NOTE = "agentlightning.note"
"""Attribute of an annotation: what a person has written about an attempt or a call."""
TAGS = "agentops.tags"
"""Attribute of the AgentOps SDK: a list of texts, among them perhaps `agentlightning.rollout_id=ID`."""
PROJECT = "agentops.project.id"
"""Attribute of a resource: the AgentOps project that its spans are for."""

# The text that a session was ended with. The SDK sends no text for a value of its own enumeration, so there is none for
# a `with` block, and it sends "Shutdown" when the program exits. For a decorated function it sends "Success" when that
# returns, "Indeterminate" when it raises, and "Unknown" when it is cancelled.
END_STATE = "agentops.session.end_state"
FAILURES = ("fail", "failed", "failure", "error", "indeterminate", "unknown")
SUCCESSES = ("success", "succeeded", "ok")
# Agent Lightning 0.2 gives the span this name; the attributes of 0.3 begin with it.
REWARD = "agentlightning.reward"
# The AgentOps SDK puts the result of a function here, and so the decorator `reward` of 0.1 and 0.2 does.
OUTPUTS = ("agentops.task.output", "agentops.entity.output")
# No server makes a longer id, and an index could not hold it.
CHARACTERS = 512


def response_id(attributes: Mapping[str, Any]) -> str | None:
    """Return the `id` of the model's answer that the span is about."""
    found = attributes.get(RESPONSE)
    return found if isinstance(found, str) and 0 < len(found) <= CHARACTERS else None


def reward(name: str, attributes: Mapping[str, Any]) -> float | None:
    """Return the reward that a span of this name gives; of several dimensions the first, which is the primary one."""
    found = attributes.get(f"{REWARD}.0.value")
    if found is None:
        found = next((value for key in OUTPUTS if (value := _returned(attributes.get(key))) is not None), None)
    if found is None and name in (REWARD, ANNOTATION):
        found = attributes.get("reward")
    if not isinstance(found, (int, float)):
        return None
    with suppress(OverflowError):
        if math.isfinite(number := float(found)):
            return number
    return None


def reward_attributes(value: float | None, generation_id: str | None, note: str | None = None) -> dict[str, Any]:
    """Return the attributes of a reward as `emit_reward` of Agent Lightning 0.3 makes them, and what it belongs to.

    Args:
        value: None for a note alone.
        generation_id: None for the last call of the attempt.
    """
    given = {} if value is None else {f"{REWARD}.0.name": "primary", f"{REWARD}.0.value": value}
    noted = {} if note is None else {NOTE: note}
    where = {OUTCOME: True} if generation_id is None else {GENERATION: generation_id}
    return {**given, **noted, **where}


def links(attributes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the links that `make_link_attributes` of 0.3 wrote, each as the name and the value of an attribute."""
    number = 0
    while isinstance(key := attributes.get(f"agentlightning.link.{number}.key_match"), str):
        yield key, str(attributes.get(f"agentlightning.link.{number}.value_match"))
        number += 1


def has_failed(attributes: Mapping[str, Any], status_code: str) -> bool | None:
    """Tell whether a session has failed, by the attributes of its root span; None where these do not tell."""
    state = str(attributes.get(END_STATE)).lower()
    if status_code == "ERROR" or state in FAILURES:
        return True
    return False if status_code == "OK" or state in SUCCESSES else None


def _returned(output: Any) -> Any:
    """Return the reward in the result of a function."""
    if isinstance(output, str) and '"reward"' in output:
        with suppress(ValueError, RecursionError):
            output = json.loads(output)
    return output.get("value") if isinstance(output, dict) and output.get("type") == "reward" else None
