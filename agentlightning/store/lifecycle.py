"""The life of a rollout: queued, taken, attempted, timed out, retried and ended, as Agent Lightning 0.3 defines it.

The caller owns the transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
from agentlightning.store.database import earliest_deadline, now
from agentlightning.store.documents import to_json
from agentlightning.store.rollouts import config_of, find, find_known
from agentlightning.store.tables import attempts, rollouts

__all__ = [
    "dequeue",
    "enqueue",
    "expire",
    "heartbeat",
    "is_anything_due",
    "start",
    "start_attempt",
    "update_attempt",
    "update_rollout",
]

QUEUED = ("queuing", "requeuing")
UNDER_WAY = ("preparing", "running")
MICROSECONDS = 1_000_000

# Made once: SQLAlchemy takes longer to build a statement than SQLite takes to execute it. No parameter has the name of
# a column: SQLAlchemy would take it for a value to set.
_CHANGE_ROLLOUT = update(rollouts).where(rollouts.c.key == bindparam("of_key")).values(changed=next_change())
_IS = and_(attempts.c.rollout_key == bindparam("of_rollout"), attempts.c.sequence_id == bindparam("number"))
_ATTEMPT = select(attempts).where(_IS)
_CHANGE_ATTEMPT = update(attempts).where(_IS)
_NEW_ROLLOUTS, _NEW_ATTEMPT = insert(rollouts).values(changed=next_change()), insert(attempts)
_WAITING = (
    select(rollouts.c.key, rollouts.c.rollout_id, rollouts.c.attempts, rollouts.c.config)
    .where(rollouts.c.queued_at.is_not(None))
    .order_by(rollouts.c.queued_at, rollouts.c.key)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)


def start(connection: Connection, new: NewRollout, worker_id: str | None) -> str:
    """Create a rollout that is run at once, with its first attempt; returns its id."""
    at = now(connection)
    [rollout_id], key = _insert(connection, [new], "preparing", at, attempts_made=1)
    _insert_attempt(connection, key, rollout_id, 1, worker_id, at, _deadline(new.config, at, None))
    return rollout_id


def enqueue(connection: Connection, new: Sequence[NewRollout]) -> list[str]:
    """Append rollouts to the queue, in this order; returns their ids."""
    at = now(connection)
    made, _ = _insert(connection, new, "queuing", at, queued_at=_nanoseconds(at))
    return made


def dequeue(connection: Connection, limit: int, worker_id: str | None) -> list[str]:
    """Take the rollouts that have been queued longest, each with a new attempt; returns their ids."""
    found = connection.execute(_WAITING, {"most": max(limit, 0)}).all()
    at = now(connection)
    if worker_id:
        workers.note(connection, worker_id, last_dequeue_time=at, **({} if found else workers.without_work(at)))
    for each in found:
        _begin_attempt(connection, each, worker_id, at)
    return [each.rollout_id for each in found]


def start_attempt(connection: Connection, rollout_id: str, worker_id: str | None) -> None:
    """Create one more attempt, whatever the state of those before.

    Raises:
        NotFound: no such rollout.
    """
    _begin_attempt(connection, find_known(connection, rollout_id), worker_id, now(connection))


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
        _change_attempt(connection, found.key, found.attempts, deadline=deadline)


def update_attempt(connection: Connection, rollout_id: str, attempt_id: str, changes: Mapping[str, Any]) -> Any:
    """Change an attempt, and apply what follows for its rollout and its worker.

    Args:
        attempt_id: `latest` stands for the latest.
        changes: by name: `status`, `worker_id`, `last_heartbeat_time`, `metadata`.

    Returns:
        The attempt's row.

    Raises:
        NotFound: no such rollout or attempt.
    """
    columns = dict(changes)
    _check("status", columns.get("status", "preparing"), ATTEMPT_STATUSES)
    if columns.get("metadata") is not None:
        columns["metadata"] = to_json(columns["metadata"])
    found = find_known(connection, rollout_id)
    number = found.attempts if attempt_id == "latest" else _number_of(connection, found.key, attempt_id)
    if not number:
        raise NotFound(f"the rollout {rollout_id!r} has no attempt {attempt_id!r}")
    _settle(connection, found, number, columns)
    return _attempt_row(connection, found.key, number)


def heartbeat(connection: Connection, rollout_id: str, attempt_id: str) -> bool:
    """Record a sign of life of an attempt; False where there is no such attempt."""
    found = find(connection, rollout_id, to_change=True)
    if found is None:
        return False
    if found.attempt_id == attempt_id:
        number, status, before = found.attempts, found.attempt_status, found.attempt_last_heartbeat_time
    else:
        number = _number_of(connection, found.key, attempt_id)
        if not number:
            return False
        status = _attempt_row(connection, found.key, number).status
        before = None
    at = now(connection)
    changes: dict[str, Any] = {"last_heartbeat_time": at if before is None else max(before, at)}
    revived = status in ("preparing", "unresponsive")
    if revived:
        changes["status"] = "running"
    if number == found.attempts:
        rollout_status = found.status
        if (revived or status == "running") and rollout_status in ("preparing", "requeuing"):
            rollout_status = "running"
            _change_rollout(connection, found, rollout_status, at)
        if rollout_status in UNDER_WAY:
            changes["deadline"] = _deadline(config_of(found), found.attempt_start_time, at)
    _change_attempt(connection, found.key, number, **changes)
    return True


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
    ended: list[str] = []
    for rollout_id in connection.execute(due).scalars().all():
        found = find(connection, rollout_id)
        # A heartbeat may have arrived between the query and its lock.
        if found is not None and found.attempt_deadline is not None and found.attempt_deadline < at:
            timeout = config_of(found).timeout_seconds
            # Added in the same order as the deadline was: a difference may be rounded the other way.
            late = timeout is not None and found.attempt_start_time + timeout < at
            _settle(connection, found, found.attempts, {"status": "timeout" if late else "unresponsive"})
            ended.append(rollout_id)
    return ended


def _insert(
    connection: Connection,
    new: Sequence[NewRollout],
    status: RolloutStatus,
    at: float,
    *,
    queued_at: int | None = None,
    attempts_made: int = 0,
) -> tuple[list[str], int]:
    """Insert rollouts; returns their ids, and the key if there is just one."""
    for each in new:
        _check("mode", each.mode, MODES)
        _check_config(each.config)
    latest = None if all(each.resources_id for each in new) else resources.latest_id(connection)
    made = [
        {
            "rollout_id": f"ro-{new_id()}",
            "input": to_json(each.input),
            # Distinct start times keep the order of a batch, ascending and descending.
            "start_time": at + place / MICROSECONDS,
            "mode": each.mode,
            "resources_id": latest if each.resources_id is None else each.resources_id,
            "status": status,
            "config": to_json(each.config.as_dict()),
            "metadata": to_json(each.metadata),
            "queued_at": queued_at,
            "attempts": attempts_made,
        }
        for place, each in enumerate(new)
    ]
    key = 0
    if len(made) == 1:
        [key] = connection.execute(_NEW_ROLLOUTS, made[0]).inserted_primary_key or (0,)
    elif made:
        connection.execute(_NEW_ROLLOUTS, made)
    return [each["rollout_id"] for each in made], key


def _begin_attempt(connection: Connection, found: Any, worker_id: str | None, at: float) -> None:
    """Create the next attempt of a rollout, which leaves the queue."""
    number = found.attempts + 1
    columns = _status_columns("preparing", None, at)
    connection.execute(_CHANGE_ROLLOUT, {"of_key": found.key, "attempts": number, **columns})
    if number > 1:
        _change_attempt(connection, found.key, number - 1, deadline=None)
    deadline = _deadline(config_of(found), at, None)
    _insert_attempt(connection, found.key, found.rollout_id, number, worker_id, at, deadline)


def _insert_attempt(
    connection: Connection,
    rollout_key: int,
    rollout_id: str,
    number: int,
    worker_id: str | None,
    at: float,
    deadline: float | None,
) -> None:
    attempt_id = f"at-{new_id()}"
    values = {
        "rollout_key": rollout_key,
        "sequence_id": number,
        "attempt_id": attempt_id,
        "start_time": at,
        "status": "preparing",
        "worker_id": worker_id,
        "deadline": deadline,
    }
    connection.execute(_NEW_ATTEMPT, values)
    if worker_id:
        workers.note(connection, worker_id, **workers.busy(at, rollout_id, attempt_id))


def _settle(connection: Connection, found: Any, number: int, changes: dict[str, Any]) -> None:
    """Change an attempt; the state of the latest attempt decides the state of its rollout."""
    at = now(connection)
    if changes.get("status") in ("failed", "succeeded"):
        changes["end_time"] = at
    elif changes.get("status") in UNDER_WAY:
        changes["end_time"] = None
    if changes:
        _change_attempt(connection, found.key, number, **changes)
    attempt = _attempt_row(connection, found.key, number)
    status = found.status
    if number == found.attempts:
        config = config_of(found)
        status = _status_after(attempt, config)
        deadline = None
        if status in UNDER_WAY:
            deadline = _deadline(config, attempt.start_time, attempt.last_heartbeat_time)
        if deadline != attempt.deadline:
            _change_attempt(connection, found.key, number, deadline=deadline)
    if status != found.status:
        _change_rollout(connection, found, status, at)
    else:
        connection.execute(_CHANGE_ROLLOUT, {"of_key": found.key})
    if attempt.worker_id and changes.keys() & {"status", "worker_id"}:
        known = workers.of_attempt(attempt.status, at, found.rollout_id, attempt.attempt_id)
        workers.note(connection, attempt.worker_id, **known)


def _status_after(attempt: Any, config: RolloutConfig) -> RolloutStatus:
    """Derive a rollout's state from its latest attempt."""
    if attempt.status in ("preparing", "running", "succeeded"):
        return attempt.status
    again = attempt.status in config.retry_condition and attempt.sequence_id < config.max_attempts
    return "requeuing" if again else "failed"


