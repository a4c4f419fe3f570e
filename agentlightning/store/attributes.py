"""What the attributes of a span say of a model's answer and of a reward, in the words of Agent Lightning."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

__all__ = [
    "ANNOTATION",
    "GENERATION",
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
"""The attribute that has the `id` of a model's answer."""
ANNOTATION = "agentlightning.annotation"
"""The name of the spans that `emit_reward` of 0.3 makes."""
GENERATION = "agentlightning.generation_id"
"""The attribute of a reward that has the id of the generation that it belongs to."""
OUTCOME = "agentlightning.outcome"
"""The attribute of a reward that is true where it belongs to the last call of its attempt, whenever it was given."""
TAGS = "agentops.tags"
"""The attribute of the AgentOps SDK that has a list of texts, which may be `agentlightning.rollout_id=ID`."""
PROJECT = "agentops.project.id"
"""The attribute of what sends spans that has the project of AgentOps that it is for."""

# How a session has ended: the text that it was ended with. The SDK sends none for an enumeration of its own, and so
# none where it was ended by a `with` block, and "Shutdown" where the program was at its end. Of a function that it
# decorates it sends "Success" when that returns, "Indeterminate" when it raises, and "Unknown" when it is cancelled.
END_STATE = "agentops.session.end_state"
FAILURES = ("fail", "failed", "failure", "error", "indeterminate", "unknown")
SUCCESSES = ("success", "succeeded", "ok")
# Of 0.2, whose name of the span is this, and of 0.3, whose attributes begin with it.
REWARD = "agentlightning.reward"
# Where the AgentOps SDK puts what a function has returned, and so what the `reward` of 0.1 and 0.2 has.
OUTPUTS = ("agentops.task.output", "agentops.entity.output")
# A longer one is none that a server makes, and an index has no room for it.
CHARACTERS = 512


def response_id(attributes: Mapping[str, Any]) -> str | None:
    """The `id` of the model's answer that the span is about."""
    found = attributes.get(RESPONSE)
    return found if isinstance(found, str) and 0 < len(found) <= CHARACTERS else None


def reward(name: str, attributes: Mapping[str, Any]) -> float | None:
    """The reward that a span of this name gives; of one with several dimensions, the first, which is the primary."""
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


def reward_attributes(value: float, generation_id: str | None) -> dict[str, Any]:
    """Those of a reward, as `emit_reward` of 0.3 makes them, and where it belongs: without an id, to the last call."""
    where = {OUTCOME: True} if generation_id is None else {GENERATION: generation_id}
    return {f"{REWARD}.0.name": "primary", f"{REWARD}.0.value": value, **where}


def links(attributes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a span belongs to, as `make_link_attributes` of 0.3 writes it: the name and value of an attribute, each."""
    number = 0
    while isinstance(key := attributes.get(f"agentlightning.link.{number}.key_match"), str):
        yield key, str(attributes.get(f"agentlightning.link.{number}.value_match"))
        number += 1


def has_failed(attributes: Mapping[str, Any], status_code: str) -> bool | None:
    """Whether a session has, by what its root says; None where it does not."""
    state = str(attributes.get(END_STATE)).lower()
    if status_code == "ERROR" or state in FAILURES:
        return True
    return False if status_code == "OK" or state in SUCCESSES else None


def _returned(output: Any) -> Any:
    """The reward in what a function has returned."""
    if isinstance(output, str) and '"reward"' in output:
        with suppress(ValueError, RecursionError):
            output = json.loads(output)
    return output.get("value") if isinstance(output, dict) and output.get("type") == "reward" else None
