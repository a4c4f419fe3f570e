"""Resources: what runners work with, by version. Everything here works inside a transaction of somebody else's."""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from agentlightning.generation import new_id
from agentlightning.store.database import insert_if_new, now
from agentlightning.store.tables import resources

__all__ = ["add", "latest_id", "put"]


def add(connection: Connection, content: str) -> str:
    """Keep resources, as JSON; returns the id that they get."""
    resources_id = f"rs-{new_id()}"
    put(connection, resources_id, content)
    return resources_id


def put(connection: Connection, resources_id: str, content: str) -> None:
    """Keep resources under an id: those that it had are replaced, and the version is one more."""
    at = now(connection)
    new = {
        "resources_id": resources_id,
        "create_time": at,
        "update_time": at,
        "version": 1,
        "resources": content,
    }
    if not insert_if_new(connection, resources, **new):
        changes = {"resources": content, "update_time": at, "version": resources.c.version + 1}
        connection.execute(update(resources).where(resources.c.resources_id == resources_id).values(**changes))


def latest_id(connection: Connection) -> str | None:
    """The id of those that were added or replaced last."""
    in_order = resources.c.update_time.desc(), resources.c.key.desc()
    return connection.execute(select(resources.c.resources_id).order_by(*in_order).limit(1)).scalar()
