"""What is answered, as JSON: what came as JSON leaves as it came."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Column, ColumnElement, Connection

from agentlightning.server.models.common import Query
from agentlightning.server.transactions import Transactions
from agentlightning.store.pages import Page, find_page
from agentlightning.store.rows import text_of

__all__ = ["Json", "attempt", "encode", "page", "resources", "rollout", "span", "worker"]

encode = msgspec.json.Encoder().encode
# Spans have bodies of some KiB, and may have some MiB.
ROWS_AT_ONCE = 64


class Json(Response):
    """An answer that is JSON already, or becomes it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else encode(content)


def attempt(row: Any, rollout_id: str, prefix: str = "") -> dict[str, Any]:
    """An attempt of its columns, which may have a prefix."""
    columns: Mapping[str, Any] = row._mapping
    return {
        "rollout_id": rollout_id,
        "attempt_id": columns["attempt_id"],
        "sequence_id": columns[f"{prefix}sequence_id"],
        "start_time": columns[f"{prefix}start_time"],
        "end_time": columns[f"{prefix}end_time"],
        "status": columns[f"{prefix}status"],
        "worker_id": columns[f"{prefix}worker_id"],
        "last_heartbeat_time": columns[f"{prefix}last_heartbeat_time"],
        "metadata": _json(columns[f"{prefix}metadata"]),
    }


def rollout(row: Any, *, with_attempt: bool = True) -> dict[str, Any]:
    """A rollout, with its latest attempt where there is one."""
    found = {
        "rollout_id": row.rollout_id,
        "input": _json(row.input),
        "start_time": row.start_time,
        "end_time": row.end_time,
        "mode": row.mode,
        "resources_id": row.resources_id,
        "status": row.status,
        "config": _json(row.config),
        "metadata": _json(row.metadata),
    }
    if with_attempt and row.attempts:
        found["attempt"] = attempt(row, row.rollout_id, "attempt_")
    return found


def worker(row: Any) -> dict[str, Any]:
    """A worker."""
    found = dict(row._mapping)
    del found["key"]
    found["heartbeat_stats"] = _json(row.heartbeat_stats)
    return found


def resources(row: Any) -> dict[str, Any]:
    """A version of resources."""
    found = dict(row._mapping)
    del found["key"]
    found["resources"] = _json(row.resources)
    return found


def span(row: Any) -> msgspec.Raw:
    """A span: the columns that its body is without, its body, and what is kept once for many."""
    known = {"rollout_id": row.rollout_id, "attempt_id": row.attempt_id, "sequence_id": row.sequence_id}
    common = row.common
    if isinstance(common, str):
        common = text_of(common).encode()
    body = encode(known)[:-1] + b"," + row.body[1:]
    return msgspec.Raw(body if common is None else body[:-1] + b"," + common[1:])


async def page(
    transactions: Transactions,
    asked: Query,
    where: Callable[[Connection], ColumnElement[bool]],
    query: Any,
    key: Column[int],
    item: Callable[[Any], Any],
    complete: Callable[[Connection, list[Any]], list[Any]] = lambda _, rows: rows,
) -> Response:
    """A page of items. One that is long is sent as it is read, so that it is never in memory as a whole.

    Args:
        asked: which page, in which order; `sort_by`, which each kind has names of its own for, is a column.
        where: which rows there are on all pages.
        query: a SELECT of rows, of which those with the page's keys are read.
        key: the column that stands for a row.
        item: makes one of a row.
        complete: puts into rows what is elsewhere in the database.
    """

    def rows(connection: Connection, keys: Sequence[int]) -> list[Any]:
        found = {row[position]: row for row in connection.execute(query.where(key.in_(keys)))}
        return [item(row) for row in complete(connection, [found[each] for each in keys if each in found])]

    def begin(connection: Connection) -> tuple[Page, list[Any]]:
        order_by = None if sort_by is None else key.table.c[sort_by]
        descending = asked.sort_order == "desc"
        found = find_page(connection, key, where(connection), order_by, descending, asked.limit, asked.offset)
        return found, rows(connection, found.keys[:ROWS_AT_ONCE])

    sort_by: str | None = getattr(asked, "sort_by", None)
    position = list(query.selected_columns).index(key)
    found, first = await transactions.read(begin)
    about = {"limit": asked.limit, "offset": asked.offset, "total": found.total}
    if len(found.keys) <= ROWS_AT_ONCE:
        return Json({"items": first, **about})

    async def blocks() -> AsyncIterator[list[Any]]:
        yield first
        for start in range(ROWS_AT_ONCE, len(found.keys), ROWS_AT_ONCE):
            keys = found.keys[start : start + ROWS_AT_ONCE]
            yield await transactions.read(lambda connection, keys=keys: rows(connection, keys))

    async def parts() -> AsyncIterator[bytes]:
        yield b'{"items":['
        separator = b""
        async for items in blocks():
            # All of them may be gone since their keys were read.
            if items:
                yield separator + encode(items)[1:-1]
                separator = b","
        yield b"]," + encode(about)[1:]

    return StreamingResponse(parts(), media_type="application/json")


def _json(text: str | None) -> msgspec.Raw | None:
    return None if text is None else msgspec.Raw(text.encode())
