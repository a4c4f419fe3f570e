"""Complete groups of rollouts, each read once: for trainers that read a store on which runners write meanwhile."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

from agentlightning.errors import RolloutTooLarge
from agentlightning.rollout_records import FINISHED, Mode, Rollout
from agentlightning.store import Store
from agentlightning.trainers._rows import masked
from agentlightning.trajectory import MergeOptions, Trajectory, group_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Group", "GroupReader", "ReaderState"]

logger = logging.getLogger(__name__)

PAGE, OVERLAP = 1000, 100
# Seconds. PostgreSQL's transactions begin in another order than they are committed in, and clocks of hosts differ.
MARGIN = 600.0


@dataclass(slots=True)
class Group:
    """Rollouts of one task that have all ended.

    Attributes:
        key: the `group` of their rows, see `group_of`; for a rollout without one, its id.
        rollout_ids: all of them, in the order in which they were created. Less than the size only where that was asked
            for, or the group was overdue.
        rows: of the latest attempt of each that succeeded and has a reward; where that was asked for, also those of the
            others, masked.
        masked: why the rows of a rollout are masked, by its id.
        left_out: why a rollout has no row here, by its id.
    """

    key: str
    rollout_ids: list[str]
    rows: list[Trajectory] = field(default_factory=list[Trajectory])
    masked: dict[str, str] = field(default_factory=dict[str, str])
    left_out: dict[str, str] = field(default_factory=dict[str, str])


class ReaderState(TypedDict):
    """The position of a reader: what it has returned; JSON, to be saved with a checkpoint of the model.

    Attributes:
        since: all rollouts that started before this time were returned; seconds since the epoch.
        given: ids of later ones that were.
    """

    since: float
    given: list[str]


class GroupReader:
    """Reads groups of a fixed size, each once: in the order in which rollouts were created, when all have ended.

    Rollouts of one task are grouped in that order, so a task may be queued again in every epoch. After a crash, a
    reader with the `state` of the last checkpoint continues after what that checkpoint was trained on: no row is
    trained twice, and none is missed.

    Args:
        size: number of rollouts of a task that are trained together.
        state: of an earlier reader.
        mode: of the rollouts that are read; None for all.
        max_later: a group is overdue when so many rollouts that were created after it have been returned. It is
            returned as it is then, with a warning. So a rollout that never ends costs one group, and the state stays
            small.
    """

    def __init__(
        self,
        store: Store,
        size: int,
        state: ReaderState | None = None,
        *,
        mode: Mode | None = "train",
        max_later: int = 10_000,
    ) -> None:
        self._store, self._size, self._mode, self._max_later = store, size, mode, max_later
        self._since = 0.0 if state is None else state["since"]
        self._given = set[str]() if state is None else {*state["given"]}
        self._has_warned = False

    @property
    def state(self) -> ReaderState:
        """The groups returned until now."""
        return ReaderState(since=self._since, given=sorted(self._given))

    def read(
        self,
        *,
        failed: Literal["leave_out", "mask"] = "leave_out",
        limit: int | None = None,
        incomplete: bool = False,
        **options: Unpack[MergeOptions],
    ) -> list[Group]:
        """Return the groups that have become complete. A group without a row to train is left out, with a warning.

        Args:
            failed: what becomes of the rows of a rollout that did not succeed, or has no reward. `leave_out`: they are
                not in the group. `mask`: they are, with a mask of 0 throughout and the reward that they have, or 0.0:
                the group keeps its size, and the mean of its rewards counts the failure.
            limit: most groups to return, those first whose last rollout was created first; the next call returns
                others. `state` has all that were returned, so ask for what is trained before it is saved.
            incomplete: return all others, too, as they are: for when no more rollouts come.
            options: those of `store.trajectories()`, such as `weight_version` and `max_staleness`.

        Raises:
            StoreUnavailable: the store went away; nothing was returned, and the next call returns it.
        """
        rollouts = self._rollouts()
        candidates = self._candidates(rollouts, incomplete)
        ids = [rollout_id for group, _ in candidates for rollout_id in group.rollout_ids]
        written = {each.rollout_id: each for each in self._store.wait_for_rollouts(ids, 0, recorded=True)}
        taken: list[Group] = []
        trained: list[Group] = []
        for group, is_overdue in candidates:
            if limit is not None and len(trained) >= limit:
                break
            is_complete = len(group.rollout_ids) == self._size and written.keys() >= {*group.rollout_ids}
            if is_overdue and not is_complete:
                logger.warning("Group %r is overdue, and returned without what is missing of it.", group.key)
            if not (is_complete or is_overdue or incomplete):
                continue
            for rollout_id in group.rollout_ids:
                self._add(group, rollout_id, written.get(rollout_id), failed == "mask", options)
            taken.append(group)
            if {row.rollout_id for row in group.rows} - {*group.masked}:
                trained.append(group)
        self._advance(rollouts, taken)
        for group in taken:
            if group not in trained:
                reasons = "; ".join(dict.fromkeys([*group.masked.values(), *group.left_out.values()]))
                logger.warning("Group %r has no row to train: %s.", group.key, reasons)
        return trained

    def _rollouts(self) -> list[Rollout]:
        """Return the rollouts since the oldest that was not returned, in the order in which they were created."""
        found: list[Rollout] = []
        while True:
            # Newest first, and each page begins within the one before: rollouts come and are deleted meanwhile.
            offset = max(len(found) - OVERLAP, 0)
            page = self._store.query_rollouts(sort_order="desc", offset=offset, limit=PAGE)
            if found:
                ids = [each.rollout_id for each in page]
                if found[-1].rollout_id not in ids:
                    found = []
                    continue
                page = page[ids.index(found[-1].rollout_id) + 1 :]
            found += page
            if not page or page[-1].start_time < self._since - MARGIN:
                break
        if self._mode is not None and not self._has_warned and any(each.mode is None for each in found):
            self._has_warned = True
            logger.warning(
                "Rollouts without a mode are not read: create them with mode=%r, or pass mode=None.", self._mode
            )
        return [
            each
            for each in reversed(found)
            if each.start_time >= self._since and (self._mode is None or each.mode == self._mode)
        ]

    def _candidates(self, rollouts: Sequence[Rollout], incomplete: bool) -> list[tuple[Group, bool]]:
        """Return the groups that may be returned, by their last rollouts, each with whether it is overdue."""
        waiting: dict[str, list[Rollout]] = defaultdict(list)
        # How many rollouts that were created before a waiting one have been returned.
        earlier: dict[str, int] = {}
        returned = 0
        for rollout in rollouts:
            if rollout.rollout_id in self._given:
                returned += 1
            else:
                earlier[rollout.rollout_id] = returned
                waiting[group_of(rollout.input, rollout.metadata) or rollout.rollout_id].append(rollout)
        found: list[tuple[Group, bool]] = []
        for key, of_task in waiting.items():
            for start in range(0, len(of_task), self._size):
                some = of_task[start : start + self._size]
                is_overdue = returned - earlier[some[-1].rollout_id] >= self._max_later
                has_ended = len(some) == self._size and all(each.status in FINISHED for each in some)
                if has_ended or is_overdue or incomplete:
                    found.append((Group(key, [each.rollout_id for each in some]), is_overdue))
        positions = {each.rollout_id: position for position, each in enumerate(rollouts)}
        return sorted(found, key=lambda each: positions[each[0].rollout_ids[-1]])

    def _add(self, group: Group, rollout_id: str, written: Rollout | None, mask: bool, options: MergeOptions) -> None:
        if written is None:
            group.left_out[rollout_id] = "it has not ended, or its calls are not written"
            return
        try:
            rows = [*self._store.trajectories(rollout_id, "latest", **options)]
        except RolloutTooLarge as error:
            group.left_out[rollout_id] = str(error)
            return
        if written.status == "succeeded" and rows and rows[0].reward is not None:
            group.rows += rows
            return
        if written.status != "succeeded":
            reason = f"its status is {written.status}"
        else:
            reason = "it has no reward" if rows else "it has no row that the options allow"
        if mask and rows:
            group.rows += map(masked, rows)
            group.masked[rollout_id] = reason
        else:
            group.left_out[rollout_id] = reason

    def _advance(self, rollouts: Sequence[Rollout], taken: Sequence[Group]) -> None:
        given = self._given.union(rollout_id for group in taken for rollout_id in group.rollout_ids)
        waiting = [each.start_time for each in rollouts if each.rollout_id not in given]
        newest = max((each.start_time for each in rollouts), default=self._since)
        self._since = max(self._since, min([newest - MARGIN, *waiting]))
        self._given = {each.rollout_id for each in rollouts if each.start_time >= self._since} & given
