"""The life of a rollout: queued, taken, attempted, timed out, retried and ended, as Agent Lightning 0.3 defines it.

What many ask for at once is done for all of them by the same statements: a database at the other end of a network takes
as long for one row as for a hundred. The caller owns the transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

from sqlalchemy import Connection, Integer, and_, bindparam, insert, select, update

from agentlightning.errors import InvalidRecord, NotFound
from agentlightning.generation import new_id
from agentlightning.rollout_records import (
    ATTEMPT_STATUSES,
    FINISHED,
    MODES,
    ROLLOUT_STATUSES,
    NewRollout,
    RolloutConfig,
    RolloutStatus,
)
from agentlightning.sampling import pins_for
from agentlightning.store import resources, workers
from agentlightning.store.changes import next_change
from agentlightning.store.database import earliest_deadline, next_keys, now, pipelined
from agentlightning.store.documents import to_json
from agentlightning.store.rollouts import config_of, find_known, find_to_change
from agentlightning.store.tables import attempts, rollouts

__all__ = [
    "AttemptChange",
    "Dequeue",
    "Start",
    "dequeue",
    "dequeue_all",
    "enqueue",
    "expire",
    "heartbeat",
    "heartbeats",
    "is_anything_due",
    "start",
    "start_all",
    "start_attempt",
    "update_attempt",
    "update_attempts",
    "update_rollout",
]

QUEUED = ("queuing", "requeuing")
UNDER_WAY = ("preparing", "running")
MICROSECONDS = 1_000_000

# Made once: SQLAlchemy takes longer to build a statement than SQLite takes to execute it. No parameter has the name of
# a column: SQLAlchemy would take it for a value to set.
_CHANGE_ROLLOUT = update(rollouts).where(rollouts.c.key == bindparam("of_key")).values(changed=next_change())
_IS = and_(attempts.c.rollout_key == bindparam("of_rollout"), attempts.c.sequence_id == bindparam("number"))
_CHANGE_ATTEMPT = update(attempts).where(_IS)
_NEW_ROLLOUTS, _NEW_ATTEMPTS = insert(rollouts).values(changed=next_change()), insert(attempts)
_WAITING = (
    select(rollouts)
    .where(rollouts.c.queued_at.is_not(None))
    .order_by(rollouts.c.queued_at, rollouts.c.key)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)


class Start(NamedTuple):
    """A rollout that is run at once, and the worker that runs it."""

    rollout: NewRollout
    worker_id: str | None = None


class Dequeue(NamedTuple):
    """The number of rollouts that a worker takes."""

    limit: int
    worker_id: str | None = None


class AttemptChange(NamedTuple):
    """A change of an attempt.

    Attributes:
        attempt_id: `latest` stands for the latest.
        changes: by name: `status`, `worker_id`, `last_heartbeat_time`, `metadata`.
    """

    rollout_id: str
    attempt_id: str
    changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """An attempt's row."""

    rollout_key: int
    sequence_id: int
    attempt_id: str
    start_time: float
    end_time: float | None
    status: str
    worker_id: str | None
    last_heartbeat_time: float | None
    metadata: str | None
    deadline: float | None


_COLUMNS = tuple(_Attempt.__dataclass_fields__)
_CHANGING = ("end_time", "status", "worker_id", "last_heartbeat_time", "metadata", "deadline")


def start(connection: Connection, new: NewRollout, worker_id: str | None) -> str:
    """Create a rollout that is run at once, with its first attempt; returns its id."""
    [row] = start_all(connection, [Start(new, worker_id)])
    return row.rollout_id


def start_all(connection: Connection, wanted: Sequence[Start]) -> list[Any]:
    """Create rollouts that are run at once, each with its first attempt; returns rows as `rollouts.find` does."""
    at = now(connection)
    made = _rows(connection, [each.rollout for each in wanted], "preparing", at, attempts_made=1)
    of_each = [
        _new_attempt(row["key"], 1, each.worker_id, at, _deadline(each.rollout.config, at, None))
        for each, row in zip(wanted, made, strict=True)
    ]
    found = [_with_attempt(row, attempt) for row, attempt in zip(made, of_each, strict=True)]
    with pipelined(connection):
        _execute(connection, _NEW_ROLLOUTS, made)
        _insert_attempts(connection, found, of_each, at)
    return found


def enqueue(connection: Connection, new: Sequence[NewRollout]) -> list[str]:
    """Append rollouts to the queue, in this order; returns their ids."""
    at = now(connection)
    made = _rows(connection, new, "queuing", at, queued_at=_nanoseconds(at))
    _execute(connection, _NEW_ROLLOUTS, made)
    return [row["rollout_id"] for row in made]


