"""The triplets of a rollout: its model calls in order, each with the reward that belongs to it.

The caller owns the transaction. The number of queries does not depend on the number of calls, except that long lists
are split into several.
"""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, func, select

from agentlightning.errors import NotFound
from agentlightning.generation import STATUSES, RoutedExperts
from agentlightning.store import generations as kept
from agentlightning.store import prompts, rollouts, rows, tables, texts
from agentlightning.store.attributes import OUTCOME
from agentlightning.store.calls import (
    Call,
    Texts,
    call_keys,
    check_size,
    group_calls,
    in_order,
    keys_with_answers,
    read_generations,
    spans_of,
)
from agentlightning.store.database import in_parts
from agentlightning.store.filters import TripletFilters
from agentlightning.store.rewards import given_rewards, rewards_of
from agentlightning.trajectory import KnownExperts, first_position, place_experts, was_sampled_with
from agentlightning.triplet import Triplet

__all__ = [
    "CALLER",
    "PROMPT",
    "RolloutCalls",
    "caller_of",
    "calls_of",
    "choices_of",
    "has_call",
    "of_responses",
    "of_rollout",
    "recorded_attempt",
    "rollouts_of",
]


_SPANS, _GENERATIONS, _CHOICES = tables.spans.c, tables.generations.c, tables.choices.c
CALLER = (_GENERATIONS.agent_key, _GENERATIONS.parent_agent_key, _GENERATIONS.purpose_key, _GENERATIONS.retry)
"""The columns of which `caller_of` makes what a call says of its caller."""
PROMPT = (_GENERATIONS.prompt_token_ids, _GENERATIONS.ids_block)
"""The columns of which `prompts.ids_of` makes the ids of a prompt."""


@dataclass(frozen=True, slots=True)
class RolloutCalls:
    """The calls of a rollout, or of one of its attempts, in order, without their choices.

    Attributes:
        rollout: the row of the rollout; None if it was only recorded.
        texts: by the keys in the rows of generations.
        rewards: by the keys of generations.
        given: rewards in the order in which they were given, each with the attributes of its span, posted ones last.
    """

    calls: list[Call]
    rollout: Any
    texts: Texts
    rewards: Mapping[int, float]
    given: Sequence[tuple[Mapping[str, Any], Any]]

    @property
    def input(self) -> Any:
        return None if self.rollout is None else json.loads(self.rollout.input)

    @property
    def metadata(self) -> Any:
        return None if self.rollout is None or self.rollout.metadata is None else json.loads(self.rollout.metadata)

    def final_reward(self, attempt_id: str | None) -> float | None:
        """Return the reward of an attempt: the outcome that was posted last, or else the reward that was given last.

        Args:
            attempt_id: None for the calls that name no attempt. A reward of the only attempt that the rollout's calls
                and rewards name is theirs, too; with several attempts, a reward of one of them is not.
        """
        of_calls, of_rewards = {call.attempt_id for call in self.calls}, {span.attempt_id for _, span in self.given}
        named = {each for each in of_calls | of_rewards if each}
        wanted = {attempt_id} if attempt_id else named if len(named) == 1 else set[str]()
        found = [
            (known.get(OUTCOME) is True, position, span.reward)
            for position, (known, span) in enumerate(self.given)
            if not span.attempt_id or span.attempt_id in wanted
        ]
        return max(found)[2] if found else None


def of_rollout(
    connection: Connection, rollout_id: str, attempt_id: str | None = None, filters: TripletFilters | None = None
) -> list[Triplet]:
    """List the triplets of a rollout, or of one of its attempts: one for each choice of each generation of its calls.

    A generation without choices has one triplet.

    Which calls: those that were recorded under these ids, and those whose answer a span of the rollout names: their
    `response_id` is the span's `gen_ai.response.id`. Several calls may share a `response_id`, since vLLM derives it
    from the request id, and a client may give all calls the same one. Of calls that share one, only those recorded
    under these ids count. The spans that name it are matched to these calls one by one, in order, if there are as many
    and no attempt ids contradict; otherwise none is matched.

    Arrival is not order: spans are sent in batches, and generations wait in a queue, so either may come late. Two
    events are compared by what one writer or one clock says of both, and by arrival only where nothing else is known.

    Order: calls that have spans are in the order in which these ended (`_in_time`). A call without spans comes after
    the last of those that finished before it, by the clock of vLLM's host. The generations of one call (tool loops,
    beam search) stay together. A missing call has its position by its span, but no triplet. A call is missing where a
    span names an answer that no call has, and where the spans that name a shared `response_id` outnumber its calls or
    belong to other attempts.

    Rewards: a reward that names a generation, or links to the answer or the span of a call, belongs to that call. An
    outcome of an attempt belongs to the last call of the attempt that is stored when triplets are read. Any other
    reward belongs to the last call of its attempt that ended before it (`_is_before`); if none did, and no span of a
    call comes after it, it is an outcome, too. Of several rewards of a call the last counts, and a posted one takes
    precedence over one in a span of the agent, since their clocks differ. Of several generations of a call the last
    gets the reward, with all of its choices. A reward is left out if it belongs to a missing call, or if its links
    lead to no call or only to an answer that several calls share.

    Args:
        attempt_id: `latest` for the latest; None for all.
        filters: which triplets; no filter changes what a triplet has.
    """
    if attempt_id == "latest" and (attempt_id := rollouts.attempt_id_of(connection, rollout_id, attempt_id)) is None:
        return []
    found = calls_of(connection, rollout_id, attempt_id, (*CALLER, _GENERATIONS.sampling_params_key), with_ids=True)
    return _triplets(connection, rollout_id, found, filters or {})


