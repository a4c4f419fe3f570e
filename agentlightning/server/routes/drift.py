"""The route of drift: where the prompts of attempts break the context that they should extend, and why."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response
from pydantic import ConfigDict, Field

from agentlightning.server.answers import encode
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.routes.lines import JSON_LINES, RolloutPage, lines_of_rollouts
from agentlightning.store import drift

__all__ = ["routes"]

routes = router("drift")


class QueryDrift(RolloutPage):
    """Filters of rollouts, and of their calls."""

    # A misspelt filter would match everything.
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="Only calls of this model.")


_LINES = {JSON_LINES: {"schema": {"type": "string", "description": "An attempt a line, with its breaks."}}}


@routes.get(
    "/drift",
    response_class=Response,
    responses={200: {"description": "Attempts, with their breaks.", "content": _LINES}, **errors(404)},
)
async def query_drift(wanted: Annotated[QueryDrift, Query()], database: Database) -> Response:
    """Find where the prompts of attempts break the context that they should extend, and why, as JSON Lines."""

    async def lines(rollout_id: str) -> bytes:
        material = await database.read(lambda connection: drift.read(connection, rollout_id, wanted.attempt_id))
        return await database.run(
            lambda: b"".join(encode(each.as_dict()) + b"\n" for each in drift.analyse_all(material, wanted.model))
        )

    return await lines_of_rollouts(database, wanted, lines)