def _status_columns(status: RolloutStatus, queued_at: int | None, at: float) -> dict[str, Any]:
    """Return the columns that a state sets. A rollout that is queued already keeps its place."""
    changes: dict[str, Any] = {"status": status, "queued_at": None}
    if status in QUEUED:
        changes["queued_at"] = queued_at or _nanoseconds(at)
    changes["end_time"] = at if status in FINISHED else None
    return changes


def _change_rollout(connection: Connection, found: Any, status: RolloutStatus, at: float) -> None:
    connection.execute(_CHANGE_ROLLOUT, {"of_key": found.key, **_status_columns(status, found.queued_at, at)})


def _change_attempt(connection: Connection, rollout_key: int, number: int, **changes: Any) -> None:
    connection.execute(_CHANGE_ATTEMPT, {"of_rollout": rollout_key, "number": number, **changes})


def _attempt_row(connection: Connection, rollout_key: int, number: int) -> Any:
    return connection.execute(_ATTEMPT, {"of_rollout": rollout_key, "number": number}).one()


def _number_of(connection: Connection, rollout_key: int, attempt_id: str) -> int | None:
    of_both = attempts.c.rollout_key == rollout_key, attempts.c.attempt_id == attempt_id
    return connection.execute(select(attempts.c.sequence_id).where(*of_both)).scalar()


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
