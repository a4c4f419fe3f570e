"""Rollouts and attempts as rows: found, listed, and turned into JSON objects. The caller owns the transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Select, and_, bindparam, delete, func, select

from agentlightning.errors import InvalidRecord, NotFound
from agentlightning.rollout_records import ROLLOUT_STATUSES, RolloutConfig, RolloutStatus
from agentlightning.store.database import in_parts, is_single_writer, run
from agentlightning.store.pages import Listing, Logic, contains, matching
from agentlightning.store.tables import attempts, rollouts

__all__ = [
    "Document",
    "attempt_fields",
    "attempt_id_of",
    "attempt_listing",
    "attempts_of",
    "config_of",
    "count_by_status",
    "find",
    "find_all",
    "find_attempt",
    "find_known",
    "find_to_change",
    "listing",
    "remove",
    "rollout_fields",
    "statuses",
]

# Fewer than the variables that a statement of SQLite may have.
IDS_LIMIT = 10_000

Document = Callable[[str], Any]
"""Turns the JSON text of a column into what a JSON object has in its place: `json.loads`, or a raw JSON value."""

_LATEST = [
    column.label(f"attempt_{column.name.removeprefix('attempt_')}")
    for column in attempts.columns
    if column is not attempts.c.rollout_key
]


def _with_latest_attempt() -> Select[Any]:
    """Select all rollouts, each with the columns of its latest attempt as `attempt_...`; null where there is none."""
    latest = and_(attempts.c.rollout_key == rollouts.c.key, attempts.c.sequence_id == rollouts.c.attempts)
    return select(rollouts, *_LATEST).select_from(rollouts.outerjoin(attempts, latest))


# Made once: SQLAlchemy takes longer to build a statement than SQLite takes to execute it.
_FIND = _with_latest_attempt().where(rollouts.c.rollout_id == bindparam("rollout"))
_LOCK = "SELECT key FROM rollouts WHERE rollout_id = ANY(?) ORDER BY rollout_id FOR UPDATE"


def find(connection: Connection, rollout_id: str) -> Any | None:
    """Find a rollout's row with its latest attempt."""
    return connection.execute(_FIND, {"rollout": rollout_id}).first()


def find_to_change(connection: Connection, rollout_ids: Sequence[str]) -> dict[str, Any]:
    """Find the rows of these rollouts by their ids, and lock them until the transaction ends."""
    if not rollout_ids:
        return {}
    if not is_single_writer(connection):
        # A statement of its own: a query that waits for a lock continues with the rollout as it is then, but with the
        # attempt as it was before. In the order of ids, so that two writers do not wait for each other.
        run(connection, _LOCK, ([*rollout_ids],))
    return {row.rollout_id: row for row in find_all(connection, rollout_ids)}


def find_known(connection: Connection, rollout_id: str) -> Any:
    """Find and lock a rollout's row.

    Raises:
        NotFound: no such rollout.
    """
    found = find_to_change(connection, [rollout_id]).get(rollout_id)
    if found is None:
        raise NotFound(f"there is no rollout {rollout_id!r}")
    return found


def find_all(connection: Connection, rollout_ids: Sequence[str]) -> list[Any]:
    """Find the rows of these rollouts, in this order; unknown ids are left out."""
    if len(rollout_ids) == 1:
        row = find(connection, rollout_ids[0])
        return [] if row is None else [row]
    found: dict[str, Any] = {}
    for some in in_parts(rollout_ids):
        query = _with_latest_attempt().where(rollouts.c.rollout_id.in_(some))
        found |= {row.rollout_id: row for row in connection.execute(query)}
    return [found[each] for each in rollout_ids if each in found]


def statuses(connection: Connection, rollout_ids: Sequence[str]) -> dict[str, tuple[RolloutStatus, float | None]]:
    """Read the states of these rollouts, and when they ended; unknown ids are left out."""
    found: dict[str, tuple[RolloutStatus, float | None]] = {}
    columns = (rollouts.c.rollout_id, rollouts.c.status, rollouts.c.end_time)
    for some in in_parts(rollout_ids):
        query = select(*columns).where(rollouts.c.rollout_id.in_(some))
        found |= {row.rollout_id: (row.status, row.end_time) for row in connection.execute(query)}
    return found


def attempt_id_of(connection: Connection, rollout_id: str, attempt_id: str | None) -> str | None:
    """Resolve an attempt id: `latest`, an empty id and None stand for the latest attempt.

    Returns:
        The id; None where the latest attempt is asked for and the rollout is unknown or has none.
    """
    if attempt_id and attempt_id != "latest":
        return attempt_id
    found = find(connection, rollout_id)
    return None if found is None else found.attempt_id


