"""The table of rollouts, one page at a time; the times of a rollout, and the reason why it has no data."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import Connection

from agentlightning.rollout_records import ROLLOUT_STATUSES
from agentlightning.server.page.conversation import Call
from agentlightning.server.schemas import Part
from agentlightning.server.summaries import mark
from agentlightning.store import generations, rollout_list
from agentlightning.store.absence import UNDER_WAY, Absence, explain_absence
from agentlightning.store.rollout_list import NAMES, RANGES, Column, ListQuery
from agentlightning.store.rollouts import attempts_of
from agentlightning.store.summaries import RECORDED, Summary

__all__ = ["TableQuery", "absence_of", "progress_of", "table_of"]

ROWS_PER_PAGE = 100
STATUSES = (*ROLLOUT_STATUSES, RECORDED)
SECONDS_SHOWN = 10
"""Seconds that the durations of rollouts under way are shown before they are counted anew."""
TIMES = ("queued", "started", "active")


class Heading(NamedTuple):
    """A column's heading, and whether it holds numbers."""

    text: str
    is_number: bool = False


HEADINGS: Mapping[Column, Heading] = {
    "task": Heading("Task"),
    "reward": Heading("Reward", True),
    "status": Heading("Status"),
    "calls": Heading("Calls", True),
    "prompt_tokens": Heading("Prompt tokens", True),
    "output_tokens": Heading("Output tokens", True),
    "breaks": Heading("Breaks", True),
    "duration": Heading("Took", True),
    "queued": Heading("Queued"),
    "started": Heading("Started"),
    "active": Heading("Last activity"),
    "latency": Heading("Seconds a call", True),
    "worker": Heading("Worker"),
    "model": Heading("Model"),
    "agent": Heading("Agent"),
    "version": Heading("Weights"),
    "step": Heading("Step"),
    "tags": Heading("Tags"),
}
"""All columns, in their order; the task is always the first."""
DEFAULT_COLUMNS: tuple[Column, ...] = (
    "reward",
    "status",
    "calls",
    "prompt_tokens",
    "output_tokens",
    "breaks",
    "duration",
    "queued",
    "started",
    "worker",
    "tags",
)

_RANGE = re.compile(r"^(?P<low>.*?)\s*(?:\.\.|\N{HORIZONTAL ELLIPSIS})\s*(?P<high>.*)$")


class TableQuery(BaseModel):
    """The query parameters of the table: they alone decide what it shows, so that its address can be shared."""

    q: Part = ""
    status: Part = ""
    worker: Part = ""
    model: Part = ""
    agent: Part = ""
    version: Part = ""
    step: Part = ""
    tag: Part = ""
    reward: Part = ""
    calls: Part = ""
    prompt_tokens: Part = ""
    output_tokens: Part = ""
    latency: Part = ""
    breaks: Part = ""
    duration: Part = ""
    queued: Part = ""
    started: Part = ""
    active: Part = ""
    columns: Annotated[list[Part], Query(max_length=len(HEADINGS))] = []
    sort: Column = "queued"
    order: Literal["asc", "desc"] = "desc"
    page: Annotated[int, Query(ge=1, le=1_000_000)] = 1
    live: Literal["on", "off"] = "on"
    seen: Part = ""

    @property
    def shown(self) -> tuple[Column, ...]:
        """The columns beside the task, in their order."""
        chosen: list[Column] = [each for each in HEADINGS if each in self.columns and each != "task"]
        return tuple(chosen) or DEFAULT_COLUMNS

    @property
    def given(self) -> dict[str, str]:
        """The filters that are set, by their names."""
        names = ("q", *NAMES, "tag", *RANGES)
        return {name: value for name in names if (value := str(getattr(self, name)).strip())}

    def address(self, **changes: Any) -> dict[str, Any]:
        """Return the parameters of an address of this table with changes, without those that say what holds anyway."""
        found: dict[str, Any] = self.given
        if self.shown != DEFAULT_COLUMNS:
            found["columns"] = [*self.shown]
        for name, default in (("sort", "queued"), ("order", "desc"), ("page", 1), ("live", "on")):
            found[name] = getattr(self, name)
            changes.setdefault(name, found[name])
            if changes[name] == default:
                changes[name] = None
        return {name: value for name, value in {**found, **changes}.items() if value not in (None, "")}

    def read(self) -> tuple[ListQuery, list[str]]:
        """Return the query of the store, and a sentence for each filter that cannot be read, which is left out."""
        problems: list[str] = []
        ranges: dict[Column, tuple[float | None, float | None]] = {}
        for name in RANGES:
            written = self.given.get(name)
            if written is not None:
                try:
                    ranges[name] = _range(written, is_time=name in TIMES)
                except ValueError as error:
                    problems.append(f"{HEADINGS[name].text}: {error}")
        names: dict[Column, str] = {name: self.given[name] for name in NAMES if name in self.given}
        if names.get("status", RECORDED) not in STATUSES:
            problems.append(f"Status: {names.pop('status')!r} is not one of {', '.join(STATUSES)}")
        query = ListQuery(
            search=self.q.strip(),
            ranges=ranges,
            names=names,
            tag=self.tag.strip(),
            sort_by=self.sort,
            descending=self.order == "desc",
            limit=ROWS_PER_PAGE,
            offset=(self.page - 1) * ROWS_PER_PAGE,
            now=time.time(),
        )
        return query, problems


