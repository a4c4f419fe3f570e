"""The trajectories of a rollout: its calls, read as `agentlightning.trajectory` merges them.

The caller owns the transaction. Merging needs none: it may take long, and begins when the calls are read.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection

from agentlightning.generation import STATUSES
from agentlightning.store import completeness, prompts, rollouts, rows, tables, texts
from agentlightning.store.filters import TrajectoryOptions
from agentlightning.store.triplets import CALLER, RolloutCalls, caller_of, calls_of, choices_of
from agentlightning.trajectory import AttemptCalls, Call, LeftOut, Merged, MergeOptions, Trajectory, merge

__all__ = ["attempts_of", "merge_all"]

_GENERATIONS, _CHOICES = tables.generations.c, tables.choices.c

logger = logging.getLogger("agentlightning.store")


def attempts_of(connection: Connection, rollout_id: str, attempt_id: str | None = None) -> list[AttemptCalls]:
    """Read the calls of a rollout's attempts, by the rules of triplets.

    Calls that name no attempt belong to the rollout's attempt, if its calls name exactly one, or else together. An
    attempt of which the store only knows that calls are missing is listed without calls.

    Args:
        attempt_id: `latest` for the latest; None for all.

    Raises:
        RolloutTooLarge: it has more calls or ids than may be in memory at once.
    """
    if attempt_id == "latest" and (attempt_id := rollouts.attempt_id_of(connection, rollout_id, attempt_id)) is None:
        return []
    of_sampling = _GENERATIONS.logprobs_mode_key, _GENERATIONS.sampling_params_key
    columns = (*CALLER, *of_sampling, _GENERATIONS.served_model_key)
    # Calls of other attempts say whether those that name none belong to this one, so all are read.
    found = calls_of(connection, rollout_id, None, columns, with_ids=True)
    named = {call.attempt_id for call in found.calls if call.attempt_id}
    only = named.pop() if len(named) == 1 else None
    attempts: defaultdict[str | None, list[Any]] = defaultdict(list)
    for call in found.calls:
        attempts[call.attempt_id or only].append(call)
    lost = completeness.lost_calls(connection, rollout_id)
    for each in filter(None, lost):
        attempts[each] += ()
    if lost and not attempts:
        attempts[None] = []
    return [
        _attempt(connection, rollout_id, each, calls, found, _lost_of(each, lost, len(attempts)))
        for each, calls in attempts.items()
        if attempt_id is None or each == attempt_id
    ]


def _lost_of(attempt_id: str | None, lost: Counter[str | None], attempts: int) -> int:
    """Count the lost calls that may be of an attempt, or of the calls that name none."""
    return lost.total() if attempts == 1 else sum(lost[each] for each in {attempt_id, None})


def merge_all(attempts: Iterable[AttemptCalls], options: TrajectoryOptions) -> tuple[list[Trajectory], list[LeftOut]]:
    """Merge the calls of attempts; returns all rows, and the calls that are in none.

    Raises:
        ValueError: an option has a value that makes no sense.
    """
    how: Any = {name: value for name, value in options.items() if name in MergeOptions.__annotations__}
    found, left_out = list[Trajectory](), list[LeftOut]()
    for attempt in attempts:
        merged = merge(attempt, **how)
        is_empty = not merged.rows and len(merged.left_out) == len(attempt.calls)
        if is_empty and (attempt.calls or attempt.missing):
            logger.warning("%s", _without_rows(attempt, merged))
        found += merged.rows
        left_out += merged.left_out
    return found, left_out


def _without_rows(attempt: AttemptCalls, merged: Merged) -> str:
    reasons = Counter(each.reason for each in merged.left_out)
    if attempt.missing:
        reasons["missing"] = attempt.missing
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    of_attempt = f"attempt {attempt.attempt_id!r} of rollout {attempt.rollout_id!r}"
    return f"{of_attempt} has calls, but no trajectory: {counts}; docs/trajectories.md explains these reasons"


def _attempt(
    connection: Connection,
    rollout_id: str,
    attempt_id: str | None,
    calls: Iterable[Any],
    found: RolloutCalls,
    lost: int,
) -> AttemptCalls:
    generations = [row for call in calls for row in call.generations]
    choices = choices_of(connection, [row.key for row in generations], _CHOICES.routed_experts, _CHOICES.sampling_mask)
    reasons = texts.texts_of(connection, {each.finish_reason_key for some in choices.values() for each in some})
    made: list[Call] = []
    for row, prompt_token_ids in zip(generations, prompts.ids_of(connection, generations), strict=True):
        for choice in choices.get(row.key, (None,)):
            call = Call(
                generation_id=rows.uuid_text(row.id),
                call_id=None if row.call_id is None else rows.uuid_text(row.call_id),
                finished_at=row.finished_at,
                status=STATUSES[row.status],
                model=found.texts[row.served_model_key] or found.texts[row.model_key],
                **caller_of(row, found.texts),
                prompt_token_ids=prompt_token_ids,
                reward=found.rewards.get(row.key),
                logprobs_mode=found.texts[row.logprobs_mode_key],
                sampling_params=found.texts[row.sampling_params_key],
            )
            if choice is not None:
                call.index = choice.index
                call.finish_reason = reasons[choice.finish_reason_key]
                if call.status == "aborted" and call.finish_reason not in (None, "abort", "error"):
                    # The status is the generation's: this choice had ended by itself before another was aborted.
                    call.status = "finished"
                call.response_token_ids = rows.array_of("i", choice.token_ids)
                call.logprobs = rows.array_of("f", choice.logprobs)
                call.weight_versions = rows.versions_of(choice.weight_versions)
                call.sampling_mask = rows.mask_of(choice.sampling_mask)
                call.routed_experts = rows.experts_of(choice.routed_experts)
            made.append(call)
    return AttemptCalls(
        calls=made,
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        reward=found.final_reward(attempt_id),
        # A lost call may be one that a span names, so the larger number is the one that is certain.
        missing=max(lost, sum(not call.generations for call in calls)),
        input=found.input,
        metadata=found.metadata,
    )