def dequeue(connection: Connection, limit: int, worker_id: str | None) -> list[Any]:
    """Take the rollouts that have been queued longest, each with a new attempt; returns their rows."""
    return dequeue_all(connection, [Dequeue(limit, worker_id)])[0]


def dequeue_all(connection: Connection, wanted: Sequence[Dequeue]) -> list[list[Any]]:
    """Take the rollouts that have been queued longest, for each worker as many as it takes."""
    most = sum(max(each.limit, 0) for each in wanted)
    left = iter(connection.execute(_WAITING, {"most": most}).all() if most else ())
    at = now(connection)
    shares = [[*islice(left, max(each.limit, 0))] for each in wanted]
    idle = {each.worker_id for each, rows in zip(wanted, shares, strict=True) if each.worker_id and not rows}
    without_work = {"last_dequeue_time": at, **workers.idle(at)}
    workers.note_all(connection, dict.fromkeys(idle, without_work), stay_idle=True)
    taken = [(row, each.worker_id) for each, rows in zip(wanted, shares, strict=True) for row in rows]
    begun = iter(_begin_attempts(connection, taken, at, last_dequeue_time=at))
    return [[*islice(begun, len(rows))] for rows in shares]


def start_attempt(connection: Connection, rollout_id: str, worker_id: str | None) -> None:
    """Create one more attempt, whatever the state of those before.

    Raises:
        NotFound: no such rollout.
    """
    _begin_attempts(connection, [(find_known(connection, rollout_id), worker_id)], now(connection))


def update_rollout(connection: Connection, rollout_id: str, changes: Mapping[str, Any]) -> None:
    """Change a rollout.

    Args:
        changes: by name: `input`, `mode`, `resources_id`, `status`, `config` (a `RolloutConfig`), `metadata`.

    Raises:
        NotFound: no such rollout.
    """
    columns = dict(changes)
    _check("status", columns.get("status", "queuing"), ROLLOUT_STATUSES)
    _check("mode", columns.get("mode"), MODES)
    _check_config(columns.get("config"))
    found = find_known(connection, rollout_id)
    config = columns.get("config", config_of(found))
    if "config" in columns:
        columns["config"] = to_json(config.as_dict())
    if "input" in columns:
        columns["input"] = to_json(columns["input"])
    if columns.get("metadata") is not None:
        columns["metadata"] = to_json(columns["metadata"])
    status = columns.get("status", found.status)
    if "status" in columns:
        columns |= _status_columns(status, found.queued_at, now(connection))
    if columns:
        connection.execute(_CHANGE_ROLLOUT, {"of_key": found.key, **columns})
    if found.attempts and columns.keys() & {"status", "config"}:
        deadline = None
        if status in UNDER_WAY:
            deadline = _deadline(config, found.attempt_start_time, found.attempt_last_heartbeat_time)
        connection.execute(_CHANGE_ATTEMPT, {"of_rollout": found.key, "number": found.attempts, "deadline": deadline})


def update_attempt(connection: Connection, rollout_id: str, attempt_id: str, changes: Mapping[str, Any]) -> Any:
    """Change an attempt, and apply what follows for its rollout and its worker; returns the attempt's row.

    Raises:
        NotFound: no such rollout or attempt.
    """
    return update_attempts(connection, [AttemptChange(rollout_id, attempt_id, changes)])[0]


def update_attempts(connection: Connection, wanted: Sequence[AttemptChange]) -> list[Any]:
    """Change attempts, in this order, and apply what follows for their rollouts and workers; returns their rows.

    Raises:
        NotFound: there is no such rollout or attempt as one of them names.
    """
    changed: dict[int, Any] = {}
    for places in _rounds(wanted):
        some = [wanted[place] for place in places]
        of_rollouts = find_to_change(connection, [each.rollout_id for each in some])
        at = now(connection)
        settled = [_settled(connection, of_rollouts, each, at) for each in some]
        _write(connection, settled, at)
        changed |= {place: each.attempt for place, each in zip(places, settled, strict=True)}
    return [changed[place] for place in range(len(wanted))]


def heartbeat(connection: Connection, rollout_id: str, attempt_id: str) -> bool:
    """Record a sign of life of an attempt; False where there is no such attempt."""
    return heartbeats(connection, [(rollout_id, attempt_id)])[0]


