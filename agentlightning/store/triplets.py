"""The triplets of a rollout: its model calls in order, each with the reward that belongs to it.

The caller owns the transaction. The number of queries does not depend on the number of calls, except that long lists
are split into several.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import Column, Connection, bindparam, case, func, or_, select

from agentlightning.errors import NotFound
from agentlightning.generation import STATUSES
from agentlightning.store import generations as kept
from agentlightning.store import prompts, rollouts, rows, tables, texts
from agentlightning.store.attributes import GENERATION, OUTCOME, RESPONSE, links
from agentlightning.store.database import in_parts
from agentlightning.store.interface import TripletFilters
from agentlightning.trajectory import was_sampled_with
from agentlightning.triplet import Triplet

__all__ = [
    "CALLER",
    "PROMPT",
    "GenerationPosition",
    "RolloutCalls",
    "caller_of",
    "calls_of",
    "choices_of",
    "has_call",
    "of_responses",
    "of_rollout",
    "positions_of",
    "recorded_attempt",
    "rollouts_of",
]

Texts = Mapping[int | None, str | None]

# A link by this attribute leads to the span of a call.
SPAN = "span_id"

_SPANS, _GENERATIONS, _CHOICES = tables.spans.c, tables.generations.c, tables.choices.c
CALLER = (_GENERATIONS.agent_key, _GENERATIONS.parent_agent_key, _GENERATIONS.purpose_key, _GENERATIONS.retry)
"""The columns of which `caller_of` makes what a call says of its caller."""
PROMPT = (_GENERATIONS.prompt_token_ids, _GENERATIONS.ids_block)
"""The columns of which `prompts.ids_of` makes the ids of a prompt."""

# Made once: SQLAlchemy takes longer to build a statement than SQLite takes to execute it.
_SPANS_OF_ROLLOUT = (
    select(
        *(_SPANS.key, tables.ATTEMPT_OF_SPAN, _SPANS.sequence_id, _SPANS.is_numbered, _SPANS.span_id),
        *(_SPANS.start_time, _SPANS.end_time, _SPANS.response_id, _SPANS.reward),
        # The body of a call's span may hold thousands of ids, so only the bodies of rewards are read.
        case((_SPANS.reward.is_not(None), _SPANS.body)).label("body"),
    )
    .where(_SPANS.rollout_id == bindparam("rollout"))
    .where(or_(_SPANS.response_id.is_not(None), _SPANS.reward.is_not(None)))
)
_SPANS_OF_ATTEMPT = _SPANS_OF_ROLLOUT.where(_SPANS.attempt_id == bindparam("attempt"))


@dataclass(slots=True)
class _Call:
    """The generations of one HTTP call, in the order in which they finished, and the spans that name its answer.

    A call without generations is missing: a span names its answer, but it was lost, or has not arrived yet, or another
    server answered it.
    """

    generations: list[Any]
    spans: list[Any]
    attempt_id: str | None

    @property
    def span(self) -> Any:
        """The first of its spans, which gives its position."""
        return self.spans[0] if self.spans else None

    @property
    def response_id(self) -> Any:
        return (self.generations or self.spans)[-1].response_id

    @property
    def finished_at(self) -> float:
        """Nanoseconds since the epoch; for a missing call by the clock of the agent that made its span."""
        if self.generations:
            return self.generations[-1].finished_at
        ended = _ended(self.span)
        return float("inf") if ended is None else ended * 1e9


@dataclass(frozen=True, slots=True)
class GenerationPosition:
    """A generation of a rollout's call, with what its triplets say of it besides their ids.

    Attributes:
        caller: what it says of its caller, by the names of the fields.
    """

    generation_id: str
    attempt_id: str | None
    span_id: str | None
    reward: float | None
    caller: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RolloutCalls:
    """The calls of a rollout, or of one of its attempts, in order, without their choices.

    Attributes:
        rollout: the row of the rollout; None if it was only recorded.
        texts: by the keys in the rows of generations.
        rewards: by the keys of generations.
        given: rewards in the order in which they were given, each with the attributes of its span, posted ones last.
    """

    calls: list[_Call]
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
    return _triplets(
        connection, rollout_id, calls_of(connection, rollout_id, attempt_id, (*PROMPT, *CALLER)), filters or {}
    )


def calls_of(
    connection: Connection, rollout_id: str, attempt_id: str | None, more: Sequence[Column[Any]]
) -> RolloutCalls:
    """Find the calls of a rollout by the rules of `of_rollout`.

    Args:
        attempt_id: None for all attempts.
        more: columns of generations to read besides those that the rules need.
    """
    spans = _spans(connection, rollout_id, attempt_id)
    keys, shared = _keys(connection, rollout_id, attempt_id, spans)
    generations = _generations(connection, keys, more)
    named = [column.name for column in (_GENERATIONS.model_key, _GENERATIONS.attempt_key, *more)]
    text_keys = [name for name in named if name.endswith("_key")]
    known = texts.texts_of(connection, {getattr(row, name) for row in generations for name in text_keys})
    calls = _in_order(_calls(generations, spans, shared, known), spans)
    given = _given(spans)
    rollout = rollouts.find(connection, rows.storable(rollout_id) or "")
    return RolloutCalls(calls, rollout, known, _rewards(calls, given), given)


def positions_of(connection: Connection, rollout_id: str) -> list[GenerationPosition]:
    """List the generations of a rollout's calls, in the order of its triplets, without their contents."""
    found = calls_of(connection, rollout_id, None, CALLER)
    return [
        GenerationPosition(
            rows.uuid_text(row.id),
            call.attempt_id,
            call.span.span_id if call.span else None,
            found.rewards.get(row.key),
            caller_of(row, found.texts),
        )
        for call in found.calls
        for row in call.generations
    ]


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
    keys, _ = _keys(connection, rollout_id, None, _spans(connection, rollout_id, None))
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
    answers = _keys_of(connection, {rows.storable(each) or "" for each in response_ids})
    last = [calls[0][-1] for calls in answers.values() if len(calls) == 1]
    generations = _generations(connection, last, (*PROMPT, *CALLER))
    known = texts.texts_of(connection, {key for row in generations for key in (row.model_key, *_caller_keys(row))})
    calls = [_Call([row], [], None) for row in generations]
    found: dict[str, Triplet] = {}
    for triplet in _triplets(connection, None, RolloutCalls(calls, None, known, {}, ()), {}):
        found.setdefault(triplet.response_id or "", triplet)
    return found


