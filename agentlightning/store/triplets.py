"""The triplets of a rollout: its model calls in order, each with the reward that belongs to it.

Everything here works inside a transaction of somebody else's, and asks as many queries whatever number of calls there
are, but for lists that are too long for one.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import Column, Connection, case, func, or_, select

from agentlightning.generation import STATUSES
from agentlightning.store import generations as kept
from agentlightning.store import rollouts, rows, tables, texts
from agentlightning.store.attributes import GENERATION, OUTCOME, RESPONSE, links
from agentlightning.store.database import in_parts
from agentlightning.triplet import Triplet

__all__ = ["Place", "has_call", "of_responses", "of_rollout", "places_of", "rollouts_of"]

Texts = Mapping[int | None, str | None]

# A link by this is to the span of a call.
SPAN = "span_id"

_SPANS, _GENERATIONS, _CHOICES = tables.spans.c, tables.generations.c, tables.choices.c


@dataclass(slots=True)
class _Call:
    """The generations of one HTTP call, in the order in which they finished, and the spans that name its answer.

    One that has none is missing: a span names its answer, and it is lost, or not here yet, or was made elsewhere.
    """

    generations: list[Any]
    spans: list[Any]
    attempt_id: str | None

    @property
    def span(self) -> Any:
        """The first of its spans, which is where it stands."""
        return self.spans[0] if self.spans else None

    @property
    def response_id(self) -> Any:
        return (self.generations or self.spans)[-1].response_id

    @property
    def finished_at(self) -> float:
        """Nanoseconds since the epoch; of a missing one, by the clock of whoever made its span."""
        if self.generations:
            return self.generations[-1].finished_at
        ended = _ended(self.span)
        return float("inf") if ended is None else ended * 1e9


@dataclass(frozen=True, slots=True)
class Place:
    """Where a generation stands in its rollout; as in its triplets."""

    generation_id: str
    attempt_id: str | None
    span_id: str | None
    reward: float | None


def of_rollout(connection: Connection, rollout_id: str, attempt_id: str | None = None) -> list[Triplet]:
    """A triplet for each choice of each model call of a rollout, or of an attempt of it; one for a call without any.

    Its calls are those that were recorded under these ids, and those whose answer one of its spans names: their
    `response_id` is its `gen_ai.response.id`. Several calls may have one `response_id`: a client that gives all of them
    one request id makes vLLM answer so. Of these only those that were recorded under the ids are its calls, and the
    spans that name it are theirs one by one, in order, where there are as many and no attempt of one contradicts; else
    none of them is.

    Arrival is not order: spans are sent in batches, and generations wait in a queue, so that either may come late. Two
    events are compared by what one writer or one clock says of both, and by arrival only where nothing else is known.

    Order: calls that have spans are in the order in which these ended (`_in_time`), and one that has none comes after
    the last of them that finished before it, by the clock of vLLM's host. The generations of one call (tool loops, beam
    search) stay together. A call that is missing has its place by its span, and no triplet. It is where no call has the
    answer that a span names, and where the spans that name one of several calls are more than these, or are of other
    attempts.

    Rewards: one that names a generation, or links to the answer or the span of a call, belongs to that; one that was
    given as the outcome of its attempt to the last call that is there by now; each other to the last call of its
    attempt that ended before it (`_is_before`). One that has none before it, and no call's span after it, is an
    outcome, too. Of several rewards of a call the last counts, and one that was posted counts more than one in a span
    of the agent: their clocks differ. Of several generations of a call the last gets it, with all of its choices. A
    reward that belongs to a call that is missing, or links to none, or to an answer that several calls have, is left
    out.
    """
    if attempt_id == "latest" and (attempt_id := rollouts.attempt_id_of(connection, rollout_id, attempt_id)) is None:
        return []
    calls, known, rewards = _all_of(connection, rollout_id, attempt_id, (_GENERATIONS.prompt_token_ids,))
    return _triplets(connection, rollout_id, calls, known, rewards)


def places_of(connection: Connection, rollout_id: str) -> list[Place]:
    """The generations of a rollout's calls, in the order of its triplets, without what is in them."""
    calls, _, rewards = _all_of(connection, rollout_id, None, ())
    return [
        Place(rows.uuid_text(row.id), call.attempt_id, call.span.span_id if call.span else None, rewards.get(row.key))
        for call in calls
        for row in call.generations
    ]


def has_call(connection: Connection, rollout_id: str, generation_id: str) -> bool:
    """Whether a generation is one of a rollout's calls, as `of_rollout` finds them."""
    keys, _ = _keys(connection, rollout_id, None, _spans(connection, rollout_id, None))
    return kept.key_of(connection, generation_id) in keys


