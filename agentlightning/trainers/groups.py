"""Complete groups of rollouts, each read once: for trainers that read a store on which runners write meanwhile."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from agentlightning.rollout_records import FINISHED, Rollout
from agentlightning.store import Store
from agentlightning.trajectory import MergeOptions, Trajectory, group_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Group", "GroupReader", "ReaderState"]

logger = logging.getLogger(__name__)

PAGE = 1000


@dataclass(slots=True)
class Group:
    """Rollouts of one task that have all ended.

    Attributes:
        key: the `group` of their rows; see `group_of`.
        rollout_ids: all of them, in the order in which they were created.
        rows: of the latest attempt of each that succeeded and has a reward.
        left_out: why each of the others has no row here, by its id.
    """

    key: str | None
    rollout_ids: list[str]
    rows: list[Trajectory] = field(default_factory=list[Trajectory])
    left_out: dict[str, str] = field(default_factory=dict[str, str])


class ReaderState(TypedDict):
    """What a reader has given out; JSON, to be saved with a checkpoint of the model.

    Attributes:
        offset: number of rollouts, in the order in which they were created, of which all were given out.
        given: ids of later ones that were.
    """

    offset: int
    given: list[str]


class GroupReader:
    """Reads groups of a fixed size, each once: in the order in which rollouts were created, when all have ended.

    Rollouts of one task are grouped in that order, so a task may be queued again in every epoch. After a crash, a
    reader with the `state` of the last checkpoint goes on behind what that checkpoint was trained on: no row is trained
    twice, and none is missed. No rollout may be deleted in between.

    Args:
        size: number of rollouts of a task that are trained together.
        state: of an earlier reader.
    """

    def __init__(self, store: Store, size: int, state: ReaderState | None = None) -> None:
        self._store, self._size = store, size
        self._offset = 0 if state is None else state["offset"]
        self._given = set[str]() if state is None else {*state["given"]}

    @property
    def state(self) -> ReaderState:
        """What has been given out until now."""
        return ReaderState(offset=self._offset, given=sorted(self._given))

    def read(self, **options: Unpack[MergeOptions]) -> list[Group]:
        """Return the groups that have become complete. A group without any row is left out, with a warning.

        Args:
            options: those of `store.trajectories()`, such as `weight_version` and `max_staleness`.

        Raises:
            StoreUnavailable: the store went away; nothing was given out, and the next call returns it.
        """
        rollouts = self._rollouts()
        waiting: dict[str | None, list[Rollout]] = defaultdict(list)
        for rollout in rollouts:
            if rollout.rollout_id not in self._given:
                waiting[group_of(rollout.input, rollout.metadata)].append(rollout)
        candidates = [
            Group(key, [each.rollout_id for each in found[start : start + self._size]])
            for key, found in waiting.items()
            for start in range(0, len(found) - self._size + 1, self._size)
            if all(each.status in FINISHED for each in found[start : start + self._size])
        ]
        ids = [rollout_id for group in candidates for rollout_id in group.rollout_ids]
        written = {each.rollout_id: each for each in self._store.wait_for_rollouts(ids, 0, recorded=True)}
        complete = [group for group in candidates if written.keys() >= {*group.rollout_ids}]
        for group in complete:
            for rollout_id in group.rollout_ids:
                self._add(group, written[rollout_id], options)
        self._advance(rollouts, complete)
        for group in complete:
            if not group.rows:
                logger.warning("Group %r has no row to train: %s.", group.key, "; ".join({*group.left_out.values()}))
        return [group for group in complete if group.rows]

    def _rollouts(self) -> list[Rollout]:
        """Return the rollouts that have not all been given out, in the order in which they were created."""
        found: list[Rollout] = []
        while page := self._store.query_rollouts(offset=self._offset + len(found), limit=PAGE):
            found += page
        return found

    def _add(self, group: Group, rollout: Rollout, options: MergeOptions) -> None:
        if rollout.status != "succeeded":
            group.left_out[rollout.rollout_id] = f"its status is {rollout.status}"
            return
        rows = [*self._store.trajectories(rollout.rollout_id, "latest", **options)]
        if not rows:
            group.left_out[rollout.rollout_id] = "it has no row that the options allow"
        elif rows[0].reward is None:
            group.left_out[rollout.rollout_id] = "it has no reward"
        else:
            group.rows += rows

    def _advance(self, rollouts: Sequence[Rollout], complete: Sequence[Group]) -> None:
        self._given.update(rollout_id for group in complete for rollout_id in group.rollout_ids)
        for rollout in rollouts:
            if rollout.rollout_id not in self._given:
                break
            self._given.remove(rollout.rollout_id)
            self._offset += 1
