"""JSON answers: what was stored as JSON leaves as it was stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from fastapi import Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from agentlightning.server.schemas import Query
from agentlightning.server.transactions import Transactions
from agentlightning.store import pages
from agentlightning.store.documents import RawJson
from agentlightning.store.pages import Listing, Page

__all__ = ["Json", "document", "encode", "listed", "raw"]

encode = msgspec.json.Encoder().encode


class Json(Response):
    """An answer that is JSON already, or becomes it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else encode(content)


def document(text: str) -> msgspec.Raw:
    """Pass stored JSON through to the answer, without parsing it."""
    return msgspec.Raw(text.encode())


def raw(value: Any) -> Any:
    """Serialize a value of a request's body for the store."""
    return RawJson(encode(value).decode())


async def listed(transactions: Transactions, listing: Listing, wanted: Query, item: Callable[[Any], Any]) -> Response:
    """Answer with a page of a listing. A long page is sent while it is read, so it is never in memory as a whole.

    Args:
        wanted: page and order; its `sort_by`, if the schema has one, names a column.
        item: builds an item from a row.
    """

    def items(connection: Connection, keys: Any) -> list[Any]:
        return [item(row) for row in listing.rows(connection, keys)]

    def begin(connection: Connection) -> tuple[Page, list[Any]]:
        sort_by: str | None = getattr(wanted, "sort_by", None)
        page = listing.page(connection, sort_by, wanted.sort_order == "desc", wanted.limit, wanted.offset)
        return page, items(connection, page.keys[: pages.ROWS_AT_ONCE])

    page, first = await transactions.read(begin)
    about = {"limit": wanted.limit, "offset": wanted.offset, "total": page.total}
    if len(page.keys) <= pages.ROWS_AT_ONCE:
        return Json({"items": first, **about})

    async def blocks() -> AsyncIterator[list[Any]]:
        yield first
        for keys in pages.parts(page.keys[pages.ROWS_AT_ONCE :]):
            yield await transactions.read(lambda connection, keys=keys: items(connection, keys))

    async def parts() -> AsyncIterator[bytes]:
        yield b'{"items":['
        separator = b""
        async for some in blocks():
            # All rows of a part may be gone since their keys were read.
            if some:
                yield separator + encode(some)[1:-1]
                separator = b","
        yield b"]," + encode(about)[1:]

    return StreamingResponse(parts(), media_type="application/json")
