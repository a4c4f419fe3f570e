"""Notes of which rollouts changed, so that their summaries are made anew once somebody looks.

A note is in the transaction of the change, and costs one row for each rollout, however often it changes. An empty id
stands for what changed and is of no rollout. Triggers note changes of rollouts, attempts, spans, drift and losses,
whoever makes them; generations are noted by the batch (`mark_calls`), since a trigger for each would cost as much as
storing it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sqlalchemy import Connection

from agentlightning.store.database import run_many
from agentlightning.store.rows import storable

__all__ = ["MARK_ALL", "mark_calls", "triggers"]

_OF_ATTEMPT = "SELECT rollout_id FROM rollouts WHERE key = {row}.rollout_key"
_ITS_OWN = "SELECT {row}.rollout_id AS rollout_id"
_IS_COUNTED = "{row}.rollout_id IS NOT NULL AND ({row}.reward IS NOT NULL OR {row}.response_id IS NOT NULL)"
# Not for each heartbeat, which writes these columns as they are.
_HAS_MOVED = """
    OLD.status <> NEW.status OR OLD.start_time <> NEW.start_time
    OR coalesce(OLD.end_time, -1) <> coalesce(NEW.end_time, -1)
    OR coalesce(OLD.metadata, '') <> coalesce(NEW.metadata, '')
"""
_CHANGES: Sequence[tuple[str, str, str, str, str]] = (
    ("rollouts", "insert", "INSERT", "", _ITS_OWN),
    (
        "rollouts",
        "update",
        "UPDATE",
        f"{_HAS_MOVED} OR OLD.attempts <> NEW.attempts OR OLD.input <> NEW.input",
        _ITS_OWN,
    ),
    ("rollouts", "delete", "DELETE", "", _ITS_OWN),
    ("attempts", "insert", "INSERT", "", _OF_ATTEMPT),
    (
        "attempts",
        "update",
        "UPDATE",
        f"{_HAS_MOVED} OR coalesce(OLD.worker_id, '') <> coalesce(NEW.worker_id, '')",
        _OF_ATTEMPT,
    ),
    ("spans", "insert", "INSERT", _IS_COUNTED, _ITS_OWN),
    ("spans", "update", "UPDATE OF rollout_id", _IS_COUNTED, _ITS_OWN),
    ("spans", "leave", "UPDATE OF rollout_id", _IS_COUNTED, _ITS_OWN),
    ("spans", "delete", "DELETE", _IS_COUNTED, _ITS_OWN),
    ("drifts", "insert", "INSERT", "", _ITS_OWN),
    ("drifts", "delete", "DELETE", "", _ITS_OWN),
    ("losses", "insert", "INSERT", "", "SELECT '' AS rollout_id"),
)
"""Table, name, event, condition and the rollouts that it changes; `row` is the row as it is then, or was."""

# Not by a unique index: in PostgreSQL, two writers of the same rollouts would wait for each other.
_MARK = """
    INSERT INTO stale_rollouts (rollout_id) SELECT rollout_id FROM ({}) AS changed WHERE NOT EXISTS
    (SELECT 1 FROM stale_rollouts WHERE stale_rollouts.rollout_id = changed.rollout_id)
"""
# A call that names no rollout belongs to those whose spans name its answer.
_MARK_THIS = _MARK.format("SELECT CAST(? AS TEXT) AS rollout_id")
_MARK_OF_ANSWER = _MARK.format("SELECT DISTINCT rollout_id FROM spans WHERE response_id = ? AND rollout_id IS NOT NULL")
MARK_ALL = """
    INSERT INTO stale_rollouts (rollout_id) SELECT rollout_id FROM rollouts
    UNION SELECT text FROM texts WHERE key IN (SELECT rollout_key FROM generations)
    UNION SELECT rollout_id FROM spans WHERE rollout_id IS NOT NULL AND response_id IS NOT NULL
"""
"""Migration: no rollout of an older version has a summary."""


def mark_calls(connection: Connection, rollout_ids: Iterable[str | None], answers: Iterable[str | None]) -> None:
    """Note that calls of these rollouts came or went.

    Args:
        rollout_ids: None for calls that name no rollout.
        answers: ids of the answers of those.
    """
    named = {"" if each is None else storable(each) or "" for each in rollout_ids}
    run_many(connection, _MARK_THIS, [(each,) for each in sorted(named)])
    run_many(
        connection, _MARK_OF_ANSWER, [(each,) for each in sorted({storable(each) or "" for each in answers if each})]
    )


def triggers(dialect: str) -> Iterator[str]:
    """Yield the statements that create the triggers in a database of this dialect."""
    for table, name, event, condition, changed in _CHANGES:
        row = "OLD" if name in ("leave", "delete") else "NEW"
        mark, full = _MARK.format(changed.format(row=row)), f"mark_stale_on_{table}_{name}"
        when = f"WHEN ({condition.format(row=row)})" if condition else ""
        if dialect == "sqlite":
            yield f"CREATE TRIGGER {full} AFTER {event} ON {table} {when} BEGIN {mark}; END"
        else:
            body = f"$$BEGIN {mark}; RETURN NULL; END$$"
            # Also for who does not look into this schema, as a restore.
            yield f"CREATE FUNCTION {full}() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS {body}"
            yield f"CREATE TRIGGER {full} AFTER {event} ON {table} FOR EACH ROW {when} EXECUTE FUNCTION {full}()"
