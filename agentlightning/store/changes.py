"""Changes since a moment: asked for often, and answered from a few entries of indexes. The caller owns the transaction.

Rollouts and their attempts change in place, so each change gives the rollout a higher number in its column `changed`.

In PostgreSQL a transaction may commit later than one that began after it, so numbers below the highest may still
appear. There the number is that of the transaction, and who reads takes in all that were open.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from agentlightning.rollout_records import RolloutStatus
from agentlightning.store import texts
from agentlightning.store.database import fetch, run
from agentlightning.store.rows import storable

__all__ = [
    "Moment",
    "changed_rollouts",
    "next_change",
    "note_deletion",
    "now_at",
    "revision_of",
]

# Microseconds, so that the number of a deleted rollout does not come again; higher than all, whatever the clock says.
_NEXT = """
    max(CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER),
    1 + coalesce((SELECT max(changed) FROM rollouts), 0))
"""
_OF_ROLLOUT = """
    SELECT (SELECT changed FROM rollouts WHERE rollout_id = ?),
    (SELECT count(*) FROM spans WHERE rollout_id = ?),
    (SELECT count(*) FROM generations WHERE rollout_key = ?),
    (SELECT max(finished_at) FROM generations WHERE rollout_key = ?),
    (SELECT calls FROM drifts WHERE rollout_id = ?)
"""
_NOW = {
    "sqlite": "(SELECT max(changed) FROM rollouts)",
    "postgresql": "pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1",
}
_DELETIONS = "(SELECT count FROM drift_totals WHERE name = 'deleted')"
_CHANGED = "SELECT rollout_id, status, end_time FROM rollouts WHERE changed > ?"
_DELETED = """
    INSERT INTO drift_totals VALUES ('deleted', 1) ON CONFLICT (name) DO UPDATE SET count = drift_totals.count + 1
"""


class Moment(NamedTuple):
    """A moment in the life of a store: the number of the last change that is seen, and how often was deleted."""

    change: int
    deletions: int


class next_change(FunctionElement[int]):  # noqa: N801
    """The value of `rollouts.changed` for a change that is made now."""

    inherit_cache = True


@compiles(next_change, "sqlite")
def _in_sqlite(_: next_change, __: Any, **___: Any) -> str:
    return _NEXT


@compiles(next_change, "postgresql")
def _in_postgresql(_: next_change, __: Any, **___: Any) -> str:
    return "pg_current_xact_id()::text::bigint"


def revision_of(connection: Connection, rollout_id: str) -> str:
    """Return a text that is another one once the rollout, its attempts, calls, spans or breaks were added or changed.

    Signs of life of attempts, workers and senders change nothing.
    """
    stored, key = storable(rollout_id), texts.key_of(connection, rollout_id)
    return _joined(run(connection, _OF_ROLLOUT, (stored, stored, key, key, stored)).one())


def now_at(connection: Connection) -> Moment:
    """Return the moment after which `changed_rollouts` finds what this transaction does not see yet."""
    found = run(connection, f"SELECT {_NOW[connection.dialect.name]}, {_DELETIONS}", ()).one()
    return Moment(*(each or 0 for each in found))


def changed_rollouts(connection: Connection, after: Moment) -> dict[str, tuple[RolloutStatus, float | None]]:
    """Read the states of the rollouts that have changed, and when they ended, by their ids.

    Args:
        after: a moment of an earlier transaction; what that one has seen may be among them again.
    """
    return {row[0]: (row[1], row[2]) for row in fetch(connection, _CHANGED, (after.change,))}


def note_deletion(connection: Connection) -> None:
    """Let whoever waits learn that rollouts are gone, which no number of a change tells."""
    run(connection, _DELETED, ())


def _joined(values: Any) -> str:
    return ".".join("" if each is None else str(each) for each in values)
