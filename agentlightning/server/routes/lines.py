"""JSON Lines of all rollouts, one rollout after the other, with a cursor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from agentlightning.errors import RolloutTooLarge
from agentlightning.server.answers import encode
from agentlightning.server.limits import NUMBER_LIMIT
from agentlightning.server.schemas import Id, Nanoseconds
from agentlightning.server.transactions import Transactions
from agentlightning.store import triplets

__all__ = ["JSON_LINES", "NEXT", "RolloutPage", "lines_of_each", "lines_of_rollouts", "wants_lines"]

JSON_LINES = "application/jsonl"
NEXT = "x-agl-next"


class RolloutPage(BaseModel):
    """Filters of rollouts to read; without any, all."""

    rollout_id: Id | None = None
    attempt_id: Id | None = None
    since: Nanoseconds | None = Field(
        None, description="Of all rollouts: only those of which a call finished at this time or later."
    )
    after: Id | None = Field(
        None,
        description=f"Of all rollouts: only those that follow this one. The header `{NEXT}` of a page, decoded.",
    )
    limit: Annotated[int, Field(ge=1, le=NUMBER_LIMIT)] | None = Field(
        None, description="Of all rollouts: how many to read; null for all."
    )


def wants_lines(request: Request) -> bool:
    """Tell whether a client asks for JSON Lines."""
    return JSON_LINES in request.headers.get("accept", "")


async def lines_of_rollouts(
    database: Transactions, wanted: RolloutPage, lines: Callable[[str], Awaitable[bytes]]
) -> Response:
    """Answer with the lines of rollouts; those of one rollout are in memory at once.

    A page that is not the last one has the header `x-agl-next`: the id of its last rollout, percent-encoded. It is a
    cursor: `after` it, the next page begins. Among several rollouts, one that is too large has a line with `detail`.

    Args:
        lines: reads the lines of a rollout.

    Raises:
        NotFound: there is no call of the rollout `after`.
        RolloutTooLarge: the one rollout that is wanted has more calls or ids than are read at once.
    """
    headers: dict[str, str] = {}
    if wanted.rollout_id is not None:
        return Response(await lines(wanted.rollout_id), media_type=JSON_LINES)
    limit = wanted.limit
    rollout_ids = await database.read(
        lambda connection: triplets.rollouts_of(
            connection, since=wanted.since, after=wanted.after, limit=None if limit is None else limit + 1
        )
    )
    if limit is not None and len(rollout_ids) > limit:
        del rollout_ids[limit:]
        headers[NEXT] = quote(rollout_ids[-1], safe="", errors="replace")

    return StreamingResponse(lines_of_each(rollout_ids, lines), media_type=JSON_LINES, headers=headers)


async def lines_of_each(rollout_ids: Sequence[str], lines: Callable[[str], Awaitable[bytes]]) -> AsyncIterator[bytes]:
    """Yield the lines of rollouts, one after the other; one that is too large has a line with `detail`."""
    for each in rollout_ids:
        try:
            yield await lines(each)
        except RolloutTooLarge as error:
            yield encode({"detail": str(error)}) + b"\n"
