"""Resources that runners work with, such as models and prompts, by version. The caller owns the transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, select, update

from agentlightning.errors import InvalidRecord
from agentlightning.generation import new_id
from agentlightning.sampling import pins_for
from agentlightning.store.database import insert_if_new, now
from agentlightning.store.documents import to_json
from agentlightning.store.pages import Listing, contains, matching
from agentlightning.store.rollouts import Document
from agentlightning.store.tables import resources

__all__ = ["add", "find", "latest_id", "listing", "put", "resources_fields"]

KINDS = ("llm", "proxy_llm", "prompt_template")


def find(connection: Connection, resources_id: str | None) -> Any | None:
    """Find a row of resources."""
    return connection.execute(select(resources).where(resources.c.resources_id == resources_id)).first()


def listing(resources_id: str | None = None, resources_id_contains: str | None = None) -> Listing:
    """List resources; a filter that is None lets everything through."""
    conditions = []
    if resources_id is not None:
        conditions.append(resources.c.resources_id == resources_id)
    if resources_id_contains is not None:
        conditions.append(contains(resources.c.resources_id, resources_id_contains))
    where = matching(conditions, "and")
    return Listing(select(resources), resources.c.key, lambda _: where)


def resources_fields(row: Any, document: Document = json.loads) -> dict[str, Any]:
    """Return the JSON object of a version of resources."""
    found = dict(row._mapping)
    del found["key"]
    found["resources"] = document(row.resources)
    return found


def add(connection: Connection, content: Mapping[str, Any]) -> Any:
    """Store resources, a JSON object, under a new id; returns their row."""
    return put(connection, f"rs-{new_id()}", content)


def put(connection: Connection, resources_id: str, content: Mapping[str, Any]) -> Any:
    """Store resources, a JSON object, under an id; those that it had are replaced, with the next version number.

    Returns:
        Their row.
    """
    for name, each in content.items():
        if not isinstance(each, Mapping) or each.get("resource_type") not in KINDS:
            raise InvalidRecord(f"{name}: must be an object whose resource_type is one of {', '.join(KINDS)}")
        try:
            pins_for(each.get("sampling"), None)
        except ValueError as error:
            raise InvalidRecord(f"{name}.sampling: {error}") from error
    at = now(connection)
    text = to_json(content)
    new = {
        "resources_id": resources_id,
        "create_time": at,
        "update_time": at,
        "version": 1,
        "resources": text,
    }
    if not insert_if_new(connection, resources, **new):
        changes = {"resources": text, "update_time": at, "version": resources.c.version + 1}
        connection.execute(update(resources).where(resources.c.resources_id == resources_id).values(**changes))
    return find(connection, resources_id)


def latest_id(connection: Connection) -> str | None:
    """Return the id of the resources that were added or replaced last."""
    in_order = resources.c.update_time.desc(), resources.c.key.desc()
    return connection.execute(select(resources.c.resources_id).order_by(*in_order).limit(1)).scalar()