def heartbeats(connection: Connection, wanted: Sequence[tuple[str, str]]) -> list[bool]:
    """Record signs of life of attempts, each named by its rollout's id and its own; False where there is none."""
    are_there: dict[tuple[str, str], bool] = {}
    changes = [AttemptChange(*each, {}) for each in dict.fromkeys(wanted)]
    for places in _rounds(changes):
        some = [changes[place] for place in places]
        of_rollouts = find_to_change(connection, [each.rollout_id for each in some])
        at = now(connection)
        revived = [_revived(connection, of_rollouts.get(each.rollout_id), each.attempt_id, at) for each in some]
        _write(connection, [each for each in revived if each is not None], at)
        for each, found in zip(some, revived, strict=True):
            are_there[each.rollout_id, each.attempt_id] = found is not None
    return [are_there[each] for each in wanted]


def is_anything_due(connection: Connection) -> bool:
    """Tell whether `expire` would find an attempt."""
    earliest = earliest_deadline(connection)
    return earliest is not None and earliest < now(connection)


def expire(connection: Connection, limit: int = 1_000) -> list[str]:
    """End the attempts that have timed out or are unresponsive; returns the ids of their rollouts."""
    at = now(connection)
    due = (
        select(rollouts.c.rollout_id)
        .join(attempts, attempts.c.rollout_key == rollouts.c.key)
        .where(attempts.c.deadline < at)
        .order_by(attempts.c.deadline)
        .limit(limit)
        .with_for_update(skip_locked=True, of=rollouts)
    )
    locked = connection.execute(due).scalars().all()
    of_rollouts = find_to_change(connection, locked)
    ended: list[_Settled] = []
    for each in locked:
        found = of_rollouts[each]
        # A heartbeat may have arrived between the query and its lock.
        if found.attempt_deadline is not None and found.attempt_deadline < at:
            timeout = config_of(found).timeout_seconds
            # Added in the same order as the deadline was: a difference may be rounded the other way.
            late = timeout is not None and found.attempt_start_time + timeout < at
            changes = {"status": "timeout" if late else "unresponsive"}
            ended.append(_settled(connection, of_rollouts, AttemptChange(each, "latest", changes), at))
    _write(connection, ended, at)
    return [each.rollout.rollout_id for each in ended]


def _rows(
    connection: Connection,
    new: Sequence[NewRollout],
    status: RolloutStatus,
    at: float,
    *,
    queued_at: int | None = None,
    attempts_made: int = 0,
) -> list[dict[str, Any]]:
    """Make the rows of new rollouts."""
    for each in new:
        _check("mode", each.mode, MODES)
        _check_config(each.config)
    latest = None if all(each.resources_id for each in new) else resources.latest_id(connection)
    return [
        {
            "key": key,
            "rollout_id": f"ro-{new_id()}",
            "input": to_json(each.input),
            # Distinct start times keep the order of a batch, ascending and descending.
            "start_time": at + place / MICROSECONDS,
            "end_time": None,
            "mode": each.mode,
            "resources_id": latest if each.resources_id is None else each.resources_id,
            "status": status,
            "config": to_json(each.config.as_dict()),
            "metadata": to_json(each.metadata),
            "queued_at": queued_at,
            "attempts": attempts_made,
        }
        for place, (each, key) in enumerate(zip(new, next_keys(connection, rollouts, len(new)), strict=True))
    ]


def _begin_attempts(
    connection: Connection, taken: Sequence[tuple[Any, str | None]], at: float, **of_workers: Any
) -> list[Any]:
    """Create the next attempts of rollouts, which leave the queue; returns the rollouts' rows.

    Args:
        taken: the rows of rollouts, each with the worker that takes it.
        of_workers: columns of these workers to set as well.
    """
    columns = _status_columns("preparing", None, at)
    changed = [{**_dict(row), **columns, "attempts": row.attempts + 1} for row, _ in taken]
    again = [
        {"of_rollout": row["key"], "number": row["attempts"] - 1, "deadline": None}
        for row in changed
        if row["attempts"] > 1
    ]
    begun = [
        _new_attempt(row["key"], row["attempts"], worker_id, at, _deadline(config_of(found), at, None))
        for row, (found, worker_id) in zip(changed, taken, strict=True)
    ]
    found = [_with_attempt(row, attempt) for row, attempt in zip(changed, begun, strict=True)]
    changes = [{"of_key": row["key"], "attempts": row["attempts"], **columns} for row in changed]
    with pipelined(connection):
        _execute(connection, _CHANGE_ROLLOUT, changes)
        _execute(connection, _CHANGE_ATTEMPT, again)
        _insert_attempts(connection, found, begun, at, **of_workers)
    return found


