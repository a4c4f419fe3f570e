"""The table of rollouts, one page at a time; the times of a rollout, and the reason why it has no data."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import Connection

from agentlightning.rollout_records import ROLLOUT_STATUSES
from agentlightning.server.page.conversation import Call
from agentlightning.server.schemas import Part
from agentlightning.store import generations, overview
from agentlightning.store.absence import Absence, explain_absence
from agentlightning.store.overview import RECORDED, Column, Overview, OverviewQuery
from agentlightning.store.rollouts import attempts_of

__all__ = ["TableQuery", "absence_of", "progress_of", "table_of"]

ROWS_PER_PAGE = 100
STATUSES = (*ROLLOUT_STATUSES, RECORDED)
COLUMNS: tuple[tuple[Column, str, bool], ...] = (
    ("rollout", "Rollout", False),
    ("status", "Status", False),
    ("calls", "Calls", True),
    ("prompt_tokens", "Prompt tokens", True),
    ("output_tokens", "Output tokens", True),
    ("reward", "Reward", True),
    ("breaks", "Breaks", True),
    ("queued", "Queued", False),
    ("started", "Started", False),
    ("duration", "Took", True),
)
"""Each column's name, its heading, and whether it holds numbers."""


class TableQuery(BaseModel):
    """The query parameters of the table."""

    q: Part = ""
    status: str = ""
    breaks: Literal["any", "some"] = "any"
    sort: Column = "queued"
    order: Literal["asc", "desc"] = "desc"
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1
    live: Literal["on", "off"] = "on"

    def to_overview_query(self) -> OverviewQuery:
        return OverviewQuery(
            search=self.q.strip(),
            status=self.status if self.status in STATUSES else None,
            broken=self.breaks == "some",
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


def absence_of(connection: Connection, rollout_id: str, rollout: Any | None) -> Absence | None:
    """Explain why a rollout has no finished generation; None if it has one.

    Args:
        rollout: its row with its latest attempt; None if it is known only from its calls and spans.
    """
    counts = generations.tally(connection, {"rollout_id": rollout_id})
    has_unassigned_calls = generations.has_any(connection, {"rollout_id": None})
    known = _in_store(connection, has_unassigned_calls)
    if rollout is None:
        return explain_absence(counts, **known, status=None)
    return explain_absence(counts, **known, status=rollout.status, seconds=_seconds_since(rollout.attempt_start_time))


@dataclass(frozen=True, slots=True)
class Progress:
    """The times when a rollout was queued and started, in seconds since the epoch, and how many seconds it took.

    Each is None if it has not happened; `took` lasts until now while the rollout is under way.
    """

    queued: float | None
    started: float | None
    took: float | None


def progress_of(connection: Connection, rollout_id: str, rollout: Any | None, calls: Sequence[Call]) -> Progress:
    """Return the times of a rollout, as the table has them.

    Args:
        rollout: its row; None if it is known only from its calls and spans.
        calls: its generations.
    """
    if rollout is None:
        found = overview.call_times(connection, [rollout_id]).get(rollout_id)
        if found is None and calls:
            found = min(each.started for each in calls), max(each.finished for each in calls)
        return Progress(None, None, None) if found is None else Progress(None, found[0], found[1] - found[0])
    attempts = attempts_of(connection, rollout.key)
    if not attempts:
        return Progress(rollout.start_time, None, None)
    started = attempts[0].start_time
    ended = time.time() if rollout.end_time is None else rollout.end_time
    return Progress(rollout.start_time, started, max(ended - started, 0.0))


def _absence(found: Overview, known: Mapping[str, bool]) -> Absence | None:
    if found.finished:
        return None
    counts = {"finished": 0, "aborted or failed": found.calls}
    return explain_absence(counts, **known, status=found.status, seconds=_seconds_since(found.attempt_started))


def _seconds_since(start: float | None) -> float | None:
    return None if start is None else time.time() - start


def _in_store(connection: Connection, has_unassigned_calls: bool) -> dict[str, bool]:
    # The page reloads every few seconds: these stop at the first match, and count nothing.
    return {
        "has_any": generations.has_any(connection, {}),
        "has_unassigned_calls": has_unassigned_calls,
        "has_losses": generations.has_losses(connection),
    }