def calls_of(
    connection: Connection,
    rollout_id: str,
    attempt_id: str | None,
    more: Sequence[Column[Any]],
    *,
    with_ids: bool = False,
) -> RolloutCalls:
    """Find the calls of a rollout by the rules of `of_rollout`.

    Args:
        attempt_id: None for all attempts.
        more: columns of generations to read besides those that the rules need.
        with_ids: read the columns of prompts, too.

    Raises:
        RolloutTooLarge: `with_ids`, and it has more calls or ids than may be in memory at once.
    """
    spans = spans_of(connection, rollout_id, attempt_id)
    keys, shared = call_keys(connection, rollout_id, attempt_id, spans)
    if with_ids:
        check_size(connection, rollout_id, keys)
    generations = read_generations(connection, keys, (*PROMPT, *more) if with_ids else more)
    named = [column.name for column in (_GENERATIONS.model_key, _GENERATIONS.attempt_key, *more)]
    text_keys = [name for name in named if name.endswith("_key")]
    known = texts.texts_of(connection, {getattr(row, name) for row in generations for name in text_keys})
    calls = in_order(group_calls(generations, spans, shared, known), spans)
    given = given_rewards(spans)
    rollout = rollouts.find(connection, rows.storable(rollout_id) or "")
    return RolloutCalls(calls, rollout, known, rewards_of(calls, given), given)


def recorded_attempt(connection: Connection, rollout_id: str, attempt_id: str | None) -> str | None:
    """Find an attempt of a rollout among its calls, by the rules of `of_rollout`.

    Args:
        attempt_id: `latest`, an empty id and None stand for the attempt of the call that finished last.

    Returns:
        Its id, which is empty where that call names none; None where there is no such call.
    """
    is_named = bool(attempt_id) and attempt_id != "latest"
    calls = [call for call in calls_of(connection, rollout_id, None, ()).calls if call.generations]
    found = [call for call in calls if not is_named or call.attempt_id == attempt_id]
    return max(found, key=lambda call: call.finished_at).attempt_id or "" if found else None


def has_call(connection: Connection, rollout_id: str, generation_id: str) -> bool:
    """Tell whether a generation belongs to a call of a rollout, by the rules of `of_rollout`."""
    keys, _ = call_keys(connection, rollout_id, None, spans_of(connection, rollout_id, None))
    return kept.key_of(connection, generation_id) in keys


def rollouts_of(
    connection: Connection, *, since: int | None = None, after: str | None = None, limit: int | None = None
) -> list[str]:
    """List the ids of the rollouts that have calls, in the order in which the first call of each arrived.

    In this order, a call that arrives late stands behind the rollouts that were listed before. Some rollouts may turn
    out to have none: their spans name an answer that several calls of other rollouts share.

    Args:
        since: only those of which a call finished at this time or later; nanoseconds since the epoch.
        after: only those that follow this rollout.
        limit: most rollouts to list; None for all.

    Raises:
        NotFound: there is no call of the rollout `after`.
    """
    first, last = func.min(_GENERATIONS.key), func.max(_GENERATIONS.finished_at)
    recorded = select(_GENERATIONS.rollout_key, first, last).where(_GENERATIONS.rollout_key.is_not(None))
    moments = connection.execute(recorded.group_by(_GENERATIONS.rollout_key)).all()
    known = texts.texts_of(connection, {key for key, _, _ in moments})
    found = {known[key] or "": (begins, ends) for key, begins, ends in moments}
    joined = (
        select(_SPANS.rollout_id, first, last)
        .join_from(tables.spans, tables.generations, _SPANS.response_id == _GENERATIONS.response_id)
        .where(_SPANS.response_id.is_not(None))
        .group_by(_SPANS.rollout_id)
    )
    for rollout_id, begins, ends in connection.execute(joined):
        if rollout_id is not None:
            others = found.get(rollout_id, (begins, ends))
            found[rollout_id] = min(begins, others[0]), max(ends, others[1])
    in_order = sorted(found, key=lambda each: (found[each][0], each))
    if after is not None:
        if after not in found:
            raise NotFound(f"after: no call of a rollout {after[:100]!r} is recorded")
        in_order = in_order[in_order.index(after) + 1 :]
    if since is not None:
        in_order = [each for each in in_order if found[each][1] >= since]
    return in_order[:limit]


