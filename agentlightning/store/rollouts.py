"""Rollouts and their attempts: the queue, and what becomes of them, as Agent Lightning 0.3 defines it.

Everything here works inside a transaction of somebody else's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Integer, Select, and_, bindparam, delete, func, insert, select, update

from agentlightning.generation import new_id
from agentlightning.store import resources, workers
from agentlightning.store.database import now, takes_turns
from agentlightning.store.tables import attempts, rollouts

__all__ = [
    "FINISHED",
    "ROLLOUT_STATUSES",
    "AttemptStatus",
    "Attempted",
    "Config",
    "Mode",
    "NewRollout",
    "RolloutStatus",
    "Unknown",
    "dequeue",
    "enqueue",
    "expire",
    "find",
    "heard_of",
    "is_anything_due",
    "remove",
    "start",
    "start_attempt",
    "update_attempt",
    "update_rollout",
    "with_latest_attempt",
]

Mode = Literal["train", "val", "test"]
RolloutStatus = Literal["queuing", "preparing", "running", "failed", "succeeded", "cancelled", "requeuing"]
AttemptStatus = Literal["preparing", "running", "failed", "succeeded", "unresponsive", "timeout"]
ROLLOUT_STATUSES: Sequence[RolloutStatus] = (
    "queuing",
    "preparing",
    "running",
    "failed",
    "succeeded",
    "cancelled",
    "requeuing",
)
QUEUED = ("queuing", "requeuing")
UNDER_WAY = ("preparing", "running")
FINISHED = ("failed", "succeeded", "cancelled")

MICROSECONDS = 1_000_000


class Unknown(LookupError):
    """There is no rollout or attempt of that id; the message is one sentence that says so."""


@dataclass(frozen=True, slots=True)
class Config:
    """When an attempt is given up, and when another is made.

    Attributes:
        timeout_seconds: how long an attempt may take.
        unresponsive_seconds: how long nothing may be heard of one.
        max_attempts: how many there may be, the first included.
        retry_condition: how an attempt must have ended for another to be made.
    """

    timeout_seconds: float | None = None
    unresponsive_seconds: float | None = None
    max_attempts: int = 1
    retry_condition: Sequence[AttemptStatus] = ()

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class NewRollout:
    """What a rollout is made of.

    Attributes:
        input: JSON, as is `metadata`.
        resources_id: None stands for the latest resources.
    """

    input: str
    mode: Mode | None = None
    resources_id: str | None = None
    config: Config = Config()
    metadata: str = "{}"


Attempted = Any
"""A row: a rollout's columns and those of its latest attempt, whose names begin with `attempt_` there; see `find`."""

_LATEST = [
    column.label(f"attempt_{column.name.removeprefix('attempt_')}")
    for column in attempts.columns
    if column is not attempts.c.rollout_key
]


def with_latest_attempt() -> Select[Any]:
    """All rollouts, each with its latest attempt; where there is none, that is null."""
    latest = and_(attempts.c.rollout_key == rollouts.c.key, attempts.c.sequence_id == rollouts.c.attempts)
    return select(rollouts, *_LATEST).select_from(rollouts.outerjoin(attempts, latest))


# Made once: SQLAlchemy takes longer to put a statement together than SQLite takes to execute it. No parameter is called
# as a column is: what else is given to an UPDATE is what it sets.
_FIND = with_latest_attempt().where(rollouts.c.rollout_id == bindparam("rollout"))
_LOCK = select(rollouts.c.key).where(rollouts.c.rollout_id == bindparam("rollout")).with_for_update()
_CHANGE_ROLLOUT = update(rollouts).where(rollouts.c.key == bindparam("of_key"))
_IS = and_(attempts.c.rollout_key == bindparam("of_rollout"), attempts.c.sequence_id == bindparam("number"))
_ATTEMPT = select(attempts).where(_IS)
_CHANGE_ATTEMPT = update(attempts).where(_IS)
_NEW_ROLLOUTS, _NEW_ATTEMPT = insert(rollouts), insert(attempts)
_DUE = select(attempts.c.rollout_key).where(attempts.c.deadline < bindparam("now")).limit(1)
_WAITING = (
    select(rollouts.c.key, rollouts.c.rollout_id, rollouts.c.attempts, rollouts.c.config)
    .where(rollouts.c.queued_at.is_not(None))
    .order_by(rollouts.c.queued_at, rollouts.c.key)
    .limit(bindparam("most", type_=Integer))
    .with_for_update(skip_locked=True)
)


def find(connection: Connection, rollout_id: str, *, to_change: bool = False) -> Attempted | None:
    """The rollout with its latest attempt; nobody else changes it meanwhile where it is found `to_change`."""
    of_this = {"rollout": rollout_id}
    if to_change and not takes_turns(connection):
        # By itself: a query that waits for a lock goes on with the rollout as it is then, and the attempt as it was.
        connection.execute(_LOCK, of_this)
    return connection.execute(_FIND, of_this).first()


