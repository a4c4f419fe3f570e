"""The index of drift: what the page and the metrics know of it, without comparing all rollouts each time.

A rollout is compared when somebody looks, and anew when it has more calls. So it costs nothing where nobody does, and
whoever looks often has it in time. The caller owns the transaction.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from agentlightning.drift import CAUSES, MEANT, AttemptDrift, Cause
from agentlightning.store import drift, rows, tables, texts
from agentlightning.store.database import insert_rows, is_single_writer, run

__all__ = ["CauseCount", "Compared", "compare", "counts", "put", "totals"]

CALLS_AT_ONCE = 2_000
# In PostgreSQL a transaction may commit rows whose keys are lower than those that were seen.
KEYS_LOOKED_AT_AGAIN = 1_000

NAMES = ("model", "agent_id")
MOST_NAMES = 100
_GENERATIONS, _BREAKS = tables.generations.c, tables.breaks.c
_PUT_TOTAL = """
    INSERT INTO drift_totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET count = {}
"""
_ADD = _PUT_TOTAL.format("drift_totals.count + excluded.count")
_SET = _PUT_TOTAL.format("excluded.count")

_COUNTS = """
    SELECT cause, (finished_at - CAST(? AS BIGINT)) / CAST(? AS BIGINT), count(*),
    sum(CASE WHEN is_certain THEN 1 ELSE 0 END) FROM breaks WHERE {} GROUP BY 1, 2
"""
_LATEST = "SELECT rollout_id FROM breaks WHERE {} AND cause = ? ORDER BY finished_at DESC LIMIT 1"


@dataclass(frozen=True, slots=True)
class Compared:
    """Rollouts that were compared.

    Attributes:
        rollouts: of each its id, the number of its calls, and its attempts.
        seen: the key of the last generation that was looked at; None where it is the same as before.
        is_all: whether no other has calls that were not looked at.
    """

    rollouts: Sequence[tuple[str, int, Sequence[AttemptDrift]]]
    seen: int | None
    is_all: bool


@dataclass(frozen=True, slots=True)
class CauseCount:
    """How often a cause broke prompts in a time.

    Attributes:
        bars: in each part of the time, the last one last.
        latest: the id of the rollout that it broke last.
    """

    cause: Cause
    count: int
    certain: int
    bars: Sequence[int]
    latest: str


def compare(connection: Connection, seconds: float) -> Compared:
    """Compare the rollouts that have new calls, for so many seconds at most, but one in any case."""
    ends = time.monotonic() + seconds
    query = select(tables.drift_totals.c["count"]).where(tables.drift_totals.c.name == "seen")
    before = connection.execute(query).scalar() or 0
    again = 0 if is_single_writer(connection) else KEYS_LOOKED_AT_AGAIN
    calls = select(_GENERATIONS.key, _GENERATIONS.rollout_key).where(_GENERATIONS.key > before - again)
    found = connection.execute(calls.order_by(_GENERATIONS.key).limit(CALLS_AT_ONCE)).all()
    first: dict[int, int] = {}
    for row in found:
        if row.rollout_key is not None:
            first.setdefault(row.rollout_key, row.key)
    known = texts.texts_of(connection, set(first))
    compared: list[tuple[str, int, Sequence[AttemptDrift]]] = []
    for rollout_key in first:
        if compared and time.monotonic() >= ends:
            # Of the others the first call stays unseen.
            return Compared(compared, _moved(before, first[rollout_key] - 1), is_all=False)
        rollout_id = known[rollout_key] or ""
        count = select(func.count()).select_from(tables.generations).where(_GENERATIONS.rollout_key == rollout_key)
        calls_now = connection.execute(count).scalar_one()
        if calls_now != _calls_compared(connection, rollout_id):
            compared.append((rollout_id, calls_now, [*drift.analyse_all(drift.read(connection, rollout_id))]))
    return Compared(compared, _moved(before, found[-1].key if found else 0), is_all=len(found) < CALLS_AT_ONCE)


def _moved(before: int, seen: int) -> int | None:
    return seen if seen > before else None


def _calls_compared(connection: Connection, rollout_id: str) -> int | None:
    values = (rows.storable(rollout_id),)
    return run(connection, "SELECT calls FROM drifts WHERE rollout_id = ?", values).scalar()


def put(connection: Connection, compared: Compared) -> None:
    """Store what was compared, and add what is new in it to the totals."""
    # Locks the row: what another server adds meanwhile would be counted twice.
    run(connection, _ADD, ("seen", 0))
    grown: Counter[str] = Counter()
    for rollout_id, calls, attempts in compared.rollouts:
        stored = rows.storable(rollout_id) or ""
        # Positive differences alone: what was lost may turn out to be kept.
        grown += _counted(attempts) - _counted_before(connection, stored)
        for table in ("drifts", "breaks"):
            run(connection, f"DELETE FROM {table} WHERE rollout_id = ?", (stored,))
        broken = sum(each.cause not in MEANT for attempt in attempts for each in attempt.breaks)
        sampled = sum(each.kept for each in attempts), sum(each.lost for each in attempts)
        insert_rows(connection, tables.drifts, [(stored, calls, broken, *sampled)], if_new=True)
        insert_rows(connection, tables.breaks, [*_rows(stored, attempts)], if_new=True)
    for name, count in grown.items():
        run(connection, _ADD, (name, count))
    if compared.seen is not None:
        run(connection, _SET, ("seen", compared.seen))


def _rows(rollout_id: str, attempts: Sequence[AttemptDrift]) -> Iterator[tuple[object, ...]]:
    found = {each.generation_id: each for attempt in attempts for each in attempt.breaks}
    for each in found.values():
        generation_id = rows.uuid_bytes(each.generation_id)
        names = rows.storable(each.model), rows.storable(each.agent_id)
        yield rollout_id, generation_id, each.cause, each.is_certain, each.finished_at, *names


def _counted(attempts: Sequence[AttemptDrift]) -> Counter[str]:
    found: Counter[str] = Counter(each.cause for attempt in attempts for each in attempt.breaks)
    found["kept"] = sum(each.kept for each in attempts)
    found["lost"] = sum(each.lost for each in attempts)
    return found


def _counted_before(connection: Connection, rollout_id: str) -> Counter[str]:
    by_cause = select(_BREAKS.cause, func.count()).where(_BREAKS.rollout_id == rollout_id).group_by(_BREAKS.cause)
    found: Counter[str] = Counter({row[0]: row[1] for row in connection.execute(by_cause)})
    row = run(connection, "SELECT kept, lost FROM drifts WHERE rollout_id = ?", (rollout_id,)).first()
    found["kept"], found["lost"] = (0, 0) if row is None else (row.kept, row.lost)
    return found


def totals(connection: Connection) -> dict[str, int]:
    """Return how often each cause broke a prompt since the store is there, and the sampled ids `kept` and `lost`."""
    found: dict[str, int] = dict(map(tuple, connection.execute(select(*tables.drift_totals.c))))
    return {name: found.get(name, 0) for name in (*CAUSES, "kept", "lost")}


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
