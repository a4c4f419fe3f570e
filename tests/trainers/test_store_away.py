"""An `agl store` that is killed in the middle of a step: the step ends, and nothing is trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentlightning as agl
from agentlightning.trainers.groups import GroupReader
from agentlightning.trainers.trl import rollout_func
from tests.server.process import StoreServer
from tests.trainers.test_trl import TRAINER, agent


def test_a_step_of_trl_ends_and_the_next_one_trains_its_own_rollouts(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, agl.open_store(server.url) as store:

        def run(rollout: agl.Rollout) -> None:
            agent(rollout)
            if rollout.input == "6":
                server.kill()

        with pytest.raises(agl.StoreUnavailable, match=server.url):
            rollout_func(store, run, workers=1)(["5", "6"], TRAINER)
        server.start()
        lost = {each.rollout_id for each in store.query_rollouts()}
        found = rollout_func(store, agent)(["5", "6"], TRAINER)

    assert len(lost) == 2
    assert lost.isdisjoint(found["rollout_id"])
    assert found["completion_ids"] == [[5, 3, 4, 5], [6, 3, 4, 6]]


def test_a_reader_goes_on_with_the_group_that_it_could_not_read(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, agl.open_store(server.url) as store:
        rollouts = [store.start_rollout(task, mode="train") for task in "5566"]
        for rollout in rollouts:
            agent(rollout)
            rollout.finish("succeeded")
        reader = GroupReader(store, 2)
        first = reader.read(limit=1)
        server.kill()
        with pytest.raises(agl.StoreUnavailable, match=server.url):
            reader.read()
        server.start()
        others = reader.read()

    assert [each for group in [*first, *others] for each in group.rollout_ids] == [each.rollout_id for each in rollouts]
