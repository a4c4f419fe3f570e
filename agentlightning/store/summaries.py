"""Summaries: a row for each rollout with what lists and charts show, and these rows added up.

They are made from the other tables once somebody looks, for the rollouts that `store.stale` noted, so that lists of any
length and charts of any time read a few rows. What a summary adds to the sums is a function of it alone (`_portions`):
a summary that changes takes out what it had added. So the sums are right after late rewards and after deletions.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection, and_, func, select

from agentlightning.generation import STATUSES
from agentlightning.store import tables, texts
from agentlightning.store.database import Database, fetch, in_parts, insert_rows, run, run_many
from agentlightning.store.rows import storable, text_of
from agentlightning.store.tables import attempts, choices, rollouts, spans

__all__ = [
    "DIMENSIONS",
    "RECORDED",
    "Portion",
    "Summary",
    "are_stale",
    "forget",
    "portions",
    "refresh",
    "revision",
    "slot",
    "update",
]

RECORDED = "recorded"
"""Status of a rollout that was never in the queue."""
DIMENSIONS = ("model", "agent", "worker")
TASK_LENGTH = 240
LARGEST_INPUT = 1 << 16
"""Characters of an input that is read for its task; of a longer one, the beginning is the task."""
TASK_NAMES = ("question", "prompt", "task", "instruction", "query", "problem", "goal", "input", "text")
TAGS = 12
TAG_LENGTH = 80

ROLLOUTS_AT_ONCE = 100
SECONDS_AT_ONCE = 0.1
SECOND = 1e9
_FINISHED = STATUSES.index("finished")
NAME_LENGTH = 256
_TABLES = (tables.summaries, tables.tallies)

_CALLS = """
    SELECT texts.text AS rollout_id, {0} FROM texts JOIN generations g ON g.rollout_key = texts.key
    WHERE texts.key IN ({1})
"""
# Calls that name no rollout, but whose answer is named by a span of the rollout.
_CALLS_OF_SPANS = """
    SELECT DISTINCT spans.rollout_id, {0} FROM spans JOIN generations g ON g.response_id = spans.response_id
    WHERE spans.rollout_id IN ({1}) AND spans.response_id IS NOT NULL AND g.rollout_key IS NULL
"""
_OF_CALL = "g.key, g.status, g.prompt_tokens, g.output_tokens, g.started_at, g.finished_at, g.model_key, g.agent_key"
_BREAKS = "SELECT rollout_id, breaks FROM drifts WHERE rollout_id IN ({})"
_ADD = """
    INSERT INTO tallies (axis, dimension, slot, name, measure, value, count, amount) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (axis, dimension, slot, name, measure, value)
    DO UPDATE SET count = tallies.count + excluded.count, amount = tallies.amount + excluded.amount
