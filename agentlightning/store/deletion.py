"""Rollouts deleted, with all that belongs to them alone: in parts, each a short transaction.

Writers go on meanwhile. A process that is killed in between has deleted a part of a rollout at most, and its rollout is
there until the rest is gone, so that deleting it again finishes.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection

from agentlightning.errors import RolloutUnderWay
from agentlightning.rollout_records import FINISHED, RolloutStatus
from agentlightning.store import changes, lifecycle, rollouts, summaries, texts
from agentlightning.store.database import Database, fetch, in_parts, is_single_writer, run
from agentlightning.store.rows import storable, text_of
from agentlightning.store.stale import mark_calls
from agentlightning.store.unused import delete_keys, sweep, unused_blocks

__all__ = ["ESTIMATED", "KINDS", "Selection", "check", "delete", "estimate", "finish", "select"]

KINDS = ("rollouts", "attempts", "generations", "spans", "uploads", "blocks", "texts", "senders", "vocabularies")
"""The kinds of records that are counted, besides `bytes`."""
ESTIMATED = KINDS[:6]
"""Kinds that `estimate` counts."""

SECONDS_AT_ONCE = 0.1
"""Longest work of a transaction, except for the last part in it."""
SECONDS_BETWEEN = 0.11
"""Pause after a transaction in SQLite, whose waiting writers try again every 0.1 s (from its source)."""
GENERATIONS_AT_ONCE = 16
SPANS_AT_ONCE = 200
KEYS_AT_ONCE = 1_000
SECOND = 10**9

Part = Callable[[Connection], tuple[Counter[str], bool]]
"""Work in a transaction: what it has deleted, and whether nothing is left to do."""

# Bytes of a row and of its entries in indexes, besides its ids, texts and the like; measured in a file.
OF_GENERATION, OF_CHOICE, OF_SPAN, OF_BLOCK, OF_ROLLOUT = 330, 20, 300, 70, 400

_GENERATIONS = """
    SELECT key, ids_block, text_block, coalesce(length(prompt_token_ids), 0) + coalesce(length(prompt_text), 0)
    + coalesce(length(prompt_logprobs), 0)
    FROM generations WHERE {}
"""
_CHOICES = """
    SELECT count(*), coalesce(sum(coalesce(length(token_ids), 0) + coalesce(length(logprobs), 0)
    + coalesce(length(text), 0) + coalesce(length(routed_experts), 0)
    + coalesce(length(sampling_mask), 0) + coalesce(length(top_logprobs), 0)), 0)
    FROM choices WHERE generation_key IN ({})
"""
_IS_UNASSIGNED = (
    "rollout_key IS NULL AND NOT EXISTS (SELECT 1 FROM spans WHERE spans.response_id = generations.response_id)"
)
_UNASSIGNED_CALLS = f"""
    SELECT key FROM generations WHERE key > ? AND finished_at < ? AND {_IS_UNASSIGNED} ORDER BY key LIMIT ?
"""
_UNASSIGNED_SPANS = """
    SELECT key FROM spans WHERE key > ? AND 1e9 * coalesce(end_time, start_time, 0) < ? AND rollout_id IS NULL
    ORDER BY key LIMIT ?
"""
_UNSEE = """
    UPDATE drift_totals SET count = (SELECT coalesce(max(key), 0) FROM generations)
    WHERE name = 'seen' AND count > (SELECT coalesce(max(key), 0) FROM generations)