def _spans(connection: Connection, rollout_id: str, attempt_id: str | None) -> Sequence[Any]:
    """List the spans of a rollout that name an answer or give a reward, in the order in which they ended."""
    wanted = {"rollout": rollout_id, "attempt": attempt_id}
    # Spans have these ids unencoded, so no span has an id that a database cannot store.
    if any(
        text is not None and ("\0" in text or text.encode(errors="replace").decode() != text)
        for text in wanted.values()
    ):
        return []
    return _in_time(connection.execute(_SPANS_OF_ROLLOUT if attempt_id is None else _SPANS_OF_ATTEMPT, wanted).all())


def _in_time(spans: Iterable[Any]) -> list[Any]:
    """Sort spans by when they ended.

    Spans that their sender numbered are in the order of their numbers. Each other span comes after the last of these
    that ended before it, by the clock of the agent's host, and the others are in the order of that clock. Spans without
    a time, or with the same time, are in the order of arrival.
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
    """Return when a span ended, in seconds since the epoch by the clock of its sender's host."""
    return span.start_time if span.end_time is None else span.end_time


def _earliest(moments: Iterable[float | None]) -> list[float]:
    """Return, for each position, the earliest time from there on: with several clocks, times may go backwards."""
    known = [float("inf") if each is None else each for each in moments]
    return list(accumulate(reversed(known), min))[::-1]