def _range(written: str, *, is_time: bool) -> tuple[float | None, float | None]:
    """Read `low..high`, either of which may be missing, or one value; a day stands for all of it."""
    match = _RANGE.match(written)
    low, high = (match["low"], match["high"]) if match else (written, written)
    if not low and not high:
        raise ValueError(f"{written!r} is not a range; write it like {_example(is_time)}")
    read = _moment if is_time else _value
    return (read(low, False) if low else None), (read(high, True) if high else None)


def _value(written: str, _: bool) -> float:
    try:
        found = float(written)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{written!r} is not a number; write a range like {_example(False)}")
    return found


def _moment(written: str, is_end: bool) -> float:
    try:
        at = datetime.fromisoformat(written.strip().replace("Z", "+00:00").replace(" ", "T"))
    except ValueError:
        raise ValueError(f"{written!r} is not a time; write a range like {_example(True)}") from None
    at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
    try:
        if is_end and len(written.strip()) == len("2026-12-01"):
            at += timedelta(days=1)
        return at.timestamp()
    except OverflowError:
        raise ValueError(f"{written!r} is out of range") from None


def _example(is_time: bool) -> str:
    return "2026-12-01..2026-12-02T08:30 (UTC)" if is_time else "0.5.., ..1 or 0.2..0.8"


@dataclass(frozen=True, slots=True)
class TableRow:
    """A rollout; if it has no data, with the reason.

    Attributes:
        duration: seconds from its start to its end, or until now; None if it has not started.
        tags: its tags.
    """

    rollout: Summary
    duration: float | None
    tags: Sequence[str]
    absence: Absence | None


def table_of(connection: Connection, query: TableQuery) -> dict[str, Any]:
    """Return the values for the template of the table."""
    wanted, problems = query.read()
    found, total, unassigned_calls = rollout_list.page(connection, wanted)
    known = _in_store(connection, has_unassigned_calls=unassigned_calls > 0)
    rows = [
        TableRow(each, rollout_list.duration_of(each, wanted.now), each.tags.split("\n")[1:-1], _absence(each, known))
        for each in found
    ]
    is_moving = any(each.ended is None and each.started is not None for each in found)
    return {
        "query": query,
        "problems": problems,
        "rows": rows,
        "total": total,
        "pages": max(-(-total // ROWS_PER_PAGE), 1),
        "headings": HEADINGS,
        "names": {"status": STATUSES, **rollout_list.names_of(connection)},
        "is_filtered": wanted.is_filtered,
        "unassigned_calls": unassigned_calls,
        "mark": mark(connection, SECONDS_SHOWN if is_moving else None),
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
        found = rollout_list.call_times(connection, [rollout_id]).get(rollout_id)
        if found is None and calls:
            found = min(each.started for each in calls), max(each.finished for each in calls)
        return Progress(None, None, None) if found is None else Progress(None, found[0], found[1] - found[0])
    attempts = attempts_of(connection, rollout.key)
    if not attempts:
        return Progress(rollout.start_time, None, None)
    started = attempts[0].start_time
    ended = time.time() if rollout.end_time is None else rollout.end_time
    return Progress(rollout.start_time, started, max(ended - started, 0.0))


def _absence(found: Summary, known: Mapping[str, bool]) -> Absence | None:
    if found.finished:
        return None
    counts = {"finished": 0, "aborted or failed": found.calls}
    since = found.attempt_started if found.status in UNDER_WAY else None
    return explain_absence(counts, **known, status=found.status, seconds=_seconds_since(since))


def _seconds_since(start: float | None) -> float | None:
    return None if start is None else time.time() - start


def _in_store(connection: Connection, has_unassigned_calls: bool) -> dict[str, bool]:
    # The page reloads every few seconds: these stop at the first match, and count nothing.
    return {
        "has_any": generations.has_any(connection, {}),
        "has_unassigned_calls": has_unassigned_calls,
        "has_losses": generations.has_losses(connection),
    }