def _new_attempt(rollout_key: int, number: int, worker_id: str | None, at: float, deadline: float | None) -> _Attempt:
    return _Attempt(rollout_key, number, f"at-{new_id()}", at, None, "preparing", worker_id, None, None, deadline)


def _insert_attempts(
    connection: Connection, found: Sequence[Any], new: Sequence[_Attempt], at: float, **of_workers: Any
) -> None:
    """Insert the attempts of these rollouts, and note what their workers do."""
    _execute(connection, _NEW_ATTEMPTS, [asdict(each) for each in new])
    workers.note_all(
        connection,
        {
            each.worker_id: {**workers.busy(at, row.rollout_id, each.attempt_id), **of_workers}
            for row, each in zip(found, new, strict=True)
            if each.worker_id
        },
    )


class _Settled(NamedTuple):
    """An attempt that has changed, and its rollout.

    Attributes:
        rollout: the rollout's row as it was.
        attempt: the attempt as it is now.
        status: of the rollout, as it is now.
        is_noted: whether the rollout counts as changed, though its status may be the same.
        worker: columns of the attempt's worker to set.
    """

    rollout: Any
    attempt: _Attempt
    status: RolloutStatus
    is_noted: bool
    worker: Mapping[str, Any] | None = None


def _settled(connection: Connection, of_rollouts: Mapping[str, Any], wanted: AttemptChange, at: float) -> _Settled:
    """Apply changes to an attempt; the state of the latest attempt decides the state of its rollout."""
    columns = dict(wanted.changes)
    _check("status", columns.get("status", "preparing"), ATTEMPT_STATUSES)
    if columns.get("metadata") is not None:
        columns["metadata"] = to_json(columns["metadata"])
    found = of_rollouts.get(wanted.rollout_id)
    if found is None:
        raise NotFound(f"there is no rollout {wanted.rollout_id!r}")
    attempt = _attempt_of(connection, found, wanted.attempt_id)
    if attempt is None:
        raise NotFound(f"the rollout {wanted.rollout_id!r} has no attempt {wanted.attempt_id!r}")
    if columns.get("status") in ("failed", "succeeded"):
        columns["end_time"] = at
    elif columns.get("status") in UNDER_WAY:
        columns["end_time"] = None
    attempt = replace(attempt, **columns)
    status: RolloutStatus = found.status
    if attempt.sequence_id == found.attempts:
        config = config_of(found)
        status = _status_after(attempt, config)
        deadline = None
        if status in UNDER_WAY:
            deadline = _deadline(config, attempt.start_time, attempt.last_heartbeat_time)
        attempt = replace(attempt, deadline=deadline)
    worker = None
    if attempt.worker_id and columns.keys() & {"status", "worker_id"}:
        worker = workers.of_attempt(attempt.status, at, found.rollout_id, attempt.attempt_id)
    return _Settled(found, attempt, status, bool(columns), worker)


def _revived(connection: Connection, found: Any | None, attempt_id: str, at: float) -> _Settled | None:
    """Apply a sign of life to an attempt; None where there is no such attempt."""
    attempt = None if found is None else _attempt_of(connection, found, attempt_id)
    if found is None or attempt is None or attempt_id == "latest":
        return None
    is_latest = attempt.sequence_id == found.attempts
    before = attempt.last_heartbeat_time if is_latest else None
    status = "running" if attempt.status in ("preparing", "unresponsive") else attempt.status
    attempt = replace(attempt, status=status, last_heartbeat_time=at if before is None else max(before, at))
    rollout_status: RolloutStatus = found.status
    if is_latest:
        if status == "running" and rollout_status in ("preparing", "requeuing"):
            rollout_status = "running"
        if rollout_status in UNDER_WAY:
            attempt = replace(attempt, deadline=_deadline(config_of(found), attempt.start_time, at))
    return _Settled(found, attempt, rollout_status, is_noted=False)


def _write(connection: Connection, settled: Sequence[_Settled], at: float) -> None:
    """Write attempts that have changed, and what follows for their rollouts and workers."""
    of_attempts = [
        {
            "of_rollout": each.attempt.rollout_key,
            "number": each.attempt.sequence_id,
            **{name: getattr(each.attempt, name) for name in _CHANGING},
        }
        for each in settled
    ]
    of_rollouts = [
        {"of_key": each.rollout.key, **_columns_of(each, at)}
        for each in settled
        if each.is_noted or each.status != each.rollout.status
    ]
    of_workers: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for each in settled:
        if each.attempt.worker_id and each.worker:
            of_workers[each.attempt.worker_id] |= each.worker
    with pipelined(connection):
        _execute(connection, _CHANGE_ATTEMPT, of_attempts)
        _execute(connection, _CHANGE_ROLLOUT, of_rollouts)
        workers.note_all(connection, of_workers)