def _merged(
    chain: Sequence[Any], moments: Sequence[float], others: Iterable[Any], moment: Callable[[Any], Any]
) -> list[Any]:
    """Insert each of the others behind the last element of a chain whose time is not later than its own.

    Args:
        moments: times of the chain, ascending.
        others: sorted by their times.
        moment: returns the time of one of the others.
    """
    behind: defaultdict[int, list[Any]] = defaultdict(list)
    for each in others:
        behind[bisect_right(moments, moment(each))].append(each)
    found = [*behind[0]]
    for position, each in enumerate(chain, 1):
        found += (each, *behind[position])
    return found


def _keys(
    connection: Connection, rollout_id: str, attempt_id: str | None, spans: Iterable[Any]
) -> tuple[set[int], set[str]]:
    """Return the keys of the generations of a rollout's calls, and the answers of its spans that calls share."""
    answers = _keys_of(connection, {span.response_id for span in spans if span.response_id is not None})
    keys = {*_keys_under(connection, rollout_id, attempt_id)}
    shared = {answer for answer, calls in answers.items() if len(calls) > 1}
    return keys.union(*(calls[0] for answer, calls in answers.items() if answer not in shared)), shared


def _keys_under(connection: Connection, rollout_id: str, attempt_id: str | None) -> Sequence[int]:
    """Return the keys of the generations recorded under these ids."""
    query = select(_GENERATIONS.key)
    for column, text in ((_GENERATIONS.rollout_key, rollout_id), (_GENERATIONS.attempt_key, attempt_id)):
        if text is not None:
            # -1 is the key of no row: the text is unknown.
            query = query.where(column == (texts.key_of(connection, text) or -1))
    return connection.execute(query).scalars().all()


