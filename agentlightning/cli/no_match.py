"""The message of `agl export` when nothing matches: what each filter matches alone, and what is there instead."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from typing import Any

from agentlightning.store import Store

__all__ = ["explain"]

NOUNS = {"rollout_id": "rollouts", "attempt_id": "attempts", "session_id": "sessions", "model": "models"}
TIMES = ("since", "until")
NANOSECONDS = 1_000_000_000
LOOKED_AT = 100
SHOWN = 5


def explain(store: Store, what: str, filters: Mapping[str, Any]) -> str:
    """Say that no record matches, and what the store has instead.

    Args:
        what: the kind of records, in the plural. All are made of generations, which the store counts.
        filters: those of the command, by their names in `Filters`.
    """
    total = sum(store.tally().values())
    if not total:
        return f"0 {what}: the store has no generations"
    if not filters:
        return f"0 {what}: the store has {_count(total)}, and none of them is a finished call that names a rollout"
    parts = [f"0 {what} match {' '.join(_option(*each) for each in filters.items())}"]
    alone = {name: sum(store.tally(**{name: value}).values()) for name, value in filters.items()}  # type: ignore[misc]
    counted = [f"{count} match {_option(name, filters[name])}" for name, count in alone.items()]
    parts.append(f"the store has {_count(total)}, of which {' and '.join(counted)}")
    parts.extend(_others(store, [name for name, count in alone.items() if not count]))
    return "; ".join(parts)


def _others(store: Store, names: list[str]) -> list[str]:
    """Name values that the filters could have had instead."""
    found: dict[str, dict[str, None]] = {name: {} for name in names if name in NOUNS}
    first = None
    for generation in islice(store.generations(), LOOKED_AT):
        first = first or generation
        for name, values in found.items():
            if (value := getattr(generation, name)) is not None:
                values[value] = None
    parts = [
        f"the first {NOUNS[name]} there are {', '.join([*list(values)[:SHOWN], *['...'][: len(values) > SHOWN]])}"
        if values
        else f"the first calls there name no {NOUNS[name][:-1]}"
        for name, values in found.items()
    ]
    if first is not None and any(name in TIMES for name in names):
        parts.append(f"the first finished at {_time(first.finished_at)}")
    return parts


def _count(total: int) -> str:
    return f"{total} generation{'s' if total != 1 else ''}"


def _option(name: str, value: Any) -> str:
    return f"--{name.removesuffix('_id')} {_time(value) if name in TIMES else value}"


def _time(nanoseconds: int) -> str:
    return datetime.fromtimestamp(nanoseconds / NANOSECONDS).astimezone().isoformat(timespec="seconds")
