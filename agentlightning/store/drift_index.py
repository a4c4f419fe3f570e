"""The index of drift: what the page and the metrics know of it, without comparing all rollouts each time.

A rollout is compared when somebody looks, and anew when it has more calls. So it costs nothing where nobody does.
Comparing needs no transaction: `store.drift` has it. The caller owns the transaction of what is here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, func, select

from agentlightning.drift import CAUSES, MEANT, AttemptDrift, Cause
from agentlightning.store import rows, tables, texts
from agentlightning.store.database import in_parts, insert_rows, is_single_writer, run

__all__ = ["CauseCount", "Changed", "State", "changed", "counts", "has_compared", "put", "state_of", "totals"]

CALLS_AT_ONCE = 2_000
# In PostgreSQL a transaction may commit rows whose keys are lower than those that were seen.
KEYS_LOOKED_AT_AGAIN = 1_000

NAMES = ("model", "agent_id")
MOST_NAMES = 100
_GENERATIONS, _BREAKS, _DRIFTS = tables.generations.c, tables.breaks.c, tables.drifts.c
_ADD = """
    INSERT INTO drift_totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET count = drift_totals.count + excluded.count
"""
# Another look may have seen more; and a deletion may have freed keys, which SQLite gives to new calls.
_SEE = """
    UPDATE drift_totals SET count = (SELECT coalesce(max(key), 0) FROM generations WHERE key <= ?)
    WHERE name = 'seen' AND count < (SELECT coalesce(max(key), 0) FROM generations WHERE key <= ?)
"""
_SAMPLED = "SELECT coalesce(sum(kept), 0), coalesce(sum(lost), 0) FROM drifts"

_COUNTS = """
    SELECT cause, (finished_at - CAST(? AS BIGINT)) / CAST(? AS BIGINT), count(*),
    sum(CASE WHEN is_certain THEN 1 ELSE 0 END) FROM breaks WHERE {} GROUP BY 1, 2