def _keys_of(connection: Connection, response_ids: Iterable[str]) -> dict[str, list[list[int]]]:
    """Map each known answer to its calls, each a list of the keys of its generations, in the order of their end."""
    query = select(_GENERATIONS.response_id, _GENERATIONS.key, _GENERATIONS.call_id)
    found: defaultdict[str, defaultdict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    for some in in_parts(sorted(response_ids)):
        of_some = query.where(_GENERATIONS.response_id.in_(some))
        for row in connection.execute(of_some.order_by(_GENERATIONS.finished_at, _GENERATIONS.key)):
            found[row.response_id][_call_of(row)].append(row.key)
    return {answer: [*calls.values()] for answer, calls in found.items()}


def _call_of(row: Any) -> Any:
    """Return what identifies a generation's call; a generation without a `call_id` is a call of its own."""
    return row.key if row.call_id is None else row.call_id


def _generations(connection: Connection, keys: Iterable[int], more: Sequence[Column[Any]]) -> list[Any]:
    """Read generations without their texts, in the order in which they finished."""
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
    """Group generations into calls with their spans, and add the missing calls."""
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
        if len(found) == len(of_each) and (answer not in shared or all(map(_attempts_match, found, naming))):
            for call, its_spans in zip(found, of_each, strict=True):
                call.spans, call.attempt_id = its_spans, its_spans[0].attempt_id or call.attempt_id
        elif len(found) <= len(naming):
            calls += [_Call([], [span], span.attempt_id) for span in naming]
    return calls


def _attempts_match(call: _Call, span: Any) -> bool:
    """Tell whether a call and a span may belong to the same attempt; a missing attempt id matches any."""
    return not call.attempt_id or not span.attempt_id or call.attempt_id == span.attempt_id


def _in_order(calls: Iterable[_Call], spans: Iterable[Any]) -> list[_Call]:
    spanned: list[_Call] = []
    others: list[_Call] = []
    positions = {id(span): position for position, span in enumerate(spans)}
    for call in calls:
        (others if call.span is None else spanned).append(call)
    spanned.sort(key=lambda call: positions[id(call.span)])
    moments = _earliest(call.finished_at if call.generations else None for call in spanned)
    # A missing call only has a time by an agent's clock, so it is kept between its neighbours and moves neither.
    for position, call in enumerate(spanned):
        if not call.generations:
            moments[position] = min(moments[position], max(call.finished_at, moments[position - 1] if position else 0))
    others.sort(key=lambda call: call.finished_at)
    return _merged(spanned, moments, others, lambda call: call.finished_at)


def _given(spans: Iterable[Any]) -> list[tuple[dict[str, Any], Any]]:
    """List the spans of rewards, each behind its attributes, in the order in which they were given.

    Posted rewards come last, so that they win: their times are by the store's clock, not by the agent's.
    """
    given = [(json.loads(span.body)["attributes"], span) for span in spans if span.reward is not None]
    return sorted(given, key=lambda each: OUTCOME in each[0] or GENERATION in each[0])


def _rewards(calls: Sequence[_Call], given: Iterable[tuple[dict[str, Any], Any]]) -> dict[int, float]:
    """Map the keys of generations to their rewards, by the rules of `of_rollout`."""
    generations = {rows.uuid_text(row.id): row.key for call in calls for row in call.generations}
    how_many = Counter(call.response_id for call in calls)
    linked = {(RESPONSE, rows.text_of(each.response_id)): each for each in calls if how_many[each.response_id] == 1}
    linked |= {(SPAN, span.span_id): call for call in calls for span in call.spans}
    ahead = _seconds_ahead(calls)
    found: dict[int, float] = {}
    for known, span in given:
        if GENERATION in known:
            key = generations.get(str(known[GENERATION]))
        else:
            named = [link for link in links(known) if link[0] in (RESPONSE, SPAN)]
            if named:
                call = next((linked[link] for link in named if link in linked), None)
            else:
                call = _rewarded(calls, span, known.get(OUTCOME) is True, ahead)
            key = call.generations[-1].key if call is not None and call.generations else None
        if key is not None:
            found[key] = span.reward
    return found


def _rewarded(calls: Iterable[_Call], reward: Any, is_outcome: bool, ahead: Callable[[_Call], float]) -> _Call | None:
    """Find the call of a reward that names none."""
    candidates = [call for call in calls if _attempts_match(call, reward)]
    if is_outcome:
        # Missing calls are skipped: the last one may be that of a judge model elsewhere, which is not trained.
        return next((call for call in reversed(candidates) if call.generations), None)
    before = [at for at, call in enumerate(candidates) if call.span is not None and _is_before(call.span, reward)]
    found = candidates[before[-1]] if before else None
    given = _ended(reward)
    for call in candidates[before[-1] + 1 if before else 0 :]:
        if call.span is not None:
            return found
        if given is None or call.finished_at / 1e9 + ahead(call) <= given:
            found = call
    return found or (candidates[-1] if candidates else None)


def _is_before(span: Any, reward: Any) -> bool:
    """Tell whether a call's span ended before a reward was given.

    Their sender's numbers decide if both have one, or else the clock of the agent's host, or else arrival.
    """
    if span.is_numbered and reward.is_numbered and span.sequence_id != reward.sequence_id:
        return span.sequence_id < reward.sequence_id
    ended, given = _ended(span), _ended(reward)
    if ended is None or given is None:
        return (span.sequence_id, span.key) < (reward.sequence_id, reward.key)
    return ended <= given


def _seconds_ahead(calls: Iterable[_Call]) -> Callable[[_Call], float]:
    """Return a function that tells how many seconds the agent's clock is ahead of the clock that a call finished by.

    The clocks count as equal unless calls with both a span and generations contradict: a call starts in vLLM after its
    span, and finishes before its span. Each process that records has a clock of its own.
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
        # Some tracers make a span of no duration when the answer arrives: only its end is reliable.
        return min(0.0, most)
    return 0.0 if least <= 0.0 <= most else least if least > float("-inf") else most


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
    choices = choices_of(connection, [row.key for _, row in generations])
    reasons = texts.texts_of(connection, {each.finish_reason_key for some in choices.values() for each in some})
    given, metadata = found.input, found.metadata
    triplets: list[Triplet] = []
    ids = prompts.ids_of(connection, [row for _, row in generations])
    for (call, row), prompt_token_ids in zip(generations, ids, strict=True):
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
                    input=given,
                    metadata=metadata,
                )
            )
    return triplets


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
