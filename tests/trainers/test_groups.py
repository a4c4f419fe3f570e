"""Groups are given out when all of their rollouts have ended, each once, also to a trainer that was started again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import agentlightning as agl
from agentlightning.trainers.groups import GroupReader
from tests.trainers.test_trl import agent, answered

pytestmark = pytest.mark.tier("check")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[agl.Store]:
    with agl.open_store(str(tmp_path / "store.db")) as store:
        yield store


def started(store: agl.Store, *inputs: str) -> list[agl.Rollout]:
    return [store.start_rollout(each) for each in inputs]


def ended(rollouts: Sequence[agl.Rollout]) -> None:
    for rollout in rollouts:
        agent(rollout)
        rollout.finish("succeeded")


def ids(rollouts: Sequence[agl.Rollout]) -> list[str]:
    return [each.rollout_id for each in rollouts]


def test_a_group_is_given_out_when_all_of_its_rollouts_have_ended(store: agl.Store) -> None:
    rollouts = started(store, "5", "6", "5", "6")
    reader = GroupReader(store, 2)
    ended(rollouts[1:])

    [group] = reader.read()
    assert (group.rollout_ids, group.left_out) == (ids([rollouts[1], rollouts[3]]), {})
    assert [row.rollout_id for row in group.rows] == group.rollout_ids
    assert reader.read() == []

    ended(rollouts[:1])
    [group] = reader.read()
    assert group.rollout_ids == ids([rollouts[0], rollouts[2]])
    assert reader.state == {"offset": 4, "given": []}


def test_a_task_that_is_queued_again_is_a_group_of_its_own(store: agl.Store) -> None:
    rollouts = started(store, *"5555")
    ended(rollouts)

    assert [group.rollout_ids for group in GroupReader(store, 2).read()] == [ids(rollouts[:2]), ids(rollouts[2:])]


def test_after_a_crash_nothing_is_given_out_twice_and_nothing_is_missed(store: agl.Store) -> None:
    rollouts = started(store, "5", "6", "6", "5")
    ended(rollouts[1:3])
    reader = GroupReader(store, 2)
    assert [group.rollout_ids for group in reader.read()] == [ids(rollouts[1:3])]
    saved = json.loads(json.dumps(reader.state))
    ended([rollouts[0], rollouts[3]])
    # What is read behind the checkpoint is lost with the trainer, and is read again.
    assert len(reader.read()) == 1

    again = GroupReader(store, 2, saved)

    assert [group.rollout_ids for group in again.read()] == [ids([rollouts[0], rollouts[3]])]
    assert again.read() == []


def test_what_failed_is_named_in_the_group(store: agl.Store) -> None:
    good, failed, unrewarded, empty = rollouts = started(store, *"5555")
    ended([good])
    failed.finish("failed")
    answered(unrewarded, ([1], [2]))
    unrewarded.finish("succeeded")
    empty.reward(1.0)
    empty.finish("succeeded")

    [group] = GroupReader(store, 4).read()

    assert [row.rollout_id for row in group.rows] == ids(rollouts[:1])
    assert group.left_out == {
        failed.rollout_id: "its status is failed",
        unrewarded.rollout_id: "it has no reward",
        empty.rollout_id: "it has no row that the options allow",
    }


def test_an_empty_group_is_left_out_with_a_warning(store: agl.Store, caplog: pytest.LogCaptureFixture) -> None:
    for rollout in started(store, "5", "5"):
        rollout.finish("failed")
    reader = GroupReader(store, 2)

    assert reader.read() == []
    assert "has no row to train: its status is failed." in caplog.text
    assert reader.state["offset"] == 2


def test_rows_of_older_weights_are_left_out_by_an_option(store: agl.Store) -> None:
    ended(started(store, "5", "5"))

    assert GroupReader(store, 2).read(weight_version="7", max_staleness=1) == []


def test_a_store_that_goes_away_gives_nothing_out(store: agl.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(started(store, "5", "5"))
    reader = GroupReader(store, 2)

    def away(*_: object, **options: object) -> None:
        raise agl.StoreUnavailable("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(store, "trajectories", away)
        with pytest.raises(agl.StoreUnavailable):
            reader.read()

    assert len(reader.read()) == 1