def rollouts_of(connection: Connection) -> list[str]:
    """The ids of the rollouts that have calls, in the order of the first of each that finished.

    Among them may be some that have none, as their spans name an answer that several calls of others have had.
    """
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
    """Of each of these answers that one call has had, and no other, the first choice of its last generation."""
    answers = _keys_of(connection, {rows.storable(each) or "" for each in response_ids})
    last = [calls[0][-1] for calls in answers.values() if len(calls) == 1]
    generations = _generations(connection, last, (_GENERATIONS.prompt_token_ids,))
    known = texts.texts_of(connection, {row.model_key for row in generations})
    calls = [_Call([row], [], None) for row in generations]
    found: dict[str, Triplet] = {}
    for triplet in _triplets(connection, None, calls, known, {}):
        found.setdefault(triplet.response_id or "", triplet)
    return found


def _all_of(
    connection: Connection, rollout_id: str, attempt_id: str | None, more: Sequence[Column[Any]]
) -> tuple[list[_Call], Texts, dict[int, float]]:
    """The calls in order, what their keys stand for, and the reward of each generation that has got one."""
    spans = _spans(connection, rollout_id, attempt_id)
    keys, shared = _keys(connection, rollout_id, attempt_id, spans)
    generations = _generations(connection, keys, more)
    known = texts.texts_of(connection, {key for row in generations for key in (row.model_key, row.attempt_key)})
    calls = _in_order(_calls(generations, spans, shared, known), spans)
    return calls, known, _rewards(calls, spans)


def _spans(connection: Connection, rollout_id: str, attempt_id: str | None) -> Sequence[Any]:
    """The spans of a rollout that name an answer, or give a reward, in the order in which they ended."""
    wanted = [(_SPANS.rollout_id, rollout_id), (_SPANS.attempt_id, attempt_id)]
    # Spans have these ids as they came: none is what a database may have no way to hold.
    if any(text is not None and ("\0" in text or text.encode(errors="replace").decode() != text) for _, text in wanted):
        return []
    columns = (_SPANS.key, _SPANS.attempt_id, _SPANS.sequence_id, _SPANS.is_numbered, _SPANS.span_id)
    columns += (_SPANS.start_time, _SPANS.end_time)
    # The body of a call's span may have thousands of ids, and is not looked into.
    body = case((_SPANS.reward.is_not(None), _SPANS.body)).label("body")
    query = (
        select(*columns, _SPANS.response_id, _SPANS.reward, body)
        .where(*(column == text for column, text in wanted if text is not None))
        .where(or_(_SPANS.response_id.is_not(None), _SPANS.reward.is_not(None)))
    )
    return _in_time(connection.execute(query).all())


def _in_time(spans: Iterable[Any]) -> list[Any]:
    """Spans in the order in which they ended.

    Those that their sender has numbered are in the order of their numbers. Each of the others comes after the last of
    these that ended before it by the clock of the agent's host, and they are in the order of that clock. Spans without
    a time, and those of the same time, are in the order of arrival.
    """
    numbered: list[Any] = []
    timed: list[Any] = []
    others: list[Any] = []
    for span in spans:
        (numbered if span.is_numbered else others if _ended(span) is None else timed).append(span)
    numbered.sort(key=lambda span: (span.sequence_id, _ended(span) or 0.0, span.key))
    timed.sort(key=lambda span: (_ended(span), span.sequence_id, span.key))
    others.sort(key=lambda span: (span.sequence_id, span.key))
    found = _merged(numbered, _earliest(_ended(span) for span in numbered), timed, _ended)
    return _merged(found, _earliest(span.sequence_id for span in found), others, lambda span: span.sequence_id)


def _ended(span: Any) -> float | None:
    """Seconds since the epoch, by the clock of its sender's host."""
    return span.start_time if span.end_time is None else span.end_time


def _earliest(moments: Iterable[float | None]) -> list[float]:
    """From each place on the earliest moment: of several clocks, an earlier one may come later."""
    known = [float("inf") if each is None else each for each in moments]
    return list(accumulate(reversed(known), min))[::-1]


def _merged(
    chain: Sequence[Any], moments: Sequence[float], others: Iterable[Any], moment: Callable[[Any], Any]
) -> list[Any]:
    """Each of the others behind the last of the chain whose moment is no later than its own.

    Args:
        moments: of the chain, in ascending order.
        others: in the order of their own moments.
    """
    behind: defaultdict[int, list[Any]] = defaultdict(list)
    for each in others:
        behind[bisect_right(moments, moment(each))].append(each)
    found = [*behind[0]]
    for place, each in enumerate(chain, 1):
        found += (each, *behind[place])
    return found