def start(connection: Connection, new: NewRollout, worker_id: str | None) -> str:
    """Make a rollout and its first attempt, for whoever runs it at once; returns its id."""
    at = now(connection)
    [rollout_id], key = _insert(connection, [new], "preparing", at, attempts_made=1)
    _attempt(connection, key, rollout_id, 1, worker_id, at, _deadline(new.config, at, None))
    return rollout_id


def enqueue(connection: Connection, new: Sequence[NewRollout]) -> list[str]:
    """Put rollouts into the queue, in this order; returns their ids."""
    at = now(connection)
    made, _ = _insert(connection, new, "queuing", at, queued_at=_nanoseconds(at))
    return made


def dequeue(connection: Connection, limit: int, worker_id: str | None) -> list[str]:
    """Take the rollouts that have been queued the longest, each with a new attempt; returns their ids."""
    found = connection.execute(_WAITING, {"most": limit}).all()
    at = now(connection)
    if worker_id:
        workers.note(connection, worker_id, last_dequeue_time=at, **({} if found else workers.without_work(at)))
    for each in found:
        _begin(connection, each, worker_id, at)
    return [each.rollout_id for each in found]


def start_attempt(connection: Connection, rollout_id: str, worker_id: str | None) -> None:
    """Make one more attempt, whatever became of those before.

    Raises:
        Unknown: there is no such rollout.
    """
    _begin(connection, _known(connection, rollout_id), worker_id, now(connection))


def update_rollout(connection: Connection, rollout_id: str, **changes: Any) -> None:
    """Set columns of a rollout: input, mode, resources_id, status, config (a `Config`), metadata.

    Raises:
        Unknown: there is no such rollout.
    """
    found = _known(connection, rollout_id)
    config = changes.get("config", config_of(found))
    if "config" in changes:
        changes["config"] = config.as_json()
    status = changes.get("status", found.status)
    if "status" in changes:
        changes |= _of_status(status, found.queued_at, now(connection))
    if changes:
        connection.execute(_CHANGE_ROLLOUT, {"of_key": found.key, **changes})
    if found.attempts and changes.keys() & {"status", "config"}:
        deadline = None
        if status in UNDER_WAY:
            deadline = _deadline(config, found.attempt_start_time, found.attempt_last_heartbeat_time)
        _change_attempt(connection, found.key, found.attempts, deadline=deadline)


def update_attempt(connection: Connection, rollout_id: str, attempt_id: str, **changes: Any) -> Any:
    """Set columns of an attempt (status, worker_id, last_heartbeat_time, metadata), and what follows for its rollout.

    Args:
        attempt_id: `"latest"` stands for the latest.

    Returns:
        The attempt's columns.

    Raises:
        Unknown: there is no such rollout or attempt.
    """
    found = _known(connection, rollout_id)
    number = found.attempts if attempt_id == "latest" else _number_of(connection, found.key, attempt_id)
    if not number:
        raise Unknown(f"the rollout {rollout_id!r} has no attempt {attempt_id!r}")
    _settle(connection, found, number, changes)
    return _attempt_of(connection, found.key, number)


def heard_of(connection: Connection, rollout_id: str, attempt_id: str) -> bool:
    """Note that an attempt is alive; False where there is none of these ids."""
    found = find(connection, rollout_id, to_change=True)
    if found is None:
        return False
    if found.attempt_id == attempt_id:
        number, status, was = found.attempts, found.attempt_status, found.attempt_last_heartbeat_time
    else:
        number = _number_of(connection, found.key, attempt_id)
        if not number:
            return False
        status = _attempt_of(connection, found.key, number).status
        was = None
    at = now(connection)
    changes: dict[str, Any] = {"last_heartbeat_time": at if was is None else max(was, at)}
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
    """Whether `expire` would find something."""
    return connection.execute(_DUE, {"now": now(connection)}).first() is not None


def expire(connection: Connection, limit: int = 1_000) -> list[str]:
    """End the attempts that take too long or of which nothing is heard; returns their rollouts' ids."""
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
        # Somebody may have heard of it between the query and its lock.
        if found is not None and found.attempt_deadline is not None and found.attempt_deadline < at:
            timeout = config_of(found).timeout_seconds
            # Added as the deadline was: a difference may be rounded to the other side.
            late = timeout is not None and found.attempt_start_time + timeout < at
            _settle(connection, found, found.attempts, {"status": "timeout" if late else "unresponsive"})
            ended.append(rollout_id)
    return ended


def remove(connection: Connection, rollout_id: str) -> None:
    """Forget a rollout that stood for something else, with its attempts; nothing where there is none."""
    found = find(connection, rollout_id, to_change=True)
    if found is not None:
        connection.execute(delete(attempts).where(attempts.c.rollout_key == found.key))
        connection.execute(delete(rollouts).where(rollouts.c.key == found.key))


def config_of(rollout: Any) -> Config:
    """The config in a rollout's row."""
    return Config(**json.loads(rollout.config))


