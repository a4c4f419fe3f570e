"""Tests of deleting rollouts: all that is theirs alone goes, and everything else is kept whole."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

import agentlightning as agl
from agentlightning.generation import Choice, Generation
from agentlightning.sender import LostCalls, Progress, Sender, Vocabulary
from agentlightning.store import Store, compaction, deletion, open_database, open_store, tables, unused, uploads
from agentlightning.store.chains import FIRST, NEXT
from agentlightning.store.database import Database
from tests.common.generations import SECOND, START, generation
from tests.common.processes import SECONDS, fork
from tests.common.unhurried import UNHURRIED
from tests.store.conftest import EVERY_KIND, new_store_of

pytestmark = pytest.mark.tier("check")

FIRST_IDS, NEXT_IDS = FIRST // 4, NEXT // 4
KILLS = 20
FEW_KILLS = 3
REFERRED = ("generations", "choices", "blocks", "texts", "spans", "rollouts", "attempts", "span_sequences", "sessions")


@pytest.fixture(scope="session", params=EVERY_KIND)
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


IN_DATABASES = pytest.mark.parametrize("new_store", EVERY_KIND[:2], indirect=True)


def rollout_of(store: Store, calls: int = 3, status: str = "succeeded", shared: int = 2 * FIRST_IDS) -> agl.Rollout:
    """Run a rollout whose calls and spans are recorded."""
    rollout = store.start_rollout({"question": "Paris?"})
    assert rollout.attempt is not None
    number = next(numbers)
    history = [*range(shared), *[number] * NEXT_IDS * calls]
    recorded = [
        generation(
            number * 100 + call,
            rollout_id=rollout.rollout_id,
            attempt_id=rollout.attempt.attempt_id,
            prompt_token_ids=array("i", history[: shared + NEXT_IDS * call]),
            prompt_text="a system prompt " * 500 + f"{number} " * 500 * call,
        )
        for call in range(calls)
    ]
    store.add(recorded)
    store.add_span(agl.Span("agent", rollout.rollout_id, rollout.attempt.attempt_id, attributes={"a": number}))
    rollout.reward(1.0)
    rollout.finish(status)  # type: ignore[arg-type]
    return rollout


numbers = count(1)


def counts(database: Database) -> dict[str, int]:
    with database.reading() as connection:
        return {
            name: connection.execute(select(func.count()).select_from(tables.metadata.tables[name])).scalar_one()
            for name in REFERRED
        }


def deleted(database: Database, **wanted: Any) -> Counter[str]:
    """Delete rollouts, and what nothing refers to then."""
    found = sum(deletion.delete(database, deletion.select(database, **wanted)), Counter[str]())
    return found + sum(deletion.finish(database), Counter[str]())


def test_deleted_rollout_is_gone_and_others_are_unchanged(store: Store) -> None:
    gone, kept = rollout_of(store), rollout_of(store)
    before = [*kept.generations()], [*kept.triplets()], store.query_spans(kept.rollout_id)

    assert store.delete_rollouts([gone.rollout_id]) == 1

    assert store.get_rollout_by_id(gone.rollout_id) is None
    assert [*store.generations(rollout_id=gone.rollout_id)] == []
    assert store.query_spans(gone.rollout_id) == []
    assert store.query_attempts(gone.rollout_id) == []
    assert [each.rollout_id for each in store.query_rollouts()] == [kept.rollout_id]
    assert ([*kept.generations()], [*kept.triplets()], store.query_spans(kept.rollout_id)) == before
    assert store.delete_rollouts([gone.rollout_id, "nobody"]) == 0


def test_rollouts_under_way_are_refused_by_name_and_nothing_is_deleted(store: Store) -> None:
    ended = rollout_of(store)
    running = store.start_rollout("a task")
    waiting = store.enqueue_rollout("another")

    for under_way, status in ((running, "preparing"), (waiting, "queuing")):
        with pytest.raises(agl.RolloutUnderWay, match=f"'{under_way.rollout_id}' is {status}"):
            store.delete_rollouts([ended.rollout_id, under_way.rollout_id])

    assert store.statistics()["total_rollouts"] == 3
    assert len([*ended.generations()]) == 3


def test_rollout_that_was_only_recorded_is_deleted(store: Store) -> None:
    recorded = [generation(n, rollout_id=f"mine/{n % 2}" if n % 2 else "mine") for n in range(40)]
    store.add(recorded)

    assert store.delete_rollouts(["mine"]) == 1

    assert sorted(each.id for each in store.generations()) == sorted(each.id for each in recorded[1::2])


def test_prune_deletes_what_a_dry_run_announces_and_tells_how_far_it_is(store: Store) -> None:
    kept, *gone = (rollout_of(store, status=status) for status in ("succeeded", "failed", "failed"))
    running = store.start_rollout("a task")
    wanted: Any = {"status_in": ["failed"]}

    *_, announced = store.prune(dry_run=True, **wanted)
    assert len(store.query_rollouts()) == 4
    begun, first, *steps = store.prune(**wanted)

    done = steps[-1]
    assert (begun.selected, begun.records) == (0, {})
    assert (first.selected, first.records.get("rollouts", 0), first.size_after) == (2, 0, None)
    assert [each.bytes for each in steps] == sorted(each.bytes for each in steps)
    counted = ("rollouts", "attempts", "generations", "spans", "blocks")
    assert [done.records[kind] for kind in counted] == [announced.records[kind] for kind in counted]
    assert (announced.selected, announced.records["rollouts"], announced.records["generations"]) == (2, 2, 6)
    assert announced.size_before is announced.size_after is None
    assert announced.bytes > 0
    assert done.size_before is not None
    assert done.size_after is not None
    assert {each.rollout_id for each in store.query_rollouts()} == {kept.rollout_id, running.rollout_id}
    assert {each.rollout_id for each in store.generations()} == {kept.rollout_id}
    assert all(store.get_rollout_by_id(each.rollout_id) is None for each in gone)


def test_prune_by_age_takes_what_was_only_recorded_and_spares_what_is_younger(store: Store) -> None:
    old, young = (time.time_ns() - days * 86_400 * SECOND for days in (8, 6))
    of_none = [generation(n, rollout_id=None, attempt_id=None, finished_at=at) for n, at in enumerate((old, young))]
    recorded = [generation(n, rollout_id=f"mine/{n}", finished_at=at) for n, at in enumerate((old, young), 2)]
    store.add([*of_none, *recorded])
    ended = rollout_of(store)

    *_, done = store.prune(older_than=7 * 86_400)

    assert (done.records["rollouts"], done.records["generations"]) == (1, 2)
    left = {of_none[1].id, recorded[1].id, *(each.id for each in ended.generations())}
    assert {each.id for each in store.generations()} == left


def test_prune_refuses_rollouts_under_way_by_name_and_deletes_nothing(store: Store) -> None:
    ended, running = rollout_of(store), store.start_rollout("a task")

    with pytest.raises(agl.RolloutUnderWay, match=f"'{running.rollout_id}' is preparing"):
        list(store.prune(rollout_ids=[ended.rollout_id, running.rollout_id]))

    assert len([*ended.generations()]) == 3


@pytest.mark.parametrize("filters", [{"older_then": 60}, {"rollout_id": "ro-1"}, {"dryRun": True, "older_than": 0}])
def test_prune_refuses_a_name_that_is_no_filter_and_deletes_nothing(store: Store, filters: Any) -> None:
    rollout_of(store)

    with pytest.raises(TypeError, match=next(iter(filters))):
        list(store.prune(**filters))

    assert store.statistics()["total_rollouts"] == 1


@pytest.mark.parametrize("filters", [{"status_in": []}, {"rollout_ids": []}, {"status_in": [], "older_than": 0}])
def test_prune_deletes_nothing_where_none_can_match(store: Store, filters: Any) -> None:
    rollout_of(store)

    *_, done = store.prune(**filters)

    assert (done.selected, done.records["rollouts"]) == (0, 0)
    assert store.statistics()["total_rollouts"] == 1


@IN_DATABASES
def test_prune_names_a_rollout_that_runs_again_since_it_was_selected(store: Store) -> None:
    ended = rollout_of(store)

    steps = store.prune(rollout_ids=[ended.rollout_id])
    assert [next(steps).selected for _ in range(2)] == [0, 1]
    store.update_rollout(ended.rollout_id, status="running")

    with pytest.raises(agl.RolloutUnderWay, match=f"'{ended.rollout_id}' is running"):
        list(steps)


def test_prune_without_a_filter_deletes_no_rollout(store: Store) -> None:
    rollout_of(store)

    *_, done = store.prune()

    assert (done.selected, done.records["rollouts"]) == (0, 0)
    assert store.statistics()["total_rollouts"] == 1


def test_prune_that_is_left_alone_stops_and_another_one_finishes(store: Store) -> None:
    gone = [rollout_of(store, calls=20) for _ in range(3)]

    steps = store.prune(status_in=["succeeded"])
    next(steps)
    next(steps)
    del steps
    *_, done = store.prune(status_in=["succeeded"])

    assert done.records["rollouts"] <= len(gone)
    assert [*store.generations()] == []
    assert store.statistics()["total_rollouts"] == 0


@IN_DATABASES
def test_all_rows_are_gone_when_all_rollouts_are(store: Store, database: Database) -> None:
    for _ in range(3):
        rollout_of(store)

    found = deleted(database, statuses=["succeeded"])

    assert counts(database) == dict.fromkeys(REFERRED, 0)
    assert (found["rollouts"], found["attempts"], found["generations"], found["spans"]) == (3, 3, 9, 6)


@IN_DATABASES
def test_blocks_that_others_share_are_kept(store: Store, database: Database) -> None:
    kept = rollout_of(store)
    before = counts(database)
    calls = [*kept.generations()]
    others = [rollout_of(store).rollout_id for _ in range(3)]

    store.delete_rollouts(others)

    assert counts(database) == before
    assert [*kept.generations()] == calls


@IN_DATABASES
def test_estimate_says_what_is_deleted_and_changes_nothing(store: Store, database: Database) -> None:
    rollout_of(store, status="failed")
    rollouts = [rollout_of(store, calls=20), rollout_of(store), rollout_of(store, shared=5)]
    before = counts(database)
    wanted = deletion.select(database, rollout_ids=[each.rollout_id for each in rollouts])

    *_, estimated = deletion.estimate(database, wanted)

    assert counts(database) == before
    found = sum(deletion.delete(database, wanted), Counter[str]())
    assert +estimated == +found


@IN_DATABASES
def test_rollouts_are_selected_by_status_and_age(store: Store, database: Database) -> None:
    failed, succeeded = rollout_of(store, status="failed"), rollout_of(store)
    running = store.start_rollout("a task")
    calls = ((1, "recorded"), (2, running.rollout_id))
    store.add([generation(n, rollout_id=each, finished_at=1_000 * SECOND) for n, each in calls])

    def selected(**wanted: Any) -> set[str]:
        return {*deletion.select(database, **wanted).rollout_ids}

    later = time.time() + 60
    assert selected(statuses=["failed"]) == {failed.rollout_id}
    assert selected(before=later) == {failed.rollout_id, succeeded.rollout_id, "recorded"}
    assert selected(before=1_000) == set()
    assert selected(before=1_001) == {"recorded"}
    assert selected(before=later, rollout_ids=["recorded", failed.rollout_id]) == {"recorded", failed.rollout_id}
    assert selected(before=later, statuses=["succeeded"]) == {succeeded.rollout_id}


@IN_DATABASES
def test_calls_without_a_rollout_are_deleted_by_age_unless_a_span_names_them(store: Store, database: Database) -> None:
    rollout = rollout_of(store, calls=1)
    named, unnamed, young = (
        generation(n, rollout_id=None, attempt_id=None, finished_at=n * 1_000 * SECOND) for n in (1, 2, 3)
    )
    store.add([named, unnamed, young])
    assert rollout.attempt is not None
    of_answer = {"gen_ai.response.id": named.response_id}
    store.add_span(agl.Span("chat", rollout.rollout_id, rollout.attempt.attempt_id, attributes=of_answer))
    store.update_rollout(rollout.rollout_id, status="succeeded")

    found = deleted(database, before=2_500)

    assert (found["generations"], found["rollouts"]) == (1, 0)
    assert {each.id for each in store.generations(rollout_id=None)} == {named.id, young.id}
    # The call goes with the last span that names it.
    assert deleted(database, rollout_ids=[rollout.rollout_id])["generations"] == 2
    assert {each.id for each in store.generations()} == {young.id}


@IN_DATABASES
def test_session_and_its_uploads_go_with_the_last_span_of_their_trace(store: Store, database: Database) -> None:
    rollout = rollout_of(store)
    traces = {span.trace_id for span in store.query_spans(rollout.rollout_id)}
    with database.writing() as connection:
        for trace_id in (*traces, "f" * 32):
            place = {"rollout_id": rollout.rollout_id, "attempt_id": "", "is_own": False}
            connection.execute(tables.sessions.insert().values(trace_id=trace_id, project_id="p", **place))
            uploads.add(connection, "logs", "p", trace_id, b"what it said")

    found = deleted(database, rollout_ids=[rollout.rollout_id])

    assert found["uploads"] == len(traces)
    assert counts(database)["sessions"] == 1


@IN_DATABASES
def test_what_a_killed_process_left_is_deleted(store: Store, database: Database) -> None:
    kept = rollout_of(store)
    gone = rollout_of(store)
    before = [*kept.generations()]
    with database.writing() as connection:
        for table in (tables.generations, tables.spans):
            which = {"generations": table.c.key > 3, "spans": table.c.get("rollout_id") == gone.rollout_id}
            connection.execute(table.delete().where(which[table.name]))
        connection.execute(tables.choices.delete().where(tables.choices.c.generation_key > 3))

    found = sum(deletion.finish(database), Counter[str]())

    assert found["blocks"] > 0
    assert found["texts"] > 0
    assert [*kept.generations()] == before
    assert sum(deletion.finish(database), Counter[str]()) == {}


@IN_DATABASES
def test_text_that_a_writer_uses_again_meanwhile_is_kept(store: Store, database: Database) -> None:
    store.add([generation(n, rollout_id="old" if n else "kept", model="old-model") for n in range(2)])
    list(deletion.delete(database, deletion.select(database, rollout_ids=["old"])))

    steps = unused.sweep(database)
    for number, _ in enumerate(steps):
        # Each step may be the last before the text would be deleted.
        store.add([generation(100 + number, rollout_id="old")])

    assert {each.rollout_id for each in store.generations()} == {"kept", "old"}


@pytest.mark.parametrize("new_store", ["sqlite"], indirect=True)
def test_reused_keys_of_sqlite_keep_the_texts_of_new_rows(store: Store, database: Database) -> None:
    store.add([generation(1, rollout_id="kept"), generation(2, rollout_id="unused")])
    list(deletion.delete(database, deletion.select(database, rollout_ids=["unused"])))
    store.add([generation(3, rollout_id="last")])

    steps = unused.sweep(database)
    next(steps)
    # The last row, which was looked at, is deleted; one that uses the text that nothing has used gets its key.
    list(deletion.delete(database, deletion.select(database, rollout_ids=["last"])))
    store.add([generation(4, rollout_id="unused")])
    list(steps)

    assert [each.rollout_id for each in store.generations()] == ["kept", "unused"]


@IN_DATABASES
def test_vocabulary_goes_with_the_last_sender_that_has_generations(store: Store, database: Database) -> None:
    about: Any = {"host": "gpu-1", "pid": 7, "started_at": START, "version": "1"}
    senders = [Sender(**about, vocabulary=Vocabulary([f"token {n}"], frozenset())) for n in range(3)]
    for n, each in enumerate(senders):
        store.register_sender(each)
        store.report_progress(each.id, Progress(watermark=1, has_ended=True))
        if n < 2:
            store.add([generation(n, rollout_id=f"ro-{n}")], each.id)
    with database.writing() as connection:
        connection.execute(tables.senders.update().where(tables.senders.c.key < 3).values(seen_at=1))

    found = deleted(database, rollout_ids=["ro-0"])

    # The third has no generations, but was seen just now.
    assert (found["senders"], found["vocabularies"]) == (1, 1)
    with database.reading() as connection:
        assert connection.execute(select(func.count()).select_from(tables.vocabularies)).scalar_one() == 2


@IN_DATABASES
def test_senders_that_make_rollouts_incomplete_stay(store: Store, database: Database) -> None:
    about: Any = {"host": "gpu-1", "started_at": START, "version": "1"}
    ended, lossy, silent = (Sender(**about, pid=pid) for pid in range(3))
    for each in (ended, lossy, silent):
        store.register_sender(each)
    rollout = store.start_rollout(1)
    lost = LostCalls(rollout_id=rollout.rollout_id, attempt_id=None, count=1, reason="stopped")
    store.report_progress(ended.id, Progress(watermark=1, has_ended=True))
    store.report_progress(lossy.id, Progress(watermark=1, has_ended=True, lost=[lost]))
    with database.writing() as connection:
        connection.execute(tables.senders.update().values(seen_at=1))
        connection.execute(tables.watermarks.update().values(reported_at=1))

    found = list(unused.sweep(database))

    assert sum(each["senders"] for each in found) == 1
    with database.reading() as connection:
        assert [*connection.execute(select(tables.senders.c.pid)).scalars()] == [1, 2]
    assert [each.pid for each in store.completeness(rollout.rollout_id).lost] == [1]


@pytest.mark.parametrize("new_store", ["sqlite"], indirect=True)
def test_file_becomes_smaller_by_about_what_the_estimate_says(store: Store, database: Database) -> None:
    kept = rollout_of(store)
    gone = [rollout_of(store, calls=20, shared=n).rollout_id for n in range(FIRST_IDS, FIRST_IDS + 20)]
    list(database.shrink())
    before = database.size()
    *_, estimated = deletion.estimate(database, deletion.select(database, rollout_ids=gone))

    store.delete_rollouts(gone)

    assert before - database.size() == pytest.approx(estimated["bytes"], rel=0.2)
    assert database.space_advice() is None
    assert len([*kept.generations()]) == 3


@pytest.mark.tier("test")
@pytest.mark.parametrize("new_store", ["postgresql"], indirect=True)
def test_postgresql_returns_the_space_of_deleted_rollouts_that_lay_among_others(
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "WORTH_BYTES", 0)
    # Several steps for each table.
    monkeypatch.setattr(compaction, "FIRST_BYTES", 2**16)
    monkeypatch.setattr(compaction, "SECONDS_AT_ONCE", 0.0)
    empty = database.size()
    dice = random.Random(1)
    store.add(
        [
            generation(n, rollout_id=f"ro-{n % 4}", prompt_token_ids=array("i", dice.choices(range(100_000), k=2_000)))
            for n in range(400)
        ]
    )
    gone = ["ro-1", "ro-2", "ro-3"]
    before = [*store.generations(rollout_id="ro-0")]
    found = sum(deletion.delete(database, deletion.select(database, rollout_ids=gone)), Counter[str]())
    found += sum(unused.sweep(database), Counter[str]())
    full = database.size()

    steps = 0
    for _ in database.shrink():
        # Whoever reads between two steps, or prunes no further, has all that was kept.
        steps += 1
        assert [*store.generations(rollout_id="ro-0")] == before

    assert found["generations"] == 300
    assert steps > 2 * len(tables.metadata.tables)
    assert database.size() - empty < (full - empty) / 2


@pytest.mark.tier("test")
@pytest.mark.parametrize("new_store", ["postgresql"], indirect=True)
def test_postgresql_moves_nothing_while_somebody_can_see_what_was_deleted(
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "WORTH_BYTES", 0)
    gone = [rollout_of(store, calls=20, shared=FIRST_IDS + n).rollout_id for n in range(4)]
    with database.reading() as connection:
        counted = connection.execute(select(func.count()).select_from(tables.generations)).scalar_one()
        for each in (deletion.delete(database, deletion.select(database, rollout_ids=gone)), unused.sweep(database)):
            list(each)

        sizes = list[int]()
        for _ in range(3):
            list(database.shrink())
            sizes.append(database.size())

        # Moved rows would take the space of all that is kept once more each time.
        assert sizes[2] < 1.05 * sizes[0]
        assert connection.execute(select(func.count()).select_from(tables.generations)).scalar_one() == counted
    list(database.shrink())
    assert database.size() < sizes[0]


@settings(UNHURRIED, max_examples=8)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3 * FIRST_IDS), st.lists(st.integers(0, 2), max_size=2)),
        min_size=2,
        max_size=10,
    ),
    st.integers(1, 2**10),
)
def test_any_rollouts_deleted_leave_what_a_store_without_them_has(drawn: list[Any], chosen: int) -> None:
    """Draw prompts that share beginnings of any length, and delete some."""
    made = [
        generation(n, rollout_id=f"ro-{n}", prompt_token_ids=array("i", [*range(kind, kind + length), *end]))
        for n, (kind, length, end) in enumerate(drawn)
    ]
    gone = [each for n, each in enumerate(made) if chosen >> n & 1]
    kept = [each for n, each in enumerate(made) if not chosen >> n & 1]
    with tempfile.TemporaryDirectory() as folder:
        with open_store(f"{folder}/all.db") as store, open_store(f"{folder}/kept.db") as other:
            store.add(made)
            other.add(kept)
            store.delete_rollouts([each.rollout_id or "" for each in gone])
            assert [*store.generations()] == kept
        with closing(open_database(f"{folder}/all.db")) as one, closing(open_database(f"{folder}/kept.db")) as two:
            assert counts(one) == counts(two)


def conversation(number: int, rollout_id: str) -> list[Generation]:
    """Make the calls of a rollout, each as its number makes it, so that any process can tell what it has to be."""
    history = [*range(FIRST_IDS), *range(number, number + 4 * NEXT_IDS)]
    return [
        generation(
            number * 10 + call,
            id=f"01900000-0000-7000-8000-{number * 10 + call:012x}",
            call_id=f"01900000-0000-7000-8000-{number * 10 + call:012x}",
            rollout_id=rollout_id,
            prompt_token_ids=array("i", history[: FIRST_IDS + NEXT_IDS * call]),
            prompt_text=f"{number} " * (3_000 + 1_000 * call),
            choices=[Choice(token_ids=array("i", [number]), finish_reason="stop")],
        )
        for call in range(4)
    ]


def delete_until_killed(url: str, rollout_ids: Iterable[str], begun: Connection) -> None:
    with closing(open_database(url, patience=SECONDS)) as database:
        for _ in deletion.delete(database, deletion.Selection([*rollout_ids])):
            begun.send(None)
        for _ in deletion.finish(database):
            begun.send(None)


def write_until_killed(url: str, first: int, acknowledge: Connection) -> None:
    with open_store(url, patience=SECONDS) as store:
        for number in count(first):
            store.add(conversation(number, f"new-{number}"))
            acknowledge.send(number)


@contextlib.contextmanager
def killed_process(work: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """Run work in a process that is killed when the block ends; it may send."""
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=work, args=(*arguments, sender))
    process.start()
    sender.close()
    try:
        yield receiver
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(SECONDS)
        assert process.exitcode in (0, -signal.SIGKILL)


def rest_of(receiver: Connection) -> list[Any]:
    found: list[Any] = []
    with contextlib.suppress(EOFError):
        while True:
            found.append(receiver.recv())
    return found


@pytest.mark.tier("test")
@IN_DATABASES
def test_deletion_killed_at_any_moment_beside_writers_keeps_all_else_and_can_be_finished(
    url: str, thorough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PostgreSQL's tables are made smaller each time, however little that brings.
    monkeypatch.setattr(compaction, "WORTH_BYTES", 0)
    pauses = random.Random(24)
    kills = KILLS if thorough else FEW_KILLS
    kept, old = range(50), range(1_000, 1_000 + 40 * kills)
    with open_store(url) as store:
        for number in (*kept, *old):
            store.add(conversation(number, f"old-{number}"))
    written: list[int] = []
    going = deque_of(old, kills)
    for kill in range(kills):
        with killed_process(write_until_killed, url, 100_000 * (kill + 1)) as acknowledged:
            with killed_process(delete_until_killed, url, [f"old-{each}" for each in going[kill]]) as begun:
                for _ in range(pauses.randint(0, 3)):
                    with contextlib.suppress(EOFError):
                        begun.recv()
                time.sleep(pauses.uniform(0, 0.1))
            written.append(acknowledged.recv())
        written += rest_of(acknowledged)
        assert_whole(url, kept, written)

    with closing(open_database(url)) as database:
        list(deletion.delete(database, deletion.Selection([f"old-{number}" for number in old])))
        list(deletion.finish(database))
        after = counts(database)
    with open_store(url) as store:
        found = {each.id for each in store.generations()}
    assert found >= {each.id for number in (*kept, *written) for each in conversation(number, "")}
    assert not found & {each.id for number in old for each in conversation(number, "")}
    # Nothing is left that a store without the deleted rollouts would not have.
    with tempfile.TemporaryDirectory() as folder, open_store(url) as store, open_store(f"{folder}/new.db") as other:
        other.add([*store.generations()])
        with closing(open_database(f"{folder}/new.db")) as database:
            assert counts(database) == after


def deque_of(numbers: range, parts: int) -> list[range]:
    """Split numbers into so many parts, each of which has the first of the next, too."""
    each = len(numbers) // parts
    return [numbers[part * each : (part + 1) * each + 5] for part in range(parts)]


def assert_whole(url: str, kept: Iterable[int], written: Iterable[int]) -> None:
    """Assert that each generation is what its number makes it, and that those that must be there are."""
    with open_store(url, patience=SECONDS) as store:
        found = {each.id: each for each in store.generations()}
    for each in found.values():
        number = int(each.id[-12:], 16)
        [wanted] = [call for call in conversation(number // 10, each.rollout_id or "") if call.id == each.id]
        assert each == wanted
    assert found.keys() >= {call.id for number in (*kept, *written) for call in conversation(number, "")}


@IN_DATABASES
def test_calls_that_a_rollout_got_since_it_was_selected_are_kept(store: Store, database: Database) -> None:
    store.add([generation(1, rollout_id="eval", finished_at=1)])
    found = deletion.select(database, before=time.time() - 60)
    store.add([generation(2, rollout_id="eval", finished_at=time.time_ns())])

    deleted = sum(deletion.delete(database, found), Counter[str]())

    assert deleted["generations"] == 0
    assert len([*store.generations()]) == 2


@IN_DATABASES
def test_call_that_has_the_key_of_a_deleted_one_is_kept(store: Store, database: Database) -> None:
    """Delete an old call after its key was read, and write another: SQLite gives its key again."""
    store.add([generation(1, rollout_id=None, attempt_id=None, finished_at=1)])
    found = deletion.select(database, before=time.time() - 60)
    work = deletion.delete(database, found)
    with database.writing() as connection:
        for table in (tables.choices, tables.generations):
            connection.execute(table.delete())
    store.add([generation(2, rollout_id=None, attempt_id=None, finished_at=time.time_ns())])

    assert sum(work, Counter[str]())["generations"] == 0
    assert len([*store.generations()]) == 1
