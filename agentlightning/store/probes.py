"""Whether a database can be written, found out by writing to it. The caller owns the transaction."""

from __future__ import annotations

from sqlalchemy import Connection, update

from agentlightning.store.database import insert_if_new, now
from agentlightning.store.tables import probes

__all__ = ["write_something"]

NAME = "ready"


def write_something(connection: Connection) -> None:
    """Write a row, always the same one."""
    at = now(connection)
    if not connection.execute(update(probes).where(probes.c.name == NAME).values(written_at=at)).rowcount:
        insert_if_new(connection, probes, name=NAME, written_at=at)