def count_by_status(connection: Connection) -> dict[str, int]:
    """How many rollouts there are of each status; every status is there."""
    query = select(rollouts.c.status, func.count().label("how_many")).group_by(rollouts.c.status)
    return dict.fromkeys(ROLLOUT_STATUSES, 0) | {row.status: row.how_many for row in connection.execute(query)}


def _known(connection: Connection, rollout_id: str) -> Attempted:
    found = find(connection, rollout_id, to_change=True)
    if found is None:
        raise Unknown(f"there is no rollout {rollout_id!r}")
    return found


def _insert(
    connection: Connection,
    new: Sequence[NewRollout],
    status: RolloutStatus,
    at: float,
    *,
    queued_at: int | None = None,
    attempts_made: int = 0,
) -> tuple[list[str], int]:
    """Returns the rollouts' ids, and the key of one that is alone."""
    latest = None if all(each.resources_id for each in new) else resources.latest_id(connection)
    made = [
        {
            "rollout_id": f"ro-{new_id()}",
            "input": each.input,
            # Each has a moment of its own, so that those of a batch are in order by it, from both ends.
            "start_time": at + place / MICROSECONDS,
            "mode": each.mode,
            "resources_id": latest if each.resources_id is None else each.resources_id,
            "status": status,
            "config": each.config.as_json(),
            "metadata": each.metadata,
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


def _begin(connection: Connection, found: Any, worker_id: str | None, at: float) -> None:
    """Make the next attempt of a rollout, which leaves the queue."""
    number = found.attempts + 1
    connection.execute(_CHANGE_ROLLOUT, {"of_key": found.key, "attempts": number, **_of_status("preparing", None, at)})
    if number > 1:
        _change_attempt(connection, found.key, number - 1, deadline=None)
    _attempt(connection, found.key, found.rollout_id, number, worker_id, at, _deadline(config_of(found), at, None))


def _attempt(
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


def _settle(connection: Connection, found: Attempted, number: int, changes: dict[str, Any]) -> None:
    """Change an attempt; what it says of the rollout is the rollout's status where it is the latest."""
    at = now(connection)
    if changes.get("status") in ("failed", "succeeded"):
        changes["end_time"] = at
    elif changes.get("status") in UNDER_WAY:
        changes["end_time"] = None
    if changes:
        _change_attempt(connection, found.key, number, **changes)
    attempt = _attempt_of(connection, found.key, number)
    if number == found.attempts:
        config = config_of(found)
        status = _status_after(attempt, config)
        if status != found.status:
            _change_rollout(connection, found, status, at)
        deadline = None
        if status in UNDER_WAY:
            deadline = _deadline(config, attempt.start_time, attempt.last_heartbeat_time)
        if deadline != attempt.deadline:
            _change_attempt(connection, found.key, number, deadline=deadline)
    if attempt.worker_id and changes.keys() & {"status", "worker_id"}:
        known = workers.of_attempt(attempt.status, at, found.rollout_id, attempt.attempt_id)
        workers.note(connection, attempt.worker_id, **known)


def _status_after(attempt: Any, config: Config) -> RolloutStatus:
    """What the latest attempt makes of its rollout."""
    if attempt.status in ("preparing", "running", "succeeded"):
        return attempt.status
    again = attempt.status in config.retry_condition and attempt.sequence_id < config.max_attempts
    return "requeuing" if again else "failed"


def _of_status(status: RolloutStatus, queued_at: int | None, at: float) -> dict[str, Any]:
    """The columns that a status sets. Who is in the queue keeps the place."""
    changes: dict[str, Any] = {"status": status, "queued_at": None}
    if status in QUEUED:
        changes["queued_at"] = queued_at or _nanoseconds(at)
    changes["end_time"] = at if status in FINISHED else None
    return changes


def _change_rollout(connection: Connection, found: Attempted, status: RolloutStatus, at: float) -> None:
    connection.execute(_CHANGE_ROLLOUT, {"of_key": found.key, **_of_status(status, found.queued_at, at)})


def _change_attempt(connection: Connection, rollout_key: int, number: int, **changes: Any) -> None:
    connection.execute(_CHANGE_ATTEMPT, {"of_rollout": rollout_key, "number": number, **changes})


def _attempt_of(connection: Connection, rollout_key: int, number: int) -> Any:
    return connection.execute(_ATTEMPT, {"of_rollout": rollout_key, "number": number}).one()


def _number_of(connection: Connection, rollout_key: int, attempt_id: str) -> int | None:
    of_both = attempts.c.rollout_key == rollout_key, attempts.c.attempt_id == attempt_id
    return connection.execute(select(attempts.c.sequence_id).where(*of_both)).scalar()


def _nanoseconds(at: float) -> int:
    return int(at * 1e9)


def _deadline(config: Config, start_time: float, last_heartbeat_time: float | None) -> float | None:
    moments: list[float] = []
    if config.timeout_seconds is not None:
        moments.append(start_time + config.timeout_seconds)
    if config.unresponsive_seconds is not None:
        moments.append((last_heartbeat_time or start_time) + config.unresponsive_seconds)
    return min(moments, default=None)