"""
_KEY = "axis = ? AND dimension = ? AND slot = ? AND name = ? AND measure = ? AND value = ?"
_REMOVE = f"DELETE FROM tallies WHERE {_KEY} AND count <= 0"
_REVISE = (
    "INSERT INTO drift_totals VALUES ('revision', 1) ON CONFLICT (name) DO UPDATE SET count = drift_totals.count + 1"
)


@dataclass(frozen=True, slots=True)
class Summary:
    """A rollout as lists and charts show it. Texts are as the database has them: `rows.text_of` decodes them.

    Attributes:
        since: when it was queued, or its first call began, in seconds since the epoch, as all times.
        active: when something last happened to it.
        status: its status in the queue, or `RECORDED`.
        queued: None if it was never in the queue.
        started: when its first attempt started, or its first call if it was never queued; None if none has.
        attempt_started: when its latest attempt started.
        ended: when it ended, or its last call if it was never queued; None if it has not.
        calls: number of its generations, of which `finished` have a complete answer.
        latency: mean seconds of a call that finished.
        reward: its last reward.
        breaks: how often its prompts broke and nobody meant it; None where they were not compared yet.
        worker: who runs its latest attempt.
        model, version: of its last call: the model, and its weights.
        agent: the first that its calls name.
        step: `step` of its metadata.
        tags: its metadata, a line for each.
        task: its input, shortened.
    """

    rollout_id: str
    since: float
    active: float
    status: str
    attempts: int
    queued: float | None
    started: float | None
    attempt_started: float | None
    ended: float | None
    calls: int
    finished: int
    prompt_tokens: int
    output_tokens: int
    latency: float | None
    reward: float | None
    breaks: int | None
    worker: str | None
    model: str | None
    agent: str | None
    version: str | None
    step: str | None
    tags: str
    task: str


@dataclass(frozen=True, slots=True)
class Portion:
    """Values that summaries have in a measure.

    Attributes:
        value: about the amount of one summary, so that quartiles can be read from counts; 0 where only the sum matters.
        count: number of summaries.
        amount: their sum.
    """

    measure: str
    value: float
    count: int
    amount: float


@dataclass(slots=True)
class _Calls:
    """The calls of a rollout, added up."""

    calls: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    timed: int = 0
    seconds: float = 0.0
    first: int | None = None
    last: int = 0
    last_key: int = 0
    model_key: int | None = None
    agent_key: int | None = None

    def add(self, row: Any) -> None:
        self.calls += 1
        self.prompt_tokens += row.prompt_tokens
        self.output_tokens += row.output_tokens
        started = row.finished_at if row.started_at is None else row.started_at
        if row.status == _FINISHED:
            self.finished += 1
            if row.started_at is not None:
                self.timed += 1
                self.seconds += max(row.finished_at - row.started_at, 0) / SECOND
        if self.first is None or started < self.first:
            self.first = started
            self.agent_key = row.agent_key if row.agent_key is not None else self.agent_key
        elif self.agent_key is None:
            self.agent_key = row.agent_key
        if (row.finished_at, row.key) >= (self.last, self.last_key):
            self.last, self.last_key, self.model_key = row.finished_at, row.key, row.model_key


def are_stale(connection: Connection) -> bool:
    """Tell whether any rollout changed since its summary was made."""
    return run(connection, "SELECT 1 FROM stale_rollouts LIMIT 1", ()).first() is not None


def revision(connection: Connection) -> int:
    """Return a number that grows whenever a list or a chart may show something else."""
    return run(connection, "SELECT count FROM drift_totals WHERE name = 'revision'", ()).scalar() or 0


def refresh(database: Database) -> bool:
    """Make the summaries of some rollouts that changed, in a short transaction; tells whether these were all.

    No other writer is let in meanwhile: the note of a change is deleted only if the change is seen.
    """
    ends = time.monotonic() + SECONDS_AT_ONCE
    with database.writing(alone=True) as connection:
        while True:
            found = fetch(
                connection, "SELECT key, rollout_id FROM stale_rollouts ORDER BY key LIMIT ?", (ROLLOUTS_AT_ONCE,)
            )
            if found:
                update(connection, [*dict.fromkeys(row.rollout_id for row in found)])
                marks = ", ".join("?" * len(found))
                run(connection, f"DELETE FROM stale_rollouts WHERE key IN ({marks})", [row.key for row in found])
            if len(found) < ROLLOUTS_AT_ONCE:
                return True
            if time.monotonic() > ends:
                return False


def update(connection: Connection, rollout_ids: Sequence[str]) -> None:
    """Make the summaries of rollouts anew, and what they add to the sums; a rollout that is gone has none.

    The caller owns the transaction, in which no other writer is.

    Args:
        rollout_ids: as the database has them.
    """
    for ids in in_parts(rollout_ids):
        _replace(connection, ids, [*_summaries(connection, ids)])


def forget(connection: Connection, rollout_id: str) -> None:
    """Delete the summary of a rollout that is deleted, in a transaction as `update` needs."""
    _replace(connection, [rollout_id], [])


def _replace(connection: Connection, ids: Sequence[str], now: Sequence[Summary]) -> None:
    sums: defaultdict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0, 0.0])
    marks = ", ".join("?" * len(ids))
    before = fetch(connection, f"SELECT {_COLUMNS} FROM summaries WHERE rollout_id IN ({marks})", ids)
    for sign, each in [*((-1, Summary(*row)) for row in before), *((1, each) for each in now)]:
        for place, portion in _portions(each):
            known = sums[(*place, portion.measure, portion.value)]
            known[0] += sign * portion.count
            known[1] += sign * portion.amount
    if before:
        run(connection, f"DELETE FROM summaries WHERE rollout_id IN ({marks})", ids)
    insert_rows(connection, tables.summaries, [astuple(each) for each in now])
    changed = [(*key, count, amount) for key, (count, amount) in sums.items() if count or amount]
    run_many(connection, _ADD, changed)
    run_many(connection, _REMOVE, [row[:6] for row in changed if row[6] < 0])
    run(connection, _REVISE, ())


_COLUMNS = ", ".join(each.name for each in fields(Summary))


def slot(active: float, seconds: int = 3600) -> str:
    """Name the part of time that a moment is in, so that names are in the order of time."""
    at = datetime.fromtimestamp(min(max(active, 0.0), 253_402_300_799) // seconds * seconds, timezone.utc)
    return f"{at:%Y-%m-%dT%H:%M}"


def portions(found: Summary) -> Iterator[Portion]:
    """Yield what a summary adds to the sums."""
    yield Portion(found.status, 0.0, 1, 0.0)
    for measure in ("calls", "prompt_tokens", "output_tokens"):
        yield Portion(measure, 0.0, 1, float(getattr(found, measure)))
    if found.breaks is not None:
        yield Portion("breaks", 0.0, 1, float(found.breaks))
    for measure in ("reward", "latency"):
        value = getattr(found, measure)
        if value is not None and math.isfinite(value):
            yield Portion(measure, float(f"{value:.2g}"), 1, value)


def _portions(found: Summary) -> Iterator[tuple[tuple[str, str, str, str], Portion]]:
    """Yield each portion with where it is added: axis, dimension, slot and name."""
    slots = (("hour", slot(found.active)), ("version", found.version), ("step", found.step))
    names = (("", ""), *((dimension, getattr(found, dimension)) for dimension in DIMENSIONS))
    # A row of an index of PostgreSQL has room for two of these, of any characters.
    places = [
        (axis, dimension, of_axis[:NAME_LENGTH], name[:NAME_LENGTH])
        for axis, of_axis in slots
        if of_axis is not None
        for dimension, name in names
        if name is not None
    ]
    return ((place, portion) for portion in portions(found) for place in places)


def _summaries(connection: Connection, ids: Sequence[str]) -> Iterator[Summary]:
    queued = _queued(connection, ids)
    calls = _calls(connection, ids)
    names = texts.texts_of(connection, {key for each in calls.values() for key in (each.model_key, each.agent_key)})
    versions = _versions(connection, {each.last_key for each in calls.values()})
    rewards = _rewards(connection, ids)
    breaks = {row.rollout_id: row.breaks for row in fetch(connection, _BREAKS.format(", ".join("?" * len(ids))), ids)}
    for rollout_id in ids:
        row, called = queued.get(rollout_id), calls.get(rollout_id, _Calls())
        if row is None and not called.calls:
            continue
        first, last = (None, None) if called.first is None else (called.first / SECOND, called.last / SECOND)
        metadata = {} if row is None or row.metadata is None else _parsed(row.metadata)
        if row is None:
            times = {"queued": None, "started": first, "attempt_started": None, "ended": last}
        else:
            times = {
                "queued": row.start_time,
                "started": row.first_start_time,
                "attempt_started": row.attempt_start_time,
                "ended": row.end_time,
            }
        known = [each for each in (*times.values(), last) if each is not None]
        yield Summary(
            rollout_id=rollout_id,
            since=known[0],
            active=max(known) if times["ended"] is None else times["ended"],
            status=RECORDED if row is None else row.status,
            attempts=0 if row is None else row.attempts,
            **times,
            calls=called.calls,
            finished=called.finished,
            prompt_tokens=called.prompt_tokens,
            output_tokens=called.output_tokens,
            latency=called.seconds / called.timed if called.timed else None,
            reward=rewards.get(rollout_id),
            breaks=breaks.get(rollout_id),
            worker=None if row is None else row.attempt_worker_id,
            model=storable(names[called.model_key]),
            agent=storable(names[called.agent_key]),
            version=versions.get(called.last_key),
            step=_step(metadata),
            tags=storable(_tags(metadata)) or "",
            task="" if row is None else storable(task_of(text_of(row.input))) or "",
        )


def _queued(connection: Connection, ids: Sequence[str]) -> dict[str, Any]:
    first = attempts.alias("first")
    of_rollout = attempts.c.rollout_key == rollouts.c.key
    joined = rollouts.outerjoin(attempts, and_(of_rollout, attempts.c.sequence_id == rollouts.c.attempts)).outerjoin(
        first, and_(first.c.rollout_key == rollouts.c.key, first.c.sequence_id == 1)
    )
    query = select(
        rollouts,
        attempts.c.start_time.label("attempt_start_time"),
        attempts.c.worker_id.label("attempt_worker_id"),
        first.c.start_time.label("first_start_time"),
    ).select_from(joined)
    return {row.rollout_id: row for row in connection.execute(query.where(rollouts.c.rollout_id.in_(ids)))}


def _calls(connection: Connection, ids: Sequence[str]) -> dict[str, _Calls]:
    found: defaultdict[str, _Calls] = defaultdict(_Calls)
    keys = [*texts.known_keys(connection, map(text_of, ids)).values()]
    for query, values in ((_CALLS, keys), (_CALLS_OF_SPANS, ids)):
        if values:
            for row in run(connection, query.format(_OF_CALL, ", ".join("?" * len(values))), values):
                found[row.rollout_id].add(row)
    return found


def _versions(connection: Connection, keys: set[int]) -> dict[int, str]:
    """Map generations to the weights that sampled their last ids, where these are known."""
    column = choices.c.weight_versions
    query = select(choices.c.generation_key, column).where(
        choices.c.generation_key.in_(keys), choices.c.index == 0, column.is_not(None)
    )
    known = {row.generation_key: json.loads(row.weight_versions) for row in connection.execute(query)}
    return {key: storable(str(versions[-1][0])) or "" for key, versions in known.items() if versions}


def _rewards(connection: Connection, ids: Sequence[str]) -> dict[str, float]:
    """Map rollouts to the reward that was given last, whenever it arrived; to one of a call if there is no other."""
    given_last = (
        spans.c.response_id.is_not(None),
        spans.c.end_time.desc().nulls_last(),
        spans.c.sequence_id.desc(),
        spans.c.reward.desc(),
    )
    rank = func.row_number().over(partition_by=spans.c.rollout_id, order_by=given_last).label("rank")
    has_one = and_(spans.c.reward.is_not(None), spans.c.rollout_id.in_(ids))
    ranked = select(spans.c.rollout_id, spans.c.reward, rank).where(has_one).subquery()
    query = select(ranked.c.rollout_id, ranked.c.reward).where(ranked.c.rank == 1)
    return {row.rollout_id: row.reward for row in connection.execute(query)}


def task_of(written: str) -> str:
    """Shorten an input, given as JSON, to what tells a reader which task it is."""
    if len(written) > LARGEST_INPUT:
        return _shortened(written[:TASK_LENGTH], is_cut=True)
    value = _parsed(written)
    for _ in range(4):
        if isinstance(value, Mapping):
            value = _named(value)
        elif isinstance(value, list) and value and isinstance(value[-1], Mapping):
            value = next(
                (each for each in reversed(value) if isinstance(each, Mapping) and each.get("role") == "user"),
                value[-1],
            )
        else:
            break
    return _shortened(
        value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    )


def _named(value: Mapping[str, Any]) -> Any:
    """Return what an object has under a name of a task; the only value it has; or else the object as JSON."""
    for name in (*TASK_NAMES, "messages", "content"):
        if value.get(name):
            return value[name]
    only = [*value.values()]
    return only[0] if len(only) == 1 and isinstance(only[0], str) else json.dumps(value, ensure_ascii=False)


def _shortened(text: str, *, is_cut: bool = False) -> str:
    words = " ".join(text[: 4 * TASK_LENGTH].split())
    is_cut = is_cut or len(text) > 4 * TASK_LENGTH or len(words) > TASK_LENGTH
    return f"{words[:TASK_LENGTH]}…" if is_cut else words


def _parsed(written: str) -> Any:
    """Parse JSON; what is none is a text, so that one odd rollout does not keep all others from being counted."""
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return written


def _step(metadata: Any) -> str | None:
    step = metadata.get("step") if isinstance(metadata, dict) else None
    return None if step is None or isinstance(step, (dict, list)) else storable(str(step)[:TAG_LENGTH])


def _tags(metadata: Any) -> str:
    if not isinstance(metadata, dict):
        return ""
    scalars = [
        (name, value) for name, value in metadata.items() if not isinstance(value, (dict, list)) and value is not None
    ]
    lines = [
        f"{' '.join(str(name).split())}={' '.join(_text(value).split())}"[:TAG_LENGTH] for name, value in scalars[:TAGS]
    ]
    return "\n".join(["", *lines, ""]) if lines else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