def find_attempt(connection: Connection, rollout_id: str, attempt_id: str) -> Any | None:
    """Find an attempt's row."""
    key = select(rollouts.c.key).where(rollouts.c.rollout_id == rollout_id).scalar_subquery()
    of_both = attempts.c.rollout_key == key, attempts.c.attempt_id == attempt_id
    return connection.execute(select(attempts).where(*of_both)).first()


def attempts_of(connection: Connection, rollout_key: int) -> Sequence[Any]:
    """Read the rows of a rollout's attempts, in order."""
    query = select(attempts).where(attempts.c.rollout_key == rollout_key).order_by(attempts.c.sequence_id)
    return connection.execute(query).all()


def listing(
    status_in: Sequence[RolloutStatus] | None = None,
    rollout_id_in: Sequence[str] | None = None,
    rollout_id_contains: str | None = None,
    filter_logic: Logic = "and",
) -> Listing:
    """List rollouts, each with its latest attempt; a filter that is None lets everything through."""
    conditions = []
    if status_in is not None:
        conditions.append(rollouts.c.status.in_(status_in))
    if rollout_id_in is not None:
        if len(rollout_id_in) > IDS_LIMIT:
            raise InvalidRecord(f"rollout_id_in: at most {IDS_LIMIT} ids at once, not {len(rollout_id_in)}")
        conditions.append(rollouts.c.rollout_id.in_(rollout_id_in))
    if rollout_id_contains is not None:
        conditions.append(contains(rollouts.c.rollout_id, rollout_id_contains))
    where = matching(conditions, filter_logic)
    return Listing(_with_latest_attempt(), rollouts.c.key, lambda _: where)


def attempt_listing(rollout_id: str) -> Listing:
    """List the attempts of a rollout."""
    key = select(rollouts.c.key).where(rollouts.c.rollout_id == rollout_id).scalar_subquery()
    of_rollout = attempts.c.rollout_key == key
    return Listing(select(attempts).where(of_rollout), attempts.c.sequence_id, lambda _: of_rollout)


def rollout_fields(row: Any, document: Document = json.loads, *, with_attempt: bool = True) -> dict[str, Any]:
    """Return the JSON object of a rollout, with its latest attempt where there is one."""
    found = {
        "rollout_id": row.rollout_id,
        "input": document(row.input),
        "start_time": row.start_time,
        "end_time": row.end_time,
        "mode": row.mode,
        "resources_id": row.resources_id,
        "status": row.status,
        "config": document(row.config),
        "metadata": None if row.metadata is None else document(row.metadata),
    }
    if with_attempt and row.attempts:
        found["attempt"] = attempt_fields(row, row.rollout_id, document, "attempt_")
    return found


def attempt_fields(row: Any, rollout_id: str, document: Document = json.loads, prefix: str = "") -> dict[str, Any]:
    """Return the JSON object of an attempt.

    Args:
        prefix: what its columns begin with in a row of both; `attempt_id` never has it twice.
    """
    metadata = getattr(row, f"{prefix}metadata")
    return {
        "rollout_id": rollout_id,
        "attempt_id": row.attempt_id,
        "sequence_id": getattr(row, f"{prefix}sequence_id"),
        "start_time": getattr(row, f"{prefix}start_time"),
        "end_time": getattr(row, f"{prefix}end_time"),
        "status": getattr(row, f"{prefix}status"),
        "worker_id": getattr(row, f"{prefix}worker_id"),
        "last_heartbeat_time": getattr(row, f"{prefix}last_heartbeat_time"),
        "metadata": None if metadata is None else document(metadata),
    }


def config_of(row: Any) -> RolloutConfig:
    """Parse the config in a rollout's row."""
    return RolloutConfig(**json.loads(row.config))


def count_by_status(connection: Connection) -> dict[str, int]:
    """Count the rollouts by status; every status is a key."""
    query = select(rollouts.c.status, func.count().label("how_many")).group_by(rollouts.c.status)
    return dict.fromkeys(ROLLOUT_STATUSES, 0) | {row.status: row.how_many for row in connection.execute(query)}


def remove(connection: Connection, rollout_id: str) -> None:
    """Delete a placeholder rollout with its attempts; does nothing where there is none."""
    found = find_to_change(connection, [rollout_id]).get(rollout_id)
    if found is not None:
        connection.execute(delete(attempts).where(attempts.c.rollout_key == found.key))
        connection.execute(delete(rollouts).where(rollouts.c.key == found.key))
