"""Tests of the overview: the sums of all rollouts over time, by step and by weights, however they came about."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from agentlightning.generation import Choice, Generation, Loss
from agentlightning.rollout_records import FINISHED, NewRollout
from agentlightning.store import (
    deletion,
    generations,
    lifecycle,
    open_database,
    overview,
    rollouts,
    spans,
    summaries,
    tables,
)
from agentlightning.store.database import Database
from agentlightning.store.overview import Measure, Overview
from agentlightning.store.stale import MARK_ALL
from agentlightning.store.summaries import Portion, task_of
from tests.common.generations import SECOND, START, generation
from tests.store.conftest import back_to_version
from tests.store.test_triplets import of_reward

pytestmark = pytest.mark.tier("check")

AT = START / SECOND
HOUR = 3600


def call(number: int, rollout_id: str | None, **fields: Any) -> Generation:
    """Make a call that ended `number` seconds after the start of all tests, and took half a second."""
    return generation(number, **{"status": "finished", "rollout_id": rollout_id, **fields})


def read(database: Database, hours: int = 24, **only: Any) -> Overview:
    """Read the overview from an hour before the first call, as somebody sees it who looks now."""
    assert summaries.refresh(database)
    with database.reading() as connection:
        return overview.of_time(connection, AT - HOUR, AT + (hours - 1) * HOUR, **only)


def sums(database: Database) -> list[Any]:
    """Return all sums, and the summaries that they are of."""
    assert summaries.refresh(database)
    with database.reading() as connection:
        tables_of = (tables.tallies, tables.summaries)
        found = [sorted(map(tuple, connection.execute(select(*table.c)).all()), key=repr) for table in tables_of]
    return [
        [(*row[:-1], pytest.approx(row[-1])) if table == 0 else row for row in rows] for table, rows in enumerate(found)
    ]


def anew(database: Database) -> list[Any]:
    """Return the same, made of the other tables alone, as a migration does."""
    with database.writing(alone=True) as connection:
        for table in ("stale_rollouts", "tallies", "summaries"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
        connection.exec_driver_sql(MARK_ALL)
    return sums(database)


@pytest.fixture
def trained(url: str, database: Database) -> list[str]:
    """Run ten rollouts at two steps, rewarded with their number; the odd ones failed. Each ended half an hour later."""
    found: list[str] = []
    with database.writing() as connection:
        for number in range(10):
            rollout_id = lifecycle.start(
                connection, NewRollout(number, metadata={"step": number % 2}), f"w-{number % 3}"
            )
            lifecycle.update_attempt(
                connection, rollout_id, "latest", {"status": "failed" if number % 2 else "succeeded"}
            )
            spans.add(connection, [of_reward(number + 1, float(number), rollout_id=rollout_id)])
            of_rollout = tables.rollouts.c.rollout_id == rollout_id
            connection.execute(update(tables.rollouts).where(of_rollout).values(end_time=AT + number * HOUR / 2))
            found.append(rollout_id)
        weights = [Choice(weight_versions=[("step-9", 0, 1)]), Choice(weight_versions=[("step-10", 0, 1)])]
        generations.add(
            connection, [call(number, each, choices=[weights[number % 2]]) for number, each in enumerate(found)]
        )
    return found


def test_hours_have_their_rollouts_and_all_together_the_sums(database: Database, trained: list[str]) -> None:
    found = read(database)

    assert [each.rollouts for each in found.bins[:8]] == [0, *([2] * 5), 0, 0]
    assert found.bins[1].measures["reward"].mean == 0.5
    assert (found.whole.rollouts, found.whole.ended, found.whole.success) == (10, 10, 0.5)
    reward = found.whole.measures["reward"]
    assert (reward.count, reward.mean, reward.quantile(0.25), reward.quantile(0.75)) == (10, 4.5, 2.0, 7.0)
    assert found.whole.measures["latency"].mean == 0.5
    assert found.whole.measures["calls"].amount == 10


def test_a_few_hours_in_minutes_have_the_same_sums_as_in_hours(database: Database, trained: list[str]) -> None:
    fine, coarse = read(database, hours=3), read(database)

    assert fine.bins[0].end - fine.bins[0].start == 300
    assert coarse.bins[0].end - coarse.bins[0].start == HOUR
    # The last one ended at the last moment.
    assert (fine.whole.rollouts, fine.whole.measures["reward"].amount) == (5, 0 + 1 + 2 + 3 + 4)
    assert [each.rollouts for each in fine.bins if each.rollouts] == [1] * 5


def test_steps_and_weights_are_in_their_order(database: Database, trained: list[str]) -> None:
    assert summaries.refresh(database)
    with database.reading() as connection:
        steps, weights = (overview.by_axis(connection, axis) for axis in ("step", "version"))
        of_worker = overview.by_axis(connection, "step", "worker", "w-0")

    assert [(each.name, each.success) for each in steps.bins] == [("0", 1.0), ("1", 0.0)]
    assert [each.name for each in weights.bins] == ["step-9", "step-10"]
    assert of_worker.whole.rollouts == 4


def test_names_divide_the_sums_the_most_first(database: Database, trained: list[str]) -> None:
    found = read(database)
    with database.reading() as connection:
        workers = overview.by_name(connection, "worker", found)
        at_steps = overview.by_name(connection, "worker", overview.by_axis(connection, "step"), "step")

    assert {name: each.whole.rollouts for name, each in workers.items()} == {"w-0": 4, "w-1": 3, "w-2": 3}
    assert next(iter(workers)) == "w-0"
    assert {name: [each.rollouts for each in of.bins] for name, of in at_steps.items()}["w-1"] == [1, 2]
    only = read(database, dimension="worker", name="w-1")
    assert (only.whole.rollouts, only.whole.measures["reward"].mean) == (3, 4.0)


def test_reward_that_comes_late_replaces_the_one_before_in_the_sums(database: Database, trained: list[str]) -> None:
    before = read(database).whole.measures["reward"]
    with database.writing() as connection:
        spans.add(connection, [of_reward(100, 100.0, rollout_id=trained[0])])
    after = read(database).whole.measures["reward"]

    assert (before.amount, after.amount, after.count) == (45.0, 145.0, 10)
    assert sums(database) == anew(database)


def test_deleted_rollouts_leave_nothing_in_sums_and_summaries_at_once(database: Database, trained: list[str]) -> None:
    assert read(database).whole.rollouts == 10
    for _ in deletion.delete(database, deletion.select(database, rollout_ids=trained[:9])):
        pass

    with database.reading() as connection:
        left = connection.execute(select(tables.summaries.c.rollout_id)).scalars().all()
    assert left == trained[9:]
    assert read(database).whole.measures["reward"].amount == 9.0
    assert sums(database) == anew(database)
    for _ in deletion.delete(database, deletion.select(database, rollout_ids=trained)):
        pass
    assert sums(database) == [[], []]


def test_store_of_version_5_has_all_of_it_once_somebody_looks(url: str, database: Database, trained: list[str]) -> None:
    before = sums(database)
    with database.writing() as connection:
        for statement in back_to_version(5, url):
            connection.exec_driver_sql(statement)

    with closing(open_database(url)) as migrated:
        assert sums(migrated) == before


def test_unassigned_call_and_its_span_are_counted_whichever_comes_first(url: str, database: Database) -> None:
    with database.writing() as connection:
        first, second = (lifecycle.start(connection, NewRollout(number), None) for number in (1, 2))
    for rollout_id, number, has_span_first in ((first, 1, True), (second, 2, False)):
        named = of_reward(number, 1.0, rollout_id=rollout_id)
        named.response_id = f"answer-{number}"
        steps = [
            lambda connection, named=named: spans.add(connection, [named]),
            lambda connection, number=number: generations.add(
                connection, [call(number, None, response_id=f"answer-{number}")]
            ),
        ]
        for step in steps if has_span_first else reversed(steps):
            with database.writing() as connection:
                step(connection)
            assert summaries.refresh(database)

    with database.reading() as connection:
        query = select(tables.summaries.c.rollout_id, tables.summaries.c.calls)
        assert {row[0]: row[1] for row in connection.execute(query)} == {first: 1, second: 1}


def test_losses_are_in_their_hour(database: Database) -> None:
    at = START + 2 * HOUR * SECOND
    with database.writing() as connection:
        loss = Loss(count=3, reason="the queue was full", first_at=at, last_at=at, host="h", pid=1)
        generations.add_losses(connection, [loss])

    assert [each.lost for each in read(database).bins[:5]] == [0, 0, 0, 3, 0]


def test_nothing_that_is_only_heard_makes_anybody_look_again(database: Database, trained: list[str]) -> None:
    with database.writing() as connection:
        running = lifecycle.start(connection, NewRollout("runs"), "w")
    assert summaries.refresh(database)
    with database.reading() as connection:
        before = summaries.revision(connection)
        attempt_id = connection.execute(select(tables.attempts.c.attempt_id)).scalars().all()[-1]
    with database.writing() as connection:
        assert lifecycle.heartbeat(connection, running, attempt_id)

    with database.reading() as connection:
        # Its first heartbeat says that it runs; the second one nothing.
        assert summaries.are_stale(connection)
    assert summaries.refresh(database)
    with database.writing() as connection:
        assert lifecycle.heartbeat(connection, running, attempt_id)
    with database.reading() as connection:
        assert not summaries.are_stale(connection)
        assert summaries.revision(connection) == before + 1


_CHANGES = st.lists(
    st.tuples(
        st.integers(0, 4), st.sampled_from(["call", "reward", "end", "again", "delete", "look"]), st.integers(0, 9)
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=40)
@given(_CHANGES)
def test_sums_after_any_changes_are_those_of_what_is_there(
    tmp_path_factory: pytest.TempPathFactory, changes: Sequence[tuple[int, str, int]]
) -> None:
    path = tmp_path_factory.mktemp("changes") / "store.db"
    with closing(open_database(str(path))) as database:
        with database.writing() as connection:
            ids = [lifecycle.start(connection, NewRollout(number), f"w-{number % 2}") for number in range(4)]
        ids.append("recorded")
        for number, (place, change, value) in enumerate(changes):
            _change(database, ids[place], change, number, value)
        assert sums(database) == anew(database)


def _change(database: Database, rollout_id: str, change: str, number: int, value: int) -> None:
    if change == "look":
        summaries.refresh(database)
        return
    if change == "delete":
        with database.reading() as connection:
            found = rollouts.find(connection, rollout_id)
        if found is None or found.status in FINISHED:
            for _ in deletion.delete(database, deletion.select(database, rollout_ids=[rollout_id])):
                pass
        return
    with database.writing() as connection:
        exists = connection.execute(
            select(tables.rollouts.c.key).where(tables.rollouts.c.rollout_id == rollout_id)
        ).first()
        if change == "call":
            generations.add(connection, [call(number, rollout_id, model=f"m-{value % 2}")])
        elif change == "reward":
            spans.add(connection, [of_reward(number, value / 3, rollout_id=rollout_id)])
        elif exists and change == "end":
            lifecycle.update_attempt(
                connection, rollout_id, "latest", {"status": "failed" if value % 2 else "succeeded"}
            )
        elif exists:
            lifecycle.start_attempt(connection, rollout_id, f"w-{value % 2}")


@pytest.mark.parametrize(
    ("written", "task"),
    [
        ('"What is 2 + 2?"', "What is 2 + 2?"),
        ('{"question": "What  is\\n2 + 2?", "answer": 4}', "What is 2 + 2?"),
        ('{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}', "Hi"),
        ('[{"role": "user", "content": [{"type": "text", "text": "Look"}]}]', "Look"),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 2}'),
        ("null", ""),
        ("7", "7"),
        (f'"{"word " * 100}"', f"{('word ' * 100)[:240]}…"),
        (f'"{"x" * 100_000}"', f'"{"x" * 239}…'),
    ],
)
def test_task_is_what_tells_a_reader_which_it_is(written: str, task: str) -> None:
    assert task_of(written) == task


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_quartiles_are_exact_to_two_digits(values: Sequence[float]) -> None:
    measure = Measure()
    for each in values:
        measure.add(Portion("reward", float(f"{each:.2g}"), 1, each))
    rounded = sorted(float(f"{each:.2g}") for each in values)

    assert measure.quantile(0.25) == rounded[-(-len(rounded) // 4) - 1]
    assert measure.quantile(1.0) == rounded[-1]
