"""Checks of a database, made by using it, and the number of its records. The caller owns the transaction."""

from __future__ import annotations

from sqlalchemy import Connection, func, literal, select, update

from agentlightning.store import tables
from agentlightning.store.database import insert_if_new, is_single_writer, now

__all__ = ["check", "count"]

PROBE = "ready"
COUNTED = {
    "total_rollouts": tables.rollouts,
    "total_attempts": tables.attempts,
    "total_spans": tables.spans,
    "total_resources": tables.resources,
    "total_workers": tables.workers,
    "total_generations": tables.generations,
}


def check(connection: Connection) -> None:
    """Read from every table and write a row, always the same one.

    A file that is gone, a full disk and a database that only reads can all be read, so reading alone shows nothing.

    Raises:
        StoreUnavailable, StoreRefused: the database cannot be read or written.
    """
    if is_single_writer(connection):
        # Drop the pages that SQLite caches, so that the next read goes to the file.
        connection.exec_driver_sql("PRAGMA shrink_memory")
    for table in COUNTED.values():
        connection.execute(select(literal(1)).select_from(table).limit(1)).first()
    at = now(connection)
    probes = tables.probes
    if not connection.execute(update(probes).where(probes.c.name == PROBE).values(written_at=at)).rowcount:
        insert_if_new(connection, probes, name=PROBE, written_at=at)


def count(connection: Connection) -> dict[str, int]:
    """Count the records of each kind."""
    return {
        name: connection.execute(select(func.count()).select_from(each)).scalar_one() for name, each in COUNTED.items()
    }