def _keys(
    connection: Connection, rollout_id: str, attempt_id: str | None, spans: Iterable[Any]
) -> tuple[set[int], set[str]]:
    """Of the generations of its calls; and the answers that its spans name, and that several calls have had."""
    answers = _keys_of(connection, {span.response_id for span in spans if span.response_id is not None})
    keys = {*_keys_under(connection, rollout_id, attempt_id)}
    shared = {answer for answer, calls in answers.items() if len(calls) > 1}
    return keys.union(*(calls[0] for answer, calls in answers.items() if answer not in shared)), shared


def _keys_under(connection: Connection, rollout_id: str, attempt_id: str | None) -> Sequence[int]:
    """Of the generations that were recorded under these ids."""
    query = select(_GENERATIONS.key)
    for column, text in ((_GENERATIONS.rollout_key, rollout_id), (_GENERATIONS.attempt_key, attempt_id)):
        if text is not None:
            # No row has -1, which stands for a text that is not known.
            query = query.where(column == (texts.key_of(connection, text) or -1))
    return connection.execute(query).scalars().all()


def _keys_of(connection: Connection, response_ids: Iterable[str]) -> dict[str, list[list[int]]]:
    """Of each answer that is known, the generations of each call that has had it, as they finished."""
    query = select(_GENERATIONS.response_id, _GENERATIONS.key, _GENERATIONS.call_id)
    found: defaultdict[str, defaultdict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for some in in_parts(sorted(response_ids)):
        of_some = query.where(_GENERATIONS.response_id.in_(some))
        for row in connection.execute(of_some.order_by(_GENERATIONS.finished_at, _GENERATIONS.key)):
            found[row.response_id][_call_of(row)].append(row.key)
    return {answer: [*calls.values()] for answer, calls in found.items()}


def _call_of(row: Any) -> Any:
    """What the generations of one call have in common; one of which no HTTP call is known is a call of its own."""
    return row.key if row.call_id is None else row.call_id


def _generations(connection: Connection, keys: Iterable[int], more: Sequence[Column[Any]]) -> list[Any]:
    """Without their texts, in the order in which they finished."""
    query = select(
        _GENERATIONS.key,
        _GENERATIONS.id,
        _GENERATIONS.call_id,
        _GENERATIONS.response_id,
        _GENERATIONS.model_key,
        _GENERATIONS.attempt_key,
        _GENERATIONS.sender_key,
        _GENERATIONS.started_at,
        _GENERATIONS.finished_at,
        _GENERATIONS.status,
        *more,
    )
    found = [
        row for some in in_parts(sorted(keys)) for row in connection.execute(query.where(_GENERATIONS.key.in_(some)))
    ]
    return sorted(found, key=lambda row: (row.finished_at, row.key))


def _calls(generations: Iterable[Any], spans: Iterable[Any], shared: Collection[str], known: Texts) -> list[_Call]:
    """The calls that these generations are of, with their spans, and those that are missing."""
    groups: defaultdict[Any, list[Any]] = defaultdict(list)
    for row in generations:
        groups[row.response_id, _call_of(row)].append(row)
    calls = [_Call(group, [], known[group[-1].attempt_key]) for group in groups.values()]
    with_answer: defaultdict[str | None, list[_Call]] = defaultdict(list)
    for call in sorted(calls, key=lambda call: call.finished_at):
        with_answer[call.response_id].append(call)
    named: defaultdict[str, list[Any]] = defaultdict(list)
    for span in spans:
        if span.response_id is not None:
            named[span.response_id].append(span)
    for answer, naming in named.items():
        found = with_answer[answer]
        of_each = [[span] for span in naming] if answer in shared else [naming]
        if len(found) == len(of_each) and (answer not in shared or all(map(_may_be_of, found, naming))):
            for call, theirs in zip(found, of_each, strict=True):
                call.spans, call.attempt_id = theirs, theirs[0].attempt_id or call.attempt_id
        elif len(found) <= len(naming):
            calls += [_Call([], [span], span.attempt_id) for span in naming]
    return calls


def _may_be_of(call: _Call, span: Any) -> bool:
    """Whether their attempts may be the same: what names none may be of any."""
    return not call.attempt_id or not span.attempt_id or call.attempt_id == span.attempt_id


def _in_order(calls: Iterable[_Call], spans: Iterable[Any]) -> list[_Call]:
    spanned: list[_Call] = []
    others: list[_Call] = []
    places = {id(span): place for place, span in enumerate(spans)}
    for call in calls:
        (others if call.span is None else spanned).append(call)
    spanned.sort(key=lambda call: places[id(call.span)])
    moments = _earliest(call.finished_at if call.generations else None for call in spanned)
    # By the clocks of agents a missing one stands somewhere between those around it, and moves none of these.
    for place, call in enumerate(spanned):
        if not call.generations:
            moments[place] = min(moments[place], max(call.finished_at, moments[place - 1] if place else 0))
    others.sort(key=lambda call: call.finished_at)
    return _merged(spanned, moments, others, lambda call: call.finished_at)


def _rewards(calls: Sequence[_Call], spans: Iterable[Any]) -> dict[int, float]:
    """Of each generation that has got one, by its key; `of_rollout` says which that is."""
    generations = {rows.uuid_text(row.id): row.key for call in calls for row in call.generations}
    how_many = Counter(call.response_id for call in calls)
    linked = {(RESPONSE, rows.text_of(each.response_id)): each for each in calls if how_many[each.response_id] == 1}
    linked |= {(SPAN, span.span_id): call for call in calls for span in call.spans}
    ahead = _seconds_ahead(calls)
    found: dict[int, float] = {}
    given = [(json.loads(span.body)["attributes"], span) for span in spans if span.reward is not None]
    # Posted ones count last: the store's clock, which they go by, is not the agent's.
    for said, span in sorted(given, key=lambda each: OUTCOME in each[0] or GENERATION in each[0]):
        if GENERATION in said:
            key = generations.get(str(said[GENERATION]))
        else:
            named = [link for link in links(said) if link[0] in (RESPONSE, SPAN)]
            if named:
                call = next((linked[link] for link in named if link in linked), None)
            else:
                call = _rewarded(calls, span, said.get(OUTCOME) is True, ahead)
            key = call.generations[-1].key if call is not None and call.generations else None
        if key is not None:
            found[key] = span.reward
    return found


def _rewarded(calls: Iterable[_Call], reward: Any, is_outcome: bool, ahead: Callable[[_Call], float]) -> _Call | None:
    """The call of a reward that names none."""
    ours = [call for call in calls if _may_be_of(call, reward)]
    if is_outcome:
        # Of those that are there: a judge, for one, has the last word, and is nothing that is learnt from.
        return next((call for call in reversed(ours) if call.generations), None)
    before = [place for place, call in enumerate(ours) if call.span is not None and _is_before(call.span, reward)]
    found = ours[before[-1]] if before else None
    given = _ended(reward)
    for call in ours[before[-1] + 1 if before else 0 :]:
        if call.span is not None:
            return found
        if given is None or call.finished_at / 1e9 + ahead(call) <= given:
            found = call
    return found or (ours[-1] if ours else None)


def _is_before(span: Any, reward: Any) -> bool:
    """Whether a call's span ended before a reward was given: by the numbers that their sender gave to both, or else by
    the clock of the agent's host. Where one of them has no time, by arrival.
    """
    if span.is_numbered and reward.is_numbered and span.sequence_id != reward.sequence_id:
        return span.sequence_id < reward.sequence_id
    ended, given = _ended(span), _ended(reward)
    if ended is None or given is None:
        return (span.sequence_id, span.key) < (reward.sequence_id, reward.key)
    return ended <= given


def _seconds_ahead(calls: Iterable[_Call]) -> Callable[[_Call], float]:
    """By how many seconds the agent's clock is ahead of the one that a call's finish is by.

    The clocks count as equal unless calls that have both a span and generations contradict: a call starts in vLLM after
    its span did, and finishes before its span does. Each process that records has a clock of its own.
    """
    both: defaultdict[Any, list[_Call]] = defaultdict(list)
    for call in calls:
        if call.span is not None and call.generations and _ended(call.span) is not None:
            both[call.generations[-1].sender_key].append(call)
    known = {sender_key: _ahead(some) for sender_key, some in both.items()}
    return lambda call: known.get(call.generations[-1].sender_key, 0.0)


def _ahead(calls: Iterable[_Call]) -> float:
    least, most = float("-inf"), float("inf")
    for call in calls:
        first, last, span = call.generations[0], call.generations[-1], call.span
        if first.started_at is not None and span.start_time is not None:
            least = max(least, span.start_time - first.started_at / 1e9)
        most = min(most, (_ended(span) or 0.0) - last.finished_at / 1e9)
    if least > most:
        # Spans that take no time are made when the answer is there: of them only the end tells.
        return min(0.0, most)
    return 0.0 if least <= 0.0 <= most else least if least > float("-inf") else most


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