"""
# Rollouts that calls name, one after the other: the index leads from each to the next.
_NEXT_RECORDED = "SELECT min(rollout_key) FROM generations WHERE rollout_key > ?"
_LAST_FINISHED = "SELECT max(finished_at) FROM generations WHERE rollout_key = ?"
_NEXT_WITH_SPANS = "SELECT min(rollout_id) FROM spans WHERE rollout_id > ?"
_LAST_SPAN = "SELECT max(coalesce(end_time, start_time, 0)) FROM spans WHERE rollout_id = ?"


@dataclass(frozen=True, slots=True)
class Selection:
    """Records to delete.

    Attributes:
        rollout_ids: those of rollouts, created or only recorded.
        before: seconds since the epoch: only what ended before then goes; None for any time.
        takes_unassigned: calls and spans that name no rollout go, too, if they are older.
    """

    rollout_ids: Sequence[str]
    before: float | None = None
    takes_unassigned: bool = False


def check(database: Database, rollout_ids: Sequence[str]) -> None:
    """Refuse rollouts that have not ended, once those whose time is up have.

    Raises:
        RolloutUnderWay: some have not ended.
    """
    if not database.is_read_only:
        database.write(lambda connection: lifecycle.expire(connection) if lifecycle.is_anything_due(connection) else [])
    with database.reading() as connection:
        states = rollouts.statuses(connection, [storable(each) or "" for each in rollout_ids])
    _refuse({text_of(each): status for each, (status, _) in states.items() if status not in FINISHED})


def select(
    database: Database,
    *,
    rollout_ids: Sequence[str] | None = None,
    statuses: Sequence[RolloutStatus] | None = None,
    before: float | None = None,
) -> Selection:
    """Find rollouts to delete: those that match all filters that are given.

    Args:
        rollout_ids: of rollouts in the queue, or that calls or spans name without one.
        statuses: the states of rollouts; those that are only recorded have none.
        before: seconds since the epoch: they ended before then, or their last call or span did.

    Raises:
        RolloutUnderWay: some of `rollout_ids` have not ended.
    """
    check(database, rollout_ids or ())
    with database.reading() as connection:
        found = [*_created(connection, rollout_ids, FINISHED if statuses is None else statuses, before)]
        if statuses is None:
            found += _only_recorded(connection, rollout_ids, before)
    return Selection(found, before, takes_unassigned=rollout_ids is None and statuses is None and before is not None)


def _refuse(states: dict[str, str]) -> None:
    if states:
        raise RolloutUnderWay(states)


def _created(
    connection: Connection, rollout_ids: Sequence[str] | None, statuses: Sequence[str], before: float | None
) -> Iterator[str]:
    if rollout_ids is not None:
        names = {storable(each) or "": each for each in rollout_ids}
        for stored, (status, end_time) in rollouts.statuses(connection, [*names]).items():
            if status in statuses and (before is None or (end_time or 0) < before):
                yield names[stored]
        return
    if not statuses:
        return
    query = f"SELECT rollout_id, end_time FROM rollouts WHERE status IN ({', '.join('?' * len(statuses))})"
    for rollout_id, end_time in fetch(connection, query, statuses):
        if before is None or (end_time or 0) < before:
            yield text_of(str(rollout_id))


def _only_recorded(connection: Connection, rollout_ids: Sequence[str] | None, before: float | None) -> list[str]:
    if rollout_ids is not None:
        named = [*dict.fromkeys(rollout_ids)]
    elif before is None:
        return []
    else:
        named = [*dict.fromkeys([*_named_by_calls(connection), *_named_by_spans(connection)])]
    created = rollouts.statuses(connection, [storable(each) or "" for each in named])
    others = [each for each in named if storable(each) not in created]
    return [each for each in others if _is_recorded(connection, each, before)]


def _is_recorded(connection: Connection, rollout_id: str, before: float | None) -> bool:
    """Tell whether calls or spans name a rollout, the last of them before a time."""
    key = texts.key_of(connection, rollout_id)
    call = None if key is None else run(connection, _LAST_FINISHED, (key,)).scalar()
    span = run(connection, _LAST_SPAN, (rollout_id,)).scalar() if _is_plain(rollout_id) else None
    ended = [each for each in (None if call is None else call / SECOND, span) if each is not None]
    return bool(ended) and (before is None or max(ended) < before)


def _named_by_calls(connection: Connection) -> Iterator[str]:
    key = -1
    while (key := run(connection, _NEXT_RECORDED, (key,)).scalar()) is not None:
        yield texts.texts_of(connection, [key])[key] or ""


def _named_by_spans(connection: Connection) -> Iterator[str]:
    found = run(connection, "SELECT min(rollout_id) FROM spans WHERE rollout_id IS NOT NULL", ()).scalar()
    while found is not None:
        yield found
        found = run(connection, _NEXT_WITH_SPANS, (found,)).scalar()


def _is_plain(rollout_id: str) -> bool:
    """Tell whether spans can have this id: theirs are not encoded."""
    return "\0" not in rollout_id and rollout_id.encode(errors="replace").decode() == rollout_id


def delete(database: Database, selection: Selection) -> Iterator[Counter[str]]:
    """Delete rollouts that have ended, with their attempts, generations and spans, and what belongs to these alone.

    Yields:
        After each transaction what it has deleted, by kind.

    Raises:
        RolloutUnderWay: some run again since they were selected; all others are deleted.
    """
    under_way: dict[str, str] = {}
    before = selection.before
    yield from _in_transactions(
        database, [partial(_delete_some, each, before, under_way) for each in selection.rollout_ids]
    )
    if selection.takes_unassigned:
        moment = int((before or 0) * SECOND)
        for query, delete_these in ((_UNASSIGNED_CALLS, _delete_calls), (_UNASSIGNED_SPANS, _delete_lone_spans)):
            for keys in _keys(database, query, moment):
                yield from _in_transactions(database, [partial(delete_these, keys, moment)])
    _refuse(under_way)


def _in_transactions(database: Database, work: Iterable[Part]) -> Iterator[Counter[str]]:
    """Do work that may have to be repeated, as much in a transaction as its time allows."""
    parts = deque(work)
    while parts:
        deleted = Counter[str]()
        with database.writing(alone=True) as connection:
            ends = time.monotonic() + SECONDS_AT_ONCE
            done = 0
            while done < len(parts) and time.monotonic() < ends:
                some, is_done = parts[done](connection)
                deleted.update(some)
                done += is_done
            if deleted:
                changes.note_deletion(connection)
            waits = is_single_writer(connection)
        for _ in range(done):
            parts.popleft()
        yield deleted
        if waits and parts:
            time.sleep(SECONDS_BETWEEN)


def _keys(database: Database, query: str, before: int) -> Iterator[list[int]]:
    """Find keys in transactions that only read, in ascending order."""
    last = 0
    while True:
        with database.reading() as connection:
            found = run(connection, query, (last, before, KEYS_AT_ONCE)).scalars().all()
        if not found:
            return
        yield [*found]
        last = found[-1]


def finish(database: Database) -> Iterator[Counter[str]]:
    """Delete what nothing refers to, and return the space to the file system. Yields as `sweep` does."""
    for deleted in sweep(database):
        yield deleted
        if deleted:
            time.sleep(SECONDS_BETWEEN)
    for _ in database.shrink():
        yield Counter()
        time.sleep(SECONDS_BETWEEN)


def _delete_some(
    rollout_id: str, before: float | None, under_way: dict[str, str], connection: Connection
) -> tuple[Counter[str], bool]:
    """Delete a part of a rollout, which includes the rollout itself only if nothing else is left."""
    stored = storable(rollout_id) or ""
    row = rollouts.find_to_change(connection, [stored]).get(stored)
    if row is None and before is not None and not _is_recorded(connection, rollout_id, before):
        # Its id is in use again, or all of it is gone.
        return Counter(), True
    if row is not None and row.status not in FINISHED:
        under_way[rollout_id] = row.status
        return Counter(), True
    key = texts.key_of(connection, rollout_id)
    if key is not None:
        deleted = _delete_generations(connection, "rollout_key = ? LIMIT ?", (key, GENERATIONS_AT_ONCE))
        if deleted["generations"] == GENERATIONS_AT_ONCE:
            mark_calls(connection, [rollout_id], [])
            return deleted, False
    else:
        deleted = Counter[str]()
    if _is_plain(rollout_id):
        deleted += _delete_spans(connection, "rollout_id = ? LIMIT ?", (rollout_id, SPANS_AT_ONCE))
        if deleted["spans"] == SPANS_AT_ONCE:
            return deleted, False
        run(connection, "DELETE FROM span_sequences WHERE rollout_id = ?", (rollout_id,))
    for table in ("lost_calls", "drifts", "breaks"):
        run(connection, f"DELETE FROM {table} WHERE rollout_id = ?", (storable(rollout_id),))
    if row is not None:
        deleted["attempts"] += run(connection, "DELETE FROM attempts WHERE rollout_key = ?", (row.key,)).rowcount
        deleted["bytes"] += OF_ROLLOUT + len(row.input)
        run(connection, "DELETE FROM rollouts WHERE key = ?", (row.key,))
    # At once, not when somebody looks: it has the beginning of the task.
    summaries.forget(connection, storable(rollout_id) or "")
    deleted["rollouts"] += 1
    return deleted, True


def _delete_calls(keys: list[int], before: int, connection: Connection) -> tuple[Counter[str], bool]:
    """Delete some of these calls, which name no rollout, unless a span names them since.

    Their age is looked at again: SQLite gives the keys of deleted rows to new ones.
    """
    some = [keys.pop() for _ in range(min(len(keys), GENERATIONS_AT_ONCE))]
    which = f"key IN ({', '.join('?' * len(some))}) AND finished_at < ? AND {_IS_UNASSIGNED}"
    mark_calls(connection, [None], [])
    return _delete_generations(connection, which, [*some, before]), not keys


def _delete_lone_spans(keys: list[int], before: int, connection: Connection) -> tuple[Counter[str], bool]:
    """Delete some of these spans, unless they have a rollout since, or their key is that of a newer one."""
    some = [keys.pop() for _ in range(min(len(keys), SPANS_AT_ONCE))]
    is_old = "1e9 * coalesce(end_time, start_time, 0) < ?"
    which = f"key IN ({', '.join('?' * len(some))}) AND {is_old} AND rollout_id IS NULL"
    return _delete_spans(connection, which, [*some, before]), not keys


def _delete_generations(connection: Connection, which: str, values: Sequence[Any]) -> Counter[str]:
    found = fetch(connection, _GENERATIONS.format(which), values)
    keys = [row[0] for row in found]
    deleted = _counted(connection, keys, found)
    delete_keys(connection, "choices", keys, "generation_key")
    delete_keys(connection, "generations", keys)
    # The next generation may have the key of one that was deleted.
    run(connection, _UNSEE, ())
    gone = unused_blocks(connection, _last_blocks(found))
    delete_keys(connection, "blocks", gone)
    return deleted + Counter(blocks=len(gone), bytes=sum(OF_BLOCK + use.size for use in gone.values()))


def _last_blocks(found: Iterable[Any]) -> Iterator[int]:
    return (key for row in found for key in (row.ids_block, row.text_block) if key is not None)


def _counted(connection: Connection, keys: Sequence[int], found: Sequence[Any]) -> Counter[str]:
    """Count generations, and the bytes that they and their choices take besides their blocks."""
    counted = Counter(generations=len(keys), bytes=sum(OF_GENERATION + row[3] for row in found))
    for some in in_parts(keys):
        [(choices, size)] = fetch(connection, _CHOICES.format(", ".join("?" * len(some))), some)
        counted["bytes"] += choices * OF_CHOICE + int(size)
    return counted


def _delete_spans(connection: Connection, which: str, values: Sequence[Any]) -> Counter[str]:
    """Delete spans, with what only they refer to: uploads and sessions of their traces, and unassigned calls."""
    query = f"SELECT key, trace_id, response_id, length(body) FROM spans WHERE {which}"
    found = fetch(connection, query, values)
    delete_keys(connection, "spans", [row.key for row in found])
    deleted = Counter(spans=len(found), bytes=sum(OF_SPAN + row[3] for row in found))
    for response_id in {row.response_id for row in found if row.response_id is not None}:
        if not run(connection, "SELECT 1 FROM spans WHERE response_id = ? LIMIT 1", (response_id,)).first():
            which = "response_id = ? AND rollout_key IS NULL"
            deleted += _delete_generations(connection, which, (response_id,))
    for trace_id in {row.trace_id for row in found}:
        if not run(connection, "SELECT 1 FROM spans WHERE trace_id = ? LIMIT 1", (trace_id,)).first():
            run(connection, "DELETE FROM sessions WHERE trace_id = ?", (trace_id,))
            size = "SELECT coalesce(sum(length(body)), 0) FROM uploads WHERE trace_id = ?"
            deleted["bytes"] += int(run(connection, size, (trace_id,)).scalar_one())
            deleted["uploads"] += run(connection, "DELETE FROM uploads WHERE trace_id = ?", (trace_id,)).rowcount
    return deleted


def estimate(database: Database, selection: Selection) -> Iterator[Counter[str]]:
    """Count what `delete` would delete, and about how many bytes that takes; texts are not counted.

    Yields:
        After each rollout what was counted so far; blocks are in the last one, which has all.
    """
    counted = Counter[str]()
    going = Counter[int]()

    def add_generations(connection: Connection, which: str, values: Sequence[Any]) -> None:
        found = fetch(connection, _GENERATIONS.format(which), values)
        going.update(_last_blocks(found))
        counted.update(_counted(connection, [row[0] for row in found], found))

    for rollout_id in selection.rollout_ids:
        counted["rollouts"] += 1
        with database.reading() as connection:
            key = texts.key_of(connection, rollout_id)
            if key is not None:
                add_generations(connection, "rollout_key = ?", (key,))
            counted.update(_attempts_and_spans(connection, rollout_id))
            if _is_plain(rollout_id):
                named = "SELECT response_id FROM spans WHERE rollout_id = ? AND response_id IS NOT NULL"
                add_generations(connection, f"rollout_key IS NULL AND response_id IN ({named})", (rollout_id,))
        yield counted
    if selection.takes_unassigned:
        moment = int((selection.before or 0) * SECOND)
        for keys in _keys(database, _UNASSIGNED_CALLS, moment):
            for some in in_parts(keys):
                with database.reading() as connection:
                    add_generations(connection, f"key IN ({', '.join('?' * len(some))})", some)
        for keys in _keys(database, _UNASSIGNED_SPANS, moment):
            counted["spans"] += len(keys)
    with database.reading() as connection:
        gone = unused_blocks(connection, going, going)
    counted.update(blocks=len(gone), bytes=sum(OF_BLOCK + use.size for use in gone.values()))
    yield counted


def _attempts_and_spans(connection: Connection, rollout_id: str) -> Counter[str]:
    counted = Counter[str]()
    row = rollouts.find(connection, storable(rollout_id) or "")
    if row is not None:
        attempts = "SELECT count(*) FROM attempts WHERE rollout_key = ?"
        counted.update(attempts=run(connection, attempts, (row.key,)).scalar_one(), bytes=OF_ROLLOUT + len(row.input))
    if _is_plain(rollout_id):
        for table, which in (
            ("spans", "rollout_id = ?"),
            ("uploads", "trace_id IN (SELECT trace_id FROM spans WHERE rollout_id = ?)"),
        ):
            query = f"SELECT count(*), coalesce(sum(length(body)), 0) FROM {table} WHERE {which}"
            [(count, size)] = fetch(connection, query, (rollout_id,))
            counted.update({table: count, "bytes": int(size) + (OF_SPAN * count if table == "spans" else 0)})
    return counted
