"""The table of rollouts, one page at a time, and the reason why a rollout has no data."""

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

__all__ = ["TableQuery", "absence_of", "table_of"]

ROWS_PER_PAGE = 100
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
"""Each column's name, its heading, and whether it holds numbers."""


class TableQuery(BaseModel):
    """The query parameters of the table."""

    q: Part = ""
    status: str = ""
    sort: Column = "started"
    order: Literal["asc", "desc"] = "desc"
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1
    live: Literal["on", "off"] = "on"

    def to_overview_query(self) -> OverviewQuery:
        return OverviewQuery(
            search=self.q.strip(),
            status=self.status if self.status in STATUSES else None,
            sort_by=self.sort,
            descending=self.order == "desc",
            limit=ROWS_PER_PAGE,
            offset=(self.page - 1) * ROWS_PER_PAGE,
            now=time.time(),
        )


@dataclass(frozen=True, slots=True)
class TableRow:
    """A rollout; if it has no data, with the reason."""

    rollout: Overview
    absence: Absence | None


def table_of(connection: Connection, query: TableQuery) -> dict[str, Any]:
    """Return the values for the template of the table."""
    found, total, unassigned_calls = overview.page(connection, query.to_overview_query())
    known = _in_store(connection, has_unassigned_calls=unassigned_calls > 0)
    return {
        "query": query,
        "rollouts": [TableRow(each, _absence(each, known)) for each in found],
        "total": total,
        "pages": max(-(-total // ROWS_PER_PAGE), 1),
        "columns": COLUMNS,
        "statuses": STATUSES,
        "unassigned_calls": unassigned_calls,
    }


def absence_of(connection: Connection, rollout_id: str, status: str | None) -> Absence | None:
    """Explain why a rollout has no finished generation; None if it has one."""
    counts = generations.tally(connection, {"rollout_id": rollout_id})
    has_unassigned_calls = generations.has_any(connection, {"rollout_id": None})
    return explain_absence(counts, **_in_store(connection, has_unassigned_calls), status=status)


def _absence(found: Overview, known: Mapping[str, bool]) -> Absence | None:
    if found.finished:
        return None
    return explain_absence({"finished": 0, "aborted or failed": found.calls}, **known, status=found.status)


def _in_store(connection: Connection, has_unassigned_calls: bool) -> dict[str, bool]:
    # The page reloads every few seconds: these stop at the first match, and count nothing.
    return {
        "has_any": generations.has_any(connection, {}),
        "has_unassigned_calls": has_unassigned_calls,
        "has_losses": generations.has_losses(connection),
    }
