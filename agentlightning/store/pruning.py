"""All rollouts deleted that match filters, and then what nothing refers to, told step by step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain

from agentlightning.rollout_records import Pruned
from agentlightning.store import deletion
from agentlightning.store.database import Database
from agentlightning.store.filters import PruneFilters, check_prune_filters

__all__ = ["prune"]


def prune(database: Database, filters: PruneFilters, *, dry_run: bool) -> Iterator[Pruned]:
    """Delete, or only count, as `Store.prune` says."""
    check_prune_filters(filters)
    deletion.check(database, filters.get("rollout_ids") or ())
    # Before the search, which may take long: whoever waits learns that nothing is refused.
    yield Pruned(0)
    selection = deletion.Selection(())
    given = {name: value for name, value in filters.items() if value is not None}
    if given:
        age = filters.get("older_than")
        selection = deletion.select(
            database,
            rollout_ids=filters.get("rollout_ids"),
            statuses=filters.get("status_in"),
            before=None if age is None else time.time() - age,
        )
    rollouts = len(selection.rollout_ids)
    if dry_run:
        yield Pruned(rollouts)
        for counted in deletion.estimate(database, selection):
            yield _pruned(rollouts, counted)
        return
    size_before = database.size()
    deleted = Counter[str]()
    yield Pruned(rollouts, size_before=size_before)
    for some in chain(deletion.delete(database, selection), deletion.finish(database)):
        deleted.update(some)
        yield _pruned(rollouts, deleted, size_before)
    yield _pruned(rollouts, deleted, size_before, database.size(), database.space_advice())


def _pruned(
    rollouts: int,
    counted: Counter[str],
    size_before: int | None = None,
    size_after: int | None = None,
    advice: str | None = None,
) -> Pruned:
    records = {kind: counted[kind] for kind in deletion.KINDS}
    return Pruned(rollouts, records, counted["bytes"], size_before, size_after, advice)
