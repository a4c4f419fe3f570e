"""The triplets of a rollout: its model calls in order, each with the reward that belongs to it.

Everything here works inside a transaction of somebody else's, and asks as many queries whatever number of calls there
are, but for lists that are too long for one.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import Connection, case, func, or_, select

from agentlightning.generation import STATUSES
from agentlightning.store import rows, tables, texts
from agentlightning.store.attributes import GENERATION, OUTCOME, RESPONSE, links
from agentlightning.store.database import in_parts
from agentlightning.triplet import Triplet

__all__ = ["of_responses", "of_rollout", "rollouts_of"]

Texts = Mapping[int | None, str | None]

_SPANS, _GENERATIONS, _CHOICES = tables.spans.c, tables.generations.c, tables.choices.c


@dataclass(slots=True)
class _Call:
    """The generations of one answer, in the order in which they finished, and the first span that names it."""

    generations: list[Any]
    span: Any
    attempt_id: str | None

    @property
    def finished_at(self) -> int:
        return self.generations[-1].finished_at


def of_rollout(connection: Connection, rollout_id: str, attempt_id: str | None = None) -> list[Triplet]:
    """A triplet for each choice of each model call of a rollout, or of an attempt of it; one for a call without any.

    Its calls are those that were recorded under these ids, and those whose answer one of its spans names: their
    `response_id` is its `gen_ai.response.id`.

    Order: calls that have spans are in the order of those, and one that has none comes after the last of them that
    finished before it. The generations of one answer (tool loops, beam search) stay together.

    Rewards: one that names a generation, or links to the answer or the span of a call, belongs to that; one that was
    given as the outcome of its attempt to the last call, whichever that is by now; each other to the last call of its
    attempt before it. One that has none before it, and no call's span after it, is an outcome, too. Of several rewards
    of a call the last counts; of several generations of a call the last gets it, with all of its choices.
    """
    spans = _spans(connection, rollout_id, attempt_id)
    named: dict[str, Any] = {}
    for span in spans:
        if span.response_id is not None:
            named.setdefault(span.response_id, span)
    keys = {*_keys_under(connection, rollout_id, attempt_id), *_keys_of(connection, list(named))}
    generations = _generations(connection, keys)
    known = texts.texts_of(connection, {key for row in generations for key in (row.model_key, row.attempt_key)})
    calls = _in_order(_calls(generations, named, known))
    rewards = _rewards(calls, spans)
    return _triplets(connection, rollout_id, calls, known, rewards)


def rollouts_of(connection: Connection) -> list[str]:
    """The ids of the rollouts that have calls, in the order of the first of each that finished."""
    first = func.min(_GENERATIONS.finished_at)
    recorded = select(_GENERATIONS.rollout_key, first).where(_GENERATIONS.rollout_key.is_not(None))
    moments: dict[int, int] = dict(connection.execute(recorded.group_by(_GENERATIONS.rollout_key)).all())
    known = texts.texts_of(connection, moments)
    found = {known[key] or "": moment for key, moment in moments.items()}
    joined = (
        select(_SPANS.rollout_id, first)
        .join_from(tables.spans, tables.generations, _SPANS.response_id == _GENERATIONS.response_id)
        .where(_SPANS.response_id.is_not(None))
        .group_by(_SPANS.rollout_id)
    )
    for rollout_id, moment in connection.execute(joined):
        if rollout_id is not None:
            found[rollout_id] = min(moment, found.get(rollout_id, moment))
    return sorted(found, key=lambda each: (found[each], each))


def of_responses(connection: Connection, response_ids: Iterable[str]) -> dict[str, Triplet]:
    """Of each of these answers that is known, the first choice of its last generation."""
    last: dict[str, int] = {}
    for some in in_parts(sorted({rows.storable(each) or "" for each in response_ids})):
        query = select(_GENERATIONS.response_id, _GENERATIONS.key).where(_GENERATIONS.response_id.in_(some))
        last |= dict(connection.execute(query.order_by(_GENERATIONS.finished_at, _GENERATIONS.key)).all())
    generations = _generations(connection, last.values())
    known = texts.texts_of(connection, {row.model_key for row in generations})
    calls = [_Call([row], None, None) for row in generations]
    found: dict[str, Triplet] = {}
    for triplet in _triplets(connection, None, calls, known, {}):
        found.setdefault(triplet.response_id or "", triplet)
    return found


def _spans(connection: Connection, rollout_id: str, attempt_id: str | None) -> Sequence[Any]:
    """The spans of a rollout that name an answer, or give a reward.

    In the order of `sequence_id`, in which 0.3 has spans, too: the store numbers those of a rollout as they end, where
    `start_time` is by the clock of whichever host has sent one.
    """
    columns = (_SPANS.attempt_id, _SPANS.sequence_id, _SPANS.span_id, _SPANS.start_time, _SPANS.response_id)
    # The body of a call's span may have thousands of ids, and is not looked into.
    body = case((_SPANS.reward.is_not(None), _SPANS.body)).label("body")
    query = (
        select(*columns, _SPANS.reward, body)
        .where(_SPANS.rollout_id == rows.storable(rollout_id))
        .where(or_(_SPANS.response_id.is_not(None), _SPANS.reward.is_not(None)))
        .order_by(_SPANS.sequence_id, _SPANS.start_time, _SPANS.key)
    )
    if attempt_id is not None:
        query = query.where(_SPANS.attempt_id == rows.storable(attempt_id))
    return connection.execute(query).all()


def _keys_under(connection: Connection, rollout_id: str, attempt_id: str | None) -> Sequence[int]:
    """Of the generations that were recorded under these ids."""
    query = select(_GENERATIONS.key)
    for column, text in ((_GENERATIONS.rollout_key, rollout_id), (_GENERATIONS.attempt_key, attempt_id)):
        if text is not None:
            # No row has -1, which stands for a text that is not known.
            query = query.where(column == (texts.key_of(connection, text) or -1))
    return connection.execute(query).scalars().all()


def _keys_of(connection: Connection, response_ids: Sequence[str]) -> list[int]:
    query = select(_GENERATIONS.key)
    return [
        key
        for some in in_parts(response_ids)
        for key in connection.execute(query.where(_GENERATIONS.response_id.in_(some))).scalars()
    ]


def _generations(connection: Connection, keys: Iterable[int]) -> list[Any]:
    """Without their texts, in the order in which they finished."""
    query = select(
        _GENERATIONS.key,
        _GENERATIONS.id,
        _GENERATIONS.response_id,
        _GENERATIONS.model_key,
        _GENERATIONS.attempt_key,
        _GENERATIONS.finished_at,
        _GENERATIONS.status,
        _GENERATIONS.prompt_token_ids,
    )
    found = [
        row for some in in_parts(sorted(keys)) for row in connection.execute(query.where(_GENERATIONS.key.in_(some)))
    ]
    return sorted(found, key=lambda row: (row.finished_at, row.key))


def _calls(generations: Iterable[Any], named: Mapping[str, Any], known: Texts) -> list[_Call]:
    of_answers: defaultdict[Any, list[Any]] = defaultdict(list)
    for row in generations:
        of_answers[row.key if row.response_id is None else row.response_id].append(row)
    calls: list[_Call] = []
    for answer, group in of_answers.items():
        span = named.get(answer)
        calls.append(_Call(group, span, (span and span.attempt_id) or known[group[-1].attempt_key]))
    return calls


def _in_order(calls: Iterable[_Call]) -> list[_Call]:
    spanned: list[_Call] = []
    others: list[_Call] = []
    for call in calls:
        (others if call.span is None else spanned).append(call)
    spanned.sort(key=lambda call: _place(call.span))
    # When the first of those from each place on has finished: by several clocks, it may be one that comes late.
    moments = list(accumulate((call.finished_at for call in reversed(spanned)), min))[::-1]
    behind: defaultdict[int, list[_Call]] = defaultdict(list)
    for call in sorted(others, key=lambda call: call.finished_at):
        behind[bisect_right(moments, call.finished_at)].append(call)
    found = [*behind[0]]
    for place, call in enumerate(spanned, 1):
        found += (call, *behind[place])
    return found


def _place(span: Any) -> tuple[int, float]:
    return span.sequence_id, span.start_time or 0.0


def _rewards(calls: Sequence[_Call], spans: Iterable[Any]) -> dict[int, float]:
    """Of each generation that has got one, by its key; `of_rollout` says which that is."""
    generations = {rows.uuid_text(row.id): row.key for call in calls for row in call.generations}
    answers = {call.generations[-1].response_id: call for call in calls}
    linked = {(RESPONSE, answer): call for answer, call in answers.items()}
    linked |= {("span_id", span.span_id): answers[span.response_id] for span in spans if span.response_id in answers}
    found: dict[int, float] = {}
    for span in spans:
        if span.reward is None:
            continue
        said = json.loads(span.body)["attributes"]
        if GENERATION in said:
            key = generations.get(str(said[GENERATION]))
        else:
            call = next((linked[link] for link in links(said) if link in linked), None)
            call = call or _rewarded(calls, span, is_outcome=said.get(OUTCOME) is True)
            key = call and call.generations[-1].key
        if key is not None:
            found[key] = span.reward
    return found


def _rewarded(calls: Iterable[_Call], reward: Any, is_outcome: bool) -> _Call | None:
    """The call that a reward belongs to that says nothing of one."""
    # What names no attempt may be of any.
    ours = [call for call in calls if not reward.attempt_id or call.attempt_id in (None, "", reward.attempt_id)]
    last = ours[-1] if ours else None
    if is_outcome:
        return last
    moment = float("inf") if reward.start_time is None else reward.start_time * 1e9
    found = None
    for call in ours:
        if call.span is not None and _place(call.span) > _place(reward):
            return found
        if call.span is not None or call.finished_at <= moment:
            found = call
    return found or last


def _triplets(
    connection: Connection, rollout_id: str | None, calls: Iterable[_Call], known: Texts, rewards: Mapping[int, float]
) -> list[Triplet]:
    generations = [(call, row) for call in calls for row in call.generations]
    choices = _choices(connection, [row.key for _, row in generations])
    found: list[Triplet] = []
    for call, row in generations:
        prompt_token_ids = rows.array_of("i", row.prompt_token_ids)
        for choice in choices.get(row.key, (None,)):
            found.append(
                Triplet(
                    generation_id=rows.uuid_text(row.id),
                    response_id=rows.text_of(row.response_id),
                    rollout_id=rollout_id,
                    attempt_id=call.attempt_id,
                    index=choice.index if choice else 0,
                    status=STATUSES[row.status],
                    model=known[row.model_key],
                    prompt_token_ids=prompt_token_ids,
                    response_token_ids=rows.array_of("i", choice.token_ids) if choice else None,
                    logprobs=rows.array_of("f", choice.logprobs) if choice else None,
                    reward=rewards.get(row.key),
                    span_id=call.span.span_id if call.span else None,
                    weight_versions=rows.versions_of(choice.weight_versions) if choice else None,
                )
            )
    return found


def _choices(connection: Connection, keys: Sequence[int]) -> dict[int, list[Any]]:
    """Of each generation, without their texts."""
    query = select(
        _CHOICES.generation_key, _CHOICES.index, _CHOICES.token_ids, _CHOICES.logprobs, _CHOICES.weight_versions
    ).order_by(_CHOICES.generation_key, _CHOICES.index)
    found: defaultdict[int, list[Any]] = defaultdict(list)
    for some in in_parts(keys):
        for row in connection.execute(query.where(_CHOICES.generation_key.in_(some))):
            found[row.generation_key].append(row)
    return found
