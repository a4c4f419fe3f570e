"""The route that deletes all rollouts that match filters, and tells how far it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from agentlightning.errors import RolloutUnderWay, StoreRefused, StoreUnavailable
from agentlightning.server.answers import encode
from agentlightning.server.limits import BATCH_LIMIT
from agentlightning.server.routes.common import Database, errors, router
from agentlightning.server.routes.lines import JSON_LINES
from agentlightning.server.schemas import Id, Seconds, Sent, example
from agentlightning.store.filters import PruneFilters

__all__ = ["routes"]

routes = router("rollouts")

LINES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What was done so far, after each step; the last line is the result, or "
        "a `detail` beside the name of the `error`",
        "content": {JSON_LINES: {"schema": {"type": "string"}}},
    }
}


# A misspelt filter would leave the others to select more than was meant, a misspelt `dry_run` delete it.
class Prune(Sent, extra="forbid"):
    """Rollouts to delete: those that have ended and match all filters; without any, only what nothing refers to."""

    model_config = example(older_than=604800.0, dry_run=True)

    rollout_ids: list[Id] | None = Field(None, max_length=BATCH_LIMIT)
    status_in: list[Literal["failed", "succeeded", "cancelled"]] | None = Field(None, max_length=64)
    older_than: Seconds | None = Field(
        None,
        description="Seconds: only those that ended longer ago. If it is the only filter, also rollouts that were "
        "recorded but never created, and calls and spans that name no rollout.",
    )
    dry_run: bool = Field(False, description="Only count what would be deleted.")

    def filters(self) -> PruneFilters:
        return {"rollout_ids": self.rollout_ids, "status_in": self.status_in, "older_than": self.older_than}


@routes.post("/prune", response_class=Response, responses={**LINES, **errors(409)})
async def prune(request: Request, body: Prune, database: Database) -> Response:
    """Delete all rollouts that match, and what nothing refers to then; goes on while the client reads."""
    steps = database.prune(body.filters(), dry_run=body.dry_run)
    # Before the answer begins, so that a refusal has a status of its own.
    first = await anext(steps)

    async def lines() -> AsyncIterator[bytes]:
        yield encode(asdict(first)) + b"\n"
        try:
            async for each in steps:
                if request.app.state.is_stopping():
                    raise StoreUnavailable("the store is being stopped")
                yield encode(asdict(each)) + b"\n"
        except (RolloutUnderWay, StoreRefused, StoreUnavailable) as error:
            yield encode({"detail": str(error), "error": type(error).__name__}) + b"\n"

    return StreamingResponse(lines(), media_type=JSON_LINES)
