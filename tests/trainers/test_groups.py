"""Groups are returned when all of their rollouts have ended, each once, also to a trainer that was started again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

import agentlightning as agl
from agentlightning.rollout_records import Mode, NewRollout
from agentlightning.store import lifecycle
from agentlightning.store.database_store import DatabaseStore
from agentlightning.trainers.groups import GroupReader
from tests.common.environments import CHECKOUT
from tests.common.postgresql import PostgresServer
from tests.trainers.test_trl import agent, answered

pytestmark = pytest.mark.tier("check")


@pytest.fixture
def store(new_store: Callable[[Path], str], tmp_path: Path) -> Iterator[agl.Store]:
    with agl.open_store(new_store(tmp_path / "store.db")) as store:
        yield store


def started(store: agl.Store, *inputs: str, mode: Mode | None = "train") -> list[agl.Rollout]:
    return [store.start_rollout(each, mode=mode) for each in inputs]


def ended(rollouts: Sequence[agl.Rollout]) -> None:
    for rollout in rollouts:
        agent(rollout)
        rollout.finish("succeeded")


def ids(rollouts: Sequence[agl.Rollout]) -> list[str]:
    return [each.rollout_id for each in rollouts]


def test_a_group_is_returned_when_all_of_its_rollouts_have_ended(store: agl.Store) -> None:
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
    assert reader.read() == []


def test_a_limited_read_leaves_later_groups_to_the_next_one(store: agl.Store) -> None:
    ended(rollouts := started(store, *"556677"))
    reader = GroupReader(store, 2)

    assert [group.rollout_ids for group in reader.read(limit=1)] == [ids(rollouts[:2])]
    again = GroupReader(store, 2, reader.state)
    assert [group.rollout_ids for group in again.read()] == [ids(rollouts[2:4]), ids(rollouts[4:])]


def test_the_group_comes_first_whose_last_rollout_was_created_first(store: agl.Store) -> None:
    ended(rollouts := started(store, *"566577"))
    reader = GroupReader(store, 2)

    assert [group.rollout_ids for group in reader.read(limit=1)] == [ids(rollouts[1:3])]
    assert [group.rollout_ids for group in reader.read()] == [ids([rollouts[0], rollouts[3]]), ids(rollouts[4:])]


def test_groups_without_a_row_do_not_count_to_the_limit(store: agl.Store) -> None:
    for rollout in started(store, *"5566"):
        rollout.finish("failed")
    ended(rollouts := started(store, *"7788"))
    reader = GroupReader(store, 2)

    assert [group.rollout_ids for group in reader.read(limit=1)] == [ids(rollouts[:2])]
    assert [group.rollout_ids for group in reader.read(limit=1)] == [ids(rollouts[2:])]
    assert reader.read(limit=1) == []


def test_a_rollout_that_is_too_large_is_left_out(store: agl.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    large, good = started(store, "5", "5")
    ended([large, good])
    trajectories = store.trajectories

    def read(rollout_id: str, *options: Any, **more: Any) -> Iterator[agl.Trajectory]:
        if rollout_id == large.rollout_id:
            raise agl.RolloutTooLarge("the rollout has too many calls")
        return trajectories(rollout_id, *options, **more)

    monkeypatch.setattr(store, "trajectories", read)
    reader = GroupReader(store, 2)

    [group] = reader.read()

    assert [row.rollout_id for row in group.rows] == [good.rollout_id]
    assert group.left_out == {large.rollout_id: "the rollout has too many calls"}
    assert reader.read() == []


def test_a_task_that_is_queued_again_is_a_group_of_its_own(store: agl.Store) -> None:
    rollouts = started(store, *"5555")
    ended(rollouts)

    assert [group.rollout_ids for group in GroupReader(store, 2).read()] == [ids(rollouts[:2]), ids(rollouts[2:])]


def test_after_a_crash_nothing_is_returned_twice_and_nothing_is_missed(store: agl.Store) -> None:
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


def test_what_failed_is_masked_where_that_is_asked_for(store: agl.Store) -> None:
    good, failed, unrewarded, empty = rollouts = started(store, *"5555")
    ended([good])
    agent(failed)
    failed.finish("failed")
    answered(unrewarded, ([1], [2]))
    unrewarded.finish("succeeded")
    empty.finish("failed")

    [group] = GroupReader(store, 4).read(failed="mask")

    assert [row.rollout_id for row in group.rows] == ids(rollouts[:3])
    assert [row.reward for row in group.rows] == [0.5, 0.5, 0.0]
    assert [sum(row.response_mask) for row in group.rows] == [3, 0, 0]
    assert not any(answer.is_trained for row in group.rows[1:] for answer in row.spans)
    assert group.masked == {failed.rollout_id: "its status is failed", unrewarded.rollout_id: "it has no reward"}
    assert group.left_out == {empty.rollout_id: "its status is failed"}


@pytest.mark.parametrize("failed", ["leave_out", "mask"])
def test_a_group_without_a_row_to_train_is_left_out_with_a_warning(
    store: agl.Store, caplog: pytest.LogCaptureFixture, failed: Literal["leave_out", "mask"]
) -> None:
    for rollout in started(store, "5", "5"):
        agent(rollout)
        rollout.finish("failed")
    reader = GroupReader(store, 2)

    assert reader.read(failed=failed) == []
    assert "has no row to train: its status is failed." in caplog.text
    assert len(reader.state["given"]) == 2


def test_a_rollout_that_is_committed_late_is_neither_missed_nor_are_others_returned_twice(
    postgresql: PostgresServer,
) -> None:
    """PostgreSQL numbers rollouts before their transactions are committed."""
    url = postgresql.new_database()
    with agl.open_store(url) as store, agl.open_store(url) as other:
        assert isinstance(other, DatabaseStore)
        reader = GroupReader(store, 1)
        with other._database.writing() as connection:
            late = lifecycle.start(connection, NewRollout("5", mode="train"), None)
            ended(early := started(store, "5", "5"))
            assert [group.rollout_ids for group in reader.read()] == [[each] for each in ids(early)]
            saved = reader.state
        rollout = store.get_rollout_by_id(late)
        assert rollout is not None
        ended([rollout])

        assert [group.rollout_ids for group in reader.read()] == [[late]]
        assert [group.rollout_ids for group in GroupReader(store, 1, saved).read()] == [[late]]
        assert reader.read() == []


def test_rollouts_that_are_deleted_cost_no_others(store: agl.Store) -> None:
    ended(rollouts := started(store, *"5566"))
    reader = GroupReader(store, 2)
    assert len(reader.read()) == 2
    ended(more := started(store, "5", "5"))
    store.delete_rollouts(ids(rollouts[:3]))

    assert [group.rollout_ids for group in reader.read()] == [ids(more)]
    assert reader.read() == []


def test_rollouts_of_an_evaluation_are_not_trained(store: agl.Store, caplog: pytest.LogCaptureFixture) -> None:
    ended(started(store, "5", "5", mode="val"))
    ended(without := started(store, "5", mode=None))
    ended(trained := started(store, "5"))

    assert [group.rollout_ids for group in GroupReader(store, 1).read()] == [ids(trained)]
    assert caplog.text.count("Rollouts without a mode are not read: create them with mode='train'") == 1
    everything = GroupReader(store, 1, mode=None).read()
    assert len(everything) == 4
    assert everything[2].rollout_ids == ids(without)


def test_rollouts_without_input_are_no_group(store: agl.Store) -> None:
    rollouts = [store.start_rollout(None, mode="train") for _ in range(2)]
    for rollout in rollouts:
        answered(rollout, ([1], [2]))
        rollout.reward(1.0)
        rollout.finish("succeeded")
    reader = GroupReader(store, 2)

    assert reader.read() == []
    assert [group.rollout_ids for group in reader.read(incomplete=True)] == [[each] for each in ids(rollouts)]


def test_a_group_that_never_fills_is_returned_with_what_it_has(
    store: agl.Store, caplog: pytest.LogCaptureFixture
) -> None:
    good, hanging = started(store, "5", "5")
    ended([good])
    reader = GroupReader(store, 2, max_later=4)
    for _ in range(2):
        ended(more := started(store, "6", "6"))
        assert [group.rollout_ids for group in reader.read()] == [ids(more)]
    assert caplog.text == ""

    [group] = reader.read()

    assert [row.rollout_id for row in group.rows] == [good.rollout_id]
    assert group.left_out == {hanging.rollout_id: "it has not ended, or its calls are not written"}
    assert f"Group {group.key!r} is overdue, and returned without what is missing of it." in caplog.text
    assert reader.read() == []


def test_what_is_left_at_the_end_is_returned_where_that_is_asked_for(store: agl.Store) -> None:
    ended(rollouts := started(store, *"555"))
    reader = GroupReader(store, 2)

    assert [group.rollout_ids for group in reader.read(incomplete=True)] == [ids(rollouts[:2]), ids(rollouts[2:])]
    assert reader.read(incomplete=True) == []


def test_the_state_has_only_what_was_returned_lately(store: agl.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentlightning.trainers.groups.MARGIN", 0.0)
    reader = GroupReader(store, 1)
    rollouts: list[agl.Rollout] = []
    for _ in range(5):
        ended(rollouts := started(store, "5"))
        assert [group.rollout_ids for group in reader.read()] == [ids(rollouts)]

    assert reader.state == {"since": rollouts[0].start_time, "given": ids(rollouts)}


@pytest.mark.tier("all", new_store="postgresql")
def test_rollouts_of_many_pages_are_read_once_each_though_the_newest_are_deleted_meanwhile(
    store: agl.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentlightning.trainers.groups.PAGE", 4)
    monkeypatch.setattr("agentlightning.trainers.groups.OVERLAP", 2)
    ended(rollouts := started(store, *"555555555"))
    query = store.query_rollouts
    doomed = ids(rollouts[-3:])

    def query_and_delete(**options: Any) -> list[agl.Rollout]:
        found = query(**options)
        store.delete_rollouts(doomed[:1])
        del doomed[:1]
        return found

    monkeypatch.setattr(store, "query_rollouts", query_and_delete)
    reader = GroupReader(store, 1)

    returned = [rollout_id for group in [*reader.read(), *reader.read()] for rollout_id in group.rollout_ids]
    assert returned == ids(rollouts[:-3])


def test_rows_of_older_weights_than_the_bound_are_left_out(store: agl.Store) -> None:
    rollouts = started(store, *"5555")
    for rollout, version in zip(rollouts, ("7", "6", "5", None), strict=True):
        answered(rollout, ([1], [2]), version=version)
        rollout.reward(1.0)
        rollout.finish("succeeded")

    [group] = GroupReader(store, 4).read(weight_version="7", max_staleness=1)

    assert [row.rollout_id for row in group.rows] == ids(rollouts[:2])
    assert group.left_out == dict.fromkeys(ids(rollouts[2:]), "it has no row that the options allow")


@pytest.mark.parametrize("killed_while", ["training", "saving", "going on"])
def test_a_trainer_that_is_killed_trains_no_row_twice_and_misses_none(tmp_path: Path, killed_while: str) -> None:
    """Regression test: what was trained is what the checkpoint has; the rest was lost with the process."""
    path, checkpoint = str(tmp_path / "store.db"), tmp_path / "checkpoint.json"
    with agl.open_store(path) as store:
        ended(rollouts := started(store, *"556677"))
    program = [sys.executable, "-m", "tests.trainers.programs.checkpoints", path, str(checkpoint)]

    with subprocess.Popen(program, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # The second group: the first one is in a checkpoint.
        while process.stdout.readline() != f"{killed_while} 1\n":
            process.stdin.write("\n")
            process.stdin.flush()
        process.kill()
    before = json.loads(checkpoint.read_text())["trained"]
    assert len(before) == (4 if killed_while == "going on" else 2)

    subprocess.run(program, cwd=CHECKOUT, input="\n" * 100, stdout=subprocess.PIPE, text=True, check=True)
    trained = json.loads(checkpoint.read_text())["trained"]
    assert trained[: len(before)] == before
    assert trained == ids(rollouts)


def test_a_store_that_goes_away_returns_nothing(store: agl.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(started(store, "5", "5"))
    reader = GroupReader(store, 2)

    def away(*_: object, **options: object) -> None:
        raise agl.StoreUnavailable("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(store, "trajectories", away)
        with pytest.raises(agl.StoreUnavailable):
            reader.read()

    assert len(reader.read()) == 1