"""
_LATEST = "SELECT rollout_id FROM breaks WHERE {} AND cause = ? ORDER BY finished_at DESC LIMIT 1"


@dataclass(frozen=True, slots=True)
class Changed:
    """Rollouts that have more calls than were compared.

    Attributes:
        rollouts: their ids.
        seen: the key of the last generation that was looked at; None where it is the same as before.
        is_all: whether no other has calls that were not looked at.
    """

    rollouts: Sequence[str]
    seen: int | None
    is_all: bool


class State(NamedTuple):
    """Progress of a rollout: the number of its calls, and when the last one finished."""

    calls: int
    finished_at: int


@dataclass(frozen=True, slots=True)
class CauseCount:
    """The number of prompts that a cause broke in a time.

    Attributes:
        bars: in each part of the time, the last one last.
        latest: the id of the rollout that it broke last.
    """

    cause: Cause
    count: int
    certain: int
    bars: Sequence[int]
    latest: str


def changed(connection: Connection) -> Changed:
    """Find rollouts to compare: those of calls that were not seen."""
    query = select(tables.drift_totals.c["count"]).where(tables.drift_totals.c.name == "seen")
    before = connection.execute(query).scalar() or 0
    again = 0 if is_single_writer(connection) else KEYS_LOOKED_AT_AGAIN
    calls = select(_GENERATIONS.key, _GENERATIONS.rollout_key).where(_GENERATIONS.key > before - again)
    found = connection.execute(calls.order_by(_GENERATIONS.key).limit(CALLS_AT_ONCE + again)).all()
    keys = [*dict.fromkeys(row.rollout_key for row in found if row.rollout_key is not None)]
    known = texts.texts_of(connection, set(keys))
    ids = {key: known[key] or "" for key in keys}
    now = dict(_counted_by(connection, _GENERATIONS.rollout_key, func.count(), keys))
    compared = dict(
        _counted_by(connection, _DRIFTS.rollout_id, func.max(_DRIFTS.calls), map(rows.storable, ids.values()))
    )
    rollouts = [rollout_id for key, rollout_id in ids.items() if now[key] > compared.get(rows.storable(rollout_id), 0)]
    seen = found[-1].key if found and found[-1].key > before else None
    return Changed(rollouts, seen, is_all=len(found) < CALLS_AT_ONCE + again)


def _counted_by(
    connection: Connection, column: Any, count: ColumnElement[int], wanted: Iterable[Any]
) -> Iterator[tuple[Any, int]]:
    for some in in_parts([*wanted]):
        for row in connection.execute(select(column, count).where(column.in_(some)).group_by(column)):
            yield row[0], row[1]


def put(connection: Connection, rollout_id: str, calls: int, attempts: Sequence[AttemptDrift] | None) -> None:
    """Store the drift of a rollout with so many calls, and add what is new in it to the totals.

    Args:
        attempts: None where its calls cannot be compared.
    """
    # Locks the row: what another server adds meanwhile would be counted twice.
    run(connection, _ADD, ("seen", 0))
    stored = rows.storable(rollout_id) or ""
    compared = run(connection, "SELECT calls FROM drifts WHERE rollout_id = ?", (stored,)).scalar()
    if (compared is not None and compared >= calls) or not state_of(connection, rollout_id).calls:
        # Another look was faster, or the rollout was deleted meanwhile.
        return
    found = attempts or ()
    # A cause that is found no more stays counted.
    grown = _causes(found) - _causes_before(connection, stored)
    for table in ("drifts", "breaks"):
        run(connection, f"DELETE FROM {table} WHERE rollout_id = ?", (stored,))
    broken = None if attempts is None else sum(each.cause not in MEANT for one in found for each in one.breaks)
    sampled = sum(each.kept for each in found), sum(each.lost for each in found)
    insert_rows(connection, tables.drifts, [(stored, calls, broken, *sampled)], if_new=True)
    insert_rows(connection, tables.breaks, [*_rows(stored, found)], if_new=True)
    for cause, count in grown.items():
        run(connection, _ADD, (cause, count))


def state_of(connection: Connection, rollout_id: str) -> State:
    """Return how far a rollout is."""
    query = "SELECT count(*), coalesce(max(finished_at), 0) FROM generations WHERE rollout_key = ?"
    return State(*map(int, run(connection, query, (texts.key_of(connection, rollout_id),)).one()))


def has_compared(connection: Connection, seen: int) -> None:
    """Note that the rollouts of all calls up to a key are compared."""
    run(connection, _ADD, ("seen", 0))
    run(connection, _SEE, (seen, seen))


def _rows(rollout_id: str, attempts: Sequence[AttemptDrift]) -> Iterator[tuple[object, ...]]:
    found = {each.generation_id: each for attempt in attempts for each in attempt.breaks}
    for each in found.values():
        generation_id = rows.uuid_bytes(each.generation_id)
        names = rows.storable(each.model), rows.storable(each.agent_id)
        yield rollout_id, generation_id, each.cause, each.is_certain, each.finished_at, *names


def _causes(attempts: Sequence[AttemptDrift]) -> Counter[str]:
    return Counter(each.cause for attempt in attempts for each in attempt.breaks)


def _causes_before(connection: Connection, rollout_id: str) -> Counter[str]:
    by_cause = select(_BREAKS.cause, func.count()).where(_BREAKS.rollout_id == rollout_id).group_by(_BREAKS.cause)
    return Counter({row[0]: row[1] for row in connection.execute(by_cause)})


def totals(connection: Connection) -> dict[str, int]:
    """Return how often each cause broke a prompt since the store is there, and the sampled ids `kept` and `lost`.

    These are of the rollouts that are stored: what was lost may be kept once more calls have come.
    """
    found: dict[str, int] = dict(map(tuple, connection.execute(select(*tables.drift_totals.c))))
    sampled = [*map(int, run(connection, _SAMPLED, ()).one())]
    return {**{cause: found.get(cause, 0) for cause in CAUSES}, "kept": sampled[0], "lost": sampled[1]}


def counts(
    connection: Connection, since: int, until: int, parts: int, **only: str
) -> tuple[list[CauseCount], dict[str, list[str]]]:
    """Count breaks by cause, and list the models and agents that have any, by the names of their columns.

    Args:
        since, until: when the calls finished, in nanoseconds since the epoch.
        parts: number of equal parts of that time.
        only: breaks of calls with this `model` or `agent_id` alone.
    """
    length = max(-(-(until - since) // parts), 1)
    which: str
    values: tuple[Any, ...]
    which, values = "finished_at >= ? AND finished_at < ?", (since, until)
    for column in NAMES:
        if column in only:
            which, values = f"{which} AND {column} = ?", (*values, rows.storable(only[column]) or "")
    bars: defaultdict[str, list[int]] = defaultdict(lambda: [0] * parts)
    certain: Counter[str] = Counter()
    for cause, part, count, sure in map(tuple, run(connection, _COUNTS.format(which), (since, length, *values))):
        bars[cause][part] += count
        certain[cause] += sure
    latest = {
        cause: rows.text_of(run(connection, _LATEST.format(which), (*values, cause)).scalar_one()) for cause in bars
    }
    found = [
        CauseCount(cause, sum(bars[cause]), certain[cause], bars[cause], latest[cause])
        for cause in CAUSES
        if cause in bars
    ]
    return found, {column: [*_names(connection, column)] for column in NAMES}


def _names(connection: Connection, column: str) -> Iterator[str]:
    query = f"SELECT DISTINCT {column} FROM breaks WHERE {column} IS NOT NULL ORDER BY {column} LIMIT {MOST_NAMES}"
    yield from map(rows.text_of, run(connection, query, ()).scalars())