def _columns_of(settled: _Settled, at: float) -> dict[str, Any]:
    """Return the columns of a rollout that its state sets; they are set anew where that is as before."""
    found = settled.rollout
    if settled.status == found.status:
        return {"status": found.status, "queued_at": found.queued_at, "end_time": found.end_time}
    return _status_columns(settled.status, found.queued_at, at)


def _rounds(wanted: Sequence[AttemptChange]) -> Iterator[list[int]]:
    """Split changes, given by their places, so that those of the same rollout follow each other."""
    by_rollout: defaultdict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(wanted):
        by_rollout[each.rollout_id].append(place)
    number, left = 0, [*by_rollout.values()]
    while left:
        yield [places[number] for places in left]
        number += 1
        left = [places for places in left if len(places) > number]


def _attempt_of(connection: Connection, found: Any, attempt_id: str) -> _Attempt | None:
    """Return an attempt of a rollout; None where there is no such attempt."""
    if found.attempts and attempt_id in ("latest", found.attempt_id):
        names = (f"attempt_{name.removeprefix('attempt_')}" for name in _COLUMNS[1:])
        return _Attempt(found.key, *(getattr(found, name) for name in names))
    of_both = attempts.c.rollout_key == found.key, attempts.c.attempt_id == attempt_id
    row = connection.execute(select(attempts).where(*of_both)).first()
    return None if row is None else _Attempt(*(getattr(row, name) for name in _COLUMNS))


def _with_attempt(row: Mapping[str, Any], attempt: _Attempt) -> Any:
    """Return a rollout's row with its latest attempt, as `rollouts.find` does."""
    of_attempt = {f"attempt_{name.removeprefix('attempt_')}": getattr(attempt, name) for name in _COLUMNS[1:]}
    return SimpleNamespace(**row, **of_attempt)


def _dict(row: Any) -> dict[str, Any]:
    """Return the columns of a rollout in its row."""
    return {column.name: getattr(row, column.name) for column in rollouts.columns}


def _execute(connection: Connection, statement: Any, values: Sequence[Mapping[str, Any]]) -> None:
    """Execute a statement once for each, if there are any."""
    if values:
        connection.execute(statement, values[0] if len(values) == 1 else values)


def _status_after(attempt: _Attempt, config: RolloutConfig) -> RolloutStatus:
    """Derive a rollout's state from its latest attempt."""
    if attempt.status in ("preparing", "running", "succeeded"):
        return attempt.status  # type: ignore[return-value]
    again = attempt.status in config.retry_condition and attempt.sequence_id < config.max_attempts
    return "requeuing" if again else "failed"


def _status_columns(status: RolloutStatus, queued_at: int | None, at: float) -> dict[str, Any]:
    """Return the columns that a state sets. A rollout that is queued already keeps its place."""
    changes: dict[str, Any] = {"status": status, "queued_at": None}
    if status in QUEUED:
        changes["queued_at"] = queued_at or _nanoseconds(at)
    changes["end_time"] = at if status in FINISHED else None
    return changes


def _check(name: str, value: Any, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        words = ", ".join(repr(each) for each in allowed if each is not None)
        raise InvalidRecord(f"{name}: {value!r} is not one of {words}")


def _check_config(config: RolloutConfig | None) -> None:
    if config is None:
        return
    for status in config.retry_condition:
        _check("retry_condition", status, ATTEMPT_STATUSES)
    if config.max_attempts < 1:
        raise InvalidRecord(f"max_attempts: must be at least 1, not {config.max_attempts}")
    try:
        pins_for(config.sampling, None)
    except ValueError as error:
        raise InvalidRecord(f"sampling: {error}") from error


def _nanoseconds(at: float) -> int:
    return int(at * 1e9)


def _deadline(config: RolloutConfig, start_time: float, last_heartbeat_time: float | None) -> float | None:
    times: list[float] = []
    if config.timeout_seconds is not None:
        times.append(start_time + config.timeout_seconds)
    if config.unresponsive_seconds is not None:
        times.append((last_heartbeat_time or start_time) + config.unresponsive_seconds)
    return min(times, default=None)
