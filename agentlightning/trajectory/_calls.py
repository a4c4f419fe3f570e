"""Calls, which trajectories are made of: their ids, how these were sampled, and which rollouts are of one task."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from agentlightning.generation import RoutedExperts, SamplingMask, Status

__all__ = ["SAMPLING", "AttemptCalls", "Call", "as_integer", "finite", "group_of", "sampling_of", "was_sampled_with"]

# Fields of vLLM's SamplingParams, which a recorded call leaves out where they have these defaults.
SAMPLING: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
}


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A choice of a generation, as `merge` takes it. An unknown field is None.

    Attributes:
        generation_id, index: the generation, and the position of the choice in it. Together they are unique.
        call_id: the HTTP call; generations that share it are no retries of one another. None: the generation's own.
        finished_at: nanoseconds since the epoch, by the clock of vLLM's host.
        model: the one that answered, by whatever name the client asked for it.
        agent_id, parent_agent_id, purpose, retry: as in a `Generation`.
        prompt_token_ids, response_token_ids: the ids that went into the model, and those that it sampled; `array('i')`.
        logprobs: one for each of `response_token_ids`; `array('f')`.
        reward: the call's own.
        weight_versions: `(version, start, end)`, as in a `Choice`.
        routed_experts, sampling_mask: as in a `Choice`.
        sampling_params: JSON, as in a `Generation`.
    """

    generation_id: str
    index: int = 0
    call_id: str | None = None
    finished_at: int = 0
    status: Status = "finished"
    finish_reason: str | None = None
    model: str | None = None
    agent_id: str | None = None
    parent_agent_id: str | None = None
    purpose: str | None = None
    retry: int | None = None
    prompt_token_ids: array[int] | None = None
    response_token_ids: array[int] | None = None
    logprobs: array[float] | None = None
    reward: float | None = None
    weight_versions: Sequence[tuple[str, int, int]] | None = None
    routed_experts: RoutedExperts | None = None
    sampling_mask: SamplingMask | None = None
    logprobs_mode: str | None = None
    sampling_params: str | None = None


@dataclass(slots=True, kw_only=True)
class AttemptCalls:
    """The calls of one attempt, and what is known of it. An unknown field is None.

    Attributes:
        calls: in any order.
        reward: the final reward.
        missing: number of calls that are known to be missing.
        input, metadata: those of the rollout.
    """

    calls: Sequence[Call]
    rollout_id: str | None = None
    attempt_id: str | None = None
    reward: float | None = None
    missing: int = 0
    input: Any = None
    metadata: Mapping[str, Any] | None = None


def group_of(input: Any, metadata: Mapping[str, Any] | None) -> str | None:  # noqa: A002 -- the LightningStore's name
    """Return what groups the rollouts of one task, as GRPO needs it.

    That is the text or number `group` of the metadata, or else a digest of the input: rollouts with an equal input have
    the same. None for a rollout without input.
    """
    named = (metadata or {}).get("group")
    if isinstance(named, (str, int)) and not isinstance(named, bool):
        return str(named)
    if input is None:
        return None
    canonical = json.dumps(input, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode(errors="replace")).hexdigest()[:32]


@lru_cache(1_000)
def sampling_of(params: str | None) -> dict[str, Any] | None:
    """Return the parameters that change the distribution that ids are drawn from, by vLLM's names; see `SAMPLING`.

    Args:
        params: JSON, as in a `Generation`. A number that is none there is taken for the default.
    """
    try:
        found: Any = None if params is None else json.loads(params)
    except ValueError:
        return None
    if not isinstance(found, Mapping):
        return None
    found = cast("Mapping[str, Any]", found)
    given = {name: _number(found.get(name, usual), usual) for name, usual in SAMPLING.items()}
    # vLLM has -1 and 0 for all tokens.
    return given | {"top_k": max(given["top_k"], 0)}


def _number(value: Any, usual: Any) -> Any:
    """Return a value, or the usual one in the place of what should be a number and is none; other kinds stay."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    return value if usual is None or is_number else usual


def was_sampled_with(
    versions: Iterable[tuple[str, int, int]] | None, count: int, wanted: str, max_staleness: int | None = None
) -> bool:
    """Tell whether the first ids of an answer are all known to be sampled with a version of the weights.

    Args:
        versions: `(version, start, end)`, as in a `Choice`.
        count: number of ids.
        max_staleness: integer versions that are up to so many smaller count, too.
    """
    known = 0
    for start, end, version in sorted((start, end, version) for version, start, end in versions or ()):
        if start > known or known >= count:
            break
        if version != wanted:
            behind = as_integer(version)
            if max_staleness is None or behind is None or not 0 <= (as_integer(wanted) or 0) - behind <= max_staleness:
                return False
        known = max(known, end)
    return known >= count


def as_integer(version: str) -> int | None:
    return int(version) if version.isascii() and version.isdigit() else None


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
