"""Whether a database can be read and written, found out by doing so. The caller owns the transaction."""

from __future__ import annotations

from sqlalchemy import Connection, update

from agentlightning.store.database import insert_if_new, now, takes_turns
from agentlightning.store.tables import probes

__all__ = ["read_afresh", "write_something"]

NAME = "ready"


def read_afresh(connection: Connection) -> None:
    """Let go of what SQLite has in memory of its file, so that what is read next is read from there."""
    if takes_turns(connection):
        connection.exec_driver_sql("PRAGMA shrink_memory")


def write_something(connection: Connection) -> None:
    """Write a row, always the same one."""
    at = now(connection)
    if not connection.execute(update(probes).where(probes.c.name == NAME).values(written_at=at)).rowcount:
        insert_if_new(connection, probes, name=NAME, written_at=at)
