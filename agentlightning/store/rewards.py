"""Rewards: which call of a rollout each belongs to. Pure functions; `triplets.of_rollout` has the rules."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from agentlightning.store import rows
from agentlightning.store.attributes import GENERATION, OUTCOME, RESPONSE, links
from agentlightning.store.calls import Call, attempts_match, end_of

__all__ = ["given_rewards", "rewards_of"]

# A link by this attribute leads to the span of a call.
SPAN = "span_id"


def given_rewards(spans: Iterable[Any]) -> list[tuple[dict[str, Any], Any]]:
    """List the spans of rewards, each behind its attributes, in the order in which they were given.

    Posted rewards come last, so that they win: their times are by the store's clock, not by the agent's.
    """
    given = [(json.loads(span.body)["attributes"], span) for span in spans if span.reward is not None]
    return sorted(given, key=lambda each: OUTCOME in each[0] or GENERATION in each[0])


def rewards_of(calls: Sequence[Call], given: Iterable[tuple[dict[str, Any], Any]]) -> dict[int, float]:
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


def _rewarded(calls: Iterable[Call], reward: Any, is_outcome: bool, ahead: Callable[[Call], float]) -> Call | None:
    """Find the call of a reward that names none."""
    candidates = [call for call in calls if attempts_match(call, reward)]
    if is_outcome:
        # Missing calls are skipped: the last one may be that of a judge model elsewhere, which is not trained.
        return next((call for call in reversed(candidates) if call.generations), None)
    before = [at for at, call in enumerate(candidates) if call.span is not None and _is_before(call.span, reward)]
    found = candidates[before[-1]] if before else None
    given = end_of(reward)
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
    ended, given = end_of(span), end_of(reward)
    if ended is None or given is None:
        return (span.sequence_id, span.key) < (reward.sequence_id, reward.key)
    return ended <= given


def _seconds_ahead(calls: Iterable[Call]) -> Callable[[Call], float]:
    """Return a function that tells how many seconds the agent's clock is ahead of the clock that a call finished by.

    The clocks count as equal unless calls with both a span and generations contradict: a call starts in vLLM after its
    span, and finishes before its span. Each process that records has a clock of its own.
    """
    both: defaultdict[Any, list[Call]] = defaultdict(list)
    for call in calls:
        if call.span is not None and call.generations and end_of(call.span) is not None:
            both[call.generations[-1].sender_key].append(call)
    known = {sender_key: _ahead(some) for sender_key, some in both.items()}
    return lambda call: known.get(call.generations[-1].sender_key, 0.0)


def _ahead(calls: Iterable[Call]) -> float:
    least, most = float("-inf"), float("inf")
    for call in calls:
        first, last, span = call.generations[0], call.generations[-1], call.span
        if first.started_at is not None and span.start_time is not None:
            least = max(least, span.start_time - first.started_at / 1e9)
        most = min(most, (end_of(span) or 0.0) - last.finished_at / 1e9)
    if least > most:
        # Some tracers make a span of no duration when the answer arrives: only its end is reliable.
        return min(0.0, most)
    return 0.0 if least <= 0.0 <= most else least if least > float("-inf") else most