def of_responses(connection: Connection, response_ids: Iterable[str]) -> dict[str, Triplet]:
    """Find the calls with these answers: by `response_id`, the first choice of the call's last generation.

    Ids that several calls share are left out.
    """
    answers = keys_with_answers(connection, {rows.storable(each) or "" for each in response_ids})
    last = [calls[0][-1] for calls in answers.values() if len(calls) == 1]
    generations = read_generations(connection, last, (*PROMPT, *CALLER, _GENERATIONS.sampling_params_key))
    keys = {key for row in generations for key in (row.model_key, row.sampling_params_key, *_caller_keys(row))}
    known = texts.texts_of(connection, keys)
    calls = [Call([row], [], None) for row in generations]
    found: dict[str, Triplet] = {}
    for triplet in _triplets(connection, None, RolloutCalls(calls, None, known, {}, ()), {}):
        found.setdefault(triplet.response_id or "", triplet)
    return found


def _triplets(
    connection: Connection, rollout_id: str | None, found: RolloutCalls, filters: TripletFilters
) -> list[Triplet]:
    since, status, min_reward = filters.get("since"), filters.get("status"), filters.get("min_reward")
    version = filters.get("weight_version")
    generations = [
        (call, row)
        for call in found.calls
        for row in call.generations
        if (since is None or row.finished_at >= since)
        and (status is None or STATUSES[row.status] == status)
        and (min_reward is None or found.rewards.get(row.key, float("-inf")) >= min_reward)
        and all(filters.get(name, value) == value for name, value in caller_of(row, found.texts).items())
    ]
    of_positions = _CHOICES.routed_experts, _CHOICES.sampling_mask
    choices = choices_of(connection, [row.key for _, row in generations], *of_positions)
    reasons = texts.texts_of(connection, {each.finish_reason_key for some in choices.values() for each in some})
    given, metadata = found.input, found.metadata
    triplets: list[Triplet] = []
    ids = prompts.ids_of(connection, [row for _, row in generations])
    for (call, row), prompt_token_ids in zip(generations, ids, strict=True):
        params = found.texts[row.sampling_params_key]
        for choice in choices.get(row.key, (None,)):
            response_token_ids = rows.array_of("i", choice.token_ids) if choice else None
            versions = rows.versions_of(choice.weight_versions) if choice else None
            if version is not None and not was_sampled_with(versions, len(response_token_ids or ()), version):
                continue
            triplets.append(
                Triplet(
                    generation_id=rows.uuid_text(row.id),
                    response_id=rows.text_of(row.response_id),
                    rollout_id=rollout_id,
                    attempt_id=call.attempt_id,
                    **caller_of(row, found.texts),
                    index=choice.index if choice else 0,
                    status=STATUSES[row.status],
                    finish_reason=reasons[choice.finish_reason_key] if choice else None,
                    model=found.texts[row.model_key],
                    prompt_token_ids=prompt_token_ids,
                    response_token_ids=response_token_ids,
                    logprobs=rows.array_of("f", choice.logprobs) if choice else None,
                    reward=found.rewards.get(row.key),
                    span_id=call.span.span_id if call.span else None,
                    weight_versions=versions,
                    routed_experts=_experts_of(choice, prompt_token_ids, response_token_ids, params),
                    sampling_mask=rows.mask_of(choice.sampling_mask) if choice else None,
                    input=given,
                    metadata=metadata,
                )
            )
    return triplets


def _experts_of(
    choice: Any, prompt: array[int] | None, response: array[int] | None, params: str | None
) -> RoutedExperts | None:
    experts = rows.experts_of(choice.routed_experts) if choice else None
    if experts is None or prompt is None or response is None:
        return None
    length = len(prompt) + len(response)
    return place_experts([KnownExperts(experts, first_position(params), length)], length)


def caller_of(row: Any, known: Texts) -> dict[str, Any]:
    """Return what a generation says of its caller, by the names of its fields."""
    agent, parent, purpose = _caller_keys(row)
    return {
        "agent_id": known[agent],
        "parent_agent_id": known[parent],
        "purpose": known[purpose],
        "retry": row.retry,
    }


def _caller_keys(row: Any) -> tuple[int | None, int | None, int | None]:
    return row.agent_key, row.parent_agent_key, row.purpose_key


def choices_of(connection: Connection, keys: Sequence[int], *more: Column[Any]) -> dict[int, list[Any]]:
    """Map the keys of generations to the rows of their choices, without texts.

    Args:
        more: columns to read besides those of triplets.
    """
    query = select(
        _CHOICES.generation_key,
        _CHOICES.index,
        _CHOICES.token_ids,
        _CHOICES.logprobs,
        _CHOICES.finish_reason_key,
        _CHOICES.weight_versions,
        *more,
    ).order_by(_CHOICES.generation_key, _CHOICES.index)
    found: defaultdict[int, list[Any]] = defaultdict(list)
    for some in in_parts(keys):
        for row in connection.execute(query.where(_CHOICES.generation_key.in_(some))):
            found[row.generation_key].append(row)
    return found
