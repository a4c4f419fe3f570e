"""The message of `agl export` when nothing matches: what each filter matches alone, and what is there instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import islice
from typing import Any

from agentlightning.generation import Generation
from agentlightning.store import Filters, Store

__all__ = ["explain"]

NOUNS = {
    "rollout_id": "rollout",
    "attempt_id": "attempt",
    "session_id": "session",
    "model": "model",
    "agent_id": "agent",
    "parent_agent_id": "parent agent",
    "purpose": "purpose",
}
TIMES = ("since", "until")
NANOSECONDS = 1_000_000_000
LOOKED_AT = 100
SHOWN = 5


def explain(store: Store, what: str, filters: Mapping[str, Any]) -> str:
    """Say that no record matches, and what the store has instead.

    Args:
        what: the kind of records, in the plural. All are made of generations, which the store counts.
        filters: those of the command, by their names. Those that are also in `Filters` are counted alone.
    """
    total = sum(store.tally().values())
    if not total:
        return f"0 {what}: the store has no generations"
    if not filters:
        return f"0 {what}: the store has {_count(total)}, and none of them is a finished call that names a rollout"
    parts = [f"0 {what} match {' '.join(_option(*each) for each in filters.items())}"]
    counted: Any = {name: value for name, value in filters.items() if name in Filters.__annotations__}
    alone = {name: sum(store.tally(**{name: value}).values()) for name, value in counted.items()}  # type: ignore[misc]
    found: Any = {name: value for name, value in counted.items() if alone[name]}
    parts.append(f"the store has {_count(total)}")
    if len(filters) > 1 and counted:
        matches = [f"{alone[name]} match {_option(name, value)}" for name, value in counted.items()]
        parts[-1] += f", of which {' and '.join(matches)}"
    parts.extend(_others(store.generations(**found), [name for name in counted if name not in found]))
    return "; ".join(parts)


def _others(generations: Iterator[Generation], names: list[str]) -> list[str]:
    """Name values that the filters could have had instead, from generations that match the other filters."""
    values: dict[str, dict[str, None]] = {name: {} for name in names if name in NOUNS}
    first = None
    for generation in islice(generations, LOOKED_AT):
        first = first or generation
        for name, of_name in values.items():
            if (value := getattr(generation, name)) is not None:
                of_name[value] = None
    parts = []
    for name, of_name in values.items():
        shown = ", ".join([*of_name][:SHOWN]) + (", ..." if len(of_name) > SHOWN else "")
        noun = NOUNS[name]
        parts.append(f"the first {noun}s there are {shown}" if shown else f"the first calls there name no {noun}")
    if first is not None and any(name in TIMES for name in names):
        parts.append(f"the first finished at {_time(first.finished_at)}")
    return parts


def _count(total: int) -> str:
    return f"{total} generation{'s' if total != 1 else ''}"


def _option(name: str, value: Any) -> str:
    option = f"--{name.removesuffix('_id').replace('_', '-')}"
    return option if value is True else f"{option} {_time(value) if name in TIMES else value}"


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / NANOSECONDS).astimezone().isoformat(timespec="seconds")
