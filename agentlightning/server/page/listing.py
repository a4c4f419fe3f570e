"""The table of rollouts, a page of it at a time, and why a rollout has nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import Connection

from agentlightning.rollout import ROLLOUT_STATUSES
from agentlightning.server.schemas import Part
from agentlightning.store import generations, overview
from agentlightning.store.absence import Absence, explain_absence
from agentlightning.store.overview import RECORDED, Column, Overview, OverviewQuery

__all__ = ["Listing", "of_page", "why"]

AT_ONCE = 100
STATUSES = (*ROLLOUT_STATUSES, RECORDED)
COLUMNS: tuple[tuple[Column, str, bool], ...] = (
    ("rollout", "Rollout", False),
    ("status", "Status", False),
    ("calls", "Calls", True),
    ("prompt_tokens", "Prompt tokens", True),
    ("output_tokens", "Output tokens", True),
    ("reward", "Reward", True),
    ("started", "Started (UTC)", False),
    ("duration", "Duration", True),
)
"""Each with its heading, and whether it has numbers."""


class Listing(BaseModel):
    """What the table is asked for, as its address has it."""

    q: Part = ""
    status: str = ""
    sort: Column = "started"
    order: Literal["asc", "desc"] = "desc"
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1
    live: Literal["on", "off"] = "on"

    def asked(self) -> OverviewQuery:
        return OverviewQuery(
            search=self.q.strip(),
            status=self.status if self.status in STATUSES else None,
            sort_by=self.sort,
            descending=self.order == "desc",
            limit=AT_ONCE,
            offset=(self.page - 1) * AT_ONCE,
            now=time.time(),
        )


@dataclass(frozen=True, slots=True)
class Listed:
    """A rollout, and why it has nothing, where it has nothing."""

    rollout: Overview
    absence: Absence | None


def of_page(connection: Connection, listing: Listing) -> dict[str, Any]:
    """What the table shows."""
    found, total, unassigned_calls = overview.page(connection, listing.asked())
    known = _in_store(connection, has_unassigned_calls=unassigned_calls > 0)
    return {
        "asked": listing,
        "rollouts": [Listed(each, _absence(each, known)) for each in found],
        "total": total,
        "pages": max(-(-total // AT_ONCE), 1),
        "columns": COLUMNS,
        "statuses": STATUSES,
        "without_rollout": unassigned_calls,
    }


def why(connection: Connection, rollout_id: str, status: str | None) -> Absence | None:
    """Why no generation of a rollout has finished; None where one has."""
    counts = generations.tally(connection, {"rollout_id": rollout_id})
    has_unassigned_calls = generations.has_any(connection, {"rollout_id": None})
    return explain_absence(counts, **_in_store(connection, has_unassigned_calls), status=status)


def _absence(found: Overview, known: Mapping[str, bool]) -> Absence | None:
    if found.finished:
        return None
    return explain_absence({"finished": 0, "aborted or failed": found.calls}, **known, status=found.status)


def _in_store(connection: Connection, has_unassigned_calls: bool) -> dict[str, bool]:
    # A page asks every few seconds: of each there is no more than has to be found, and nothing is counted.
    return {
        "has_any": generations.has_any(connection, {}),
        "has_unassigned_calls": has_unassigned_calls,
        "has_losses": generations.has_losses(connection),
    }
