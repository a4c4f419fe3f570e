"""Trainers that read a rollout as soon as it has ended: nothing is missing, or they are told what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

import agentlightning as agl
from agentlightning.store import completeness, watermarks
from tests.common.clock import an_hour_ahead, an_hour_behind
from tests.common.postgresql import PostgresServer
from tests.recording.load import Load, endless
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until
from tests.recording.test_kills import kill
from tests.server.process import StoreServer

ROLLOUTS, CALLS = 4, 3
SECONDS = 120
TOKENS_UNTIL_THE_END = 900
FEW_SECONDS = 3.0


@pytest.fixture(params=["a file", "over HTTP", "in PostgreSQL"])
def server(request: pytest.FixtureRequest, nursery: Nursery, tmp_path: Path) -> Iterator[RecordingServer]:
    """A server that records to a store of each kind."""
    with ExitStack() as stack:
        url = None
        if request.param == "over HTTP":
            url = stack.enter_context(StoreServer(tmp_path / "store.db")).url
        elif request.param == "in PostgreSQL":
            postgresql: PostgresServer = request.getfixturevalue("postgresql")
            url = postgresql.new_database()
        yield stack.enter_context(nursery.server(tmp_path / "generations.db", store=url))


def ask(server: RecordingServer, rollout: agl.Rollout, **options: object) -> str:
    """Make a call of a rollout; return the id of its answer. Each connection of its own goes to any of the servers."""
    body = server.body(prompt="one two", **{"max_tokens": 4, **options})
    url, key = f"{rollout.base_url(server.url)}/completions", {"Authorization": "Bearer none"}
    return httpx.post(url, json=body, headers=key, timeout=SECONDS).raise_for_status().json()["id"]


def run(server: RecordingServer, store: agl.Store, rollout: agl.Rollout) -> list[str]:
    """Run an agent; return the ids of its answers."""
    answers = [ask(server, rollout) for _ in range(CALLS)]
    rollout.finish("succeeded")
    return answers


def assert_all_calls_are_read_at_once(server: RecordingServer) -> None:
    with agl.open_store(server.store) as store, ThreadPoolExecutor(ROLLOUTS) as pool:
        rollouts = [store.start_rollout(number) for number in range(ROLLOUTS)]
        running = [pool.submit(run, server, store, each) for each in rollouts]
        ids = [each.rollout_id for each in rollouts]
        ended = store.wait_for_rollouts(ids, timeout=SECONDS, recorded=True)

        found = [[triplet.response_id for triplet in each.triplets()] for each in rollouts]
        assert [each.rollout_id for each in ended] == ids
        assert found == [each.result() for each in running]
        assert [store.completeness(each).reasons() for each in ids] == [[]] * ROLLOUTS


def test_all_calls_are_read_as_soon_as_rollouts_have_ended(server: RecordingServer) -> None:
    assert_all_calls_are_read_at_once(server)


def test_all_calls_of_several_api_servers_are_read(two_api_servers: RecordingServer) -> None:
    assert_all_calls_are_read_at_once(two_api_servers)


@pytest.mark.parametrize("clock", [an_hour_ahead, an_hour_behind])
def test_all_calls_are_read_whatever_the_stores_clock_says(
    nursery: Nursery, tmp_path: Path, clock: Callable[[], Mapping[str, str]]
) -> None:
    with (
        StoreServer(tmp_path / "store.db", env=clock()) as store,
        nursery.server(tmp_path / "generations.db", store=store.url) as server,
    ):
        assert_all_calls_are_read_at_once(server)
        [sender] = httpx.get(f"{store.url}/v1/agl/senders").json()["items"]
        assert abs(sender["clock_difference"]) / 1e9 == pytest.approx(3600, abs=60)


def test_calls_that_were_answered_while_the_store_was_away_are_read(nursery: Nursery, tmp_path: Path) -> None:
    with (
        StoreServer(tmp_path / "store.db") as served,
        nursery.server(tmp_path / "generations.db", store=served.url) as server,
        agl.open_store(served.url) as store,
    ):
        rollout = store.start_rollout(1)
        answers = [ask(server, rollout)]
        served.kill()
        answers += [ask(server, rollout) for _ in range(CALLS)]
        served.start()
        rollout.finish("succeeded")

        [ended] = store.wait_for_rollouts([rollout.rollout_id], timeout=SECONDS, recorded=True)
        assert [triplet.response_id for triplet in ended.triplets()] == answers
        answer = httpx.get(f"{served.url}/v1/agl/rollouts/{rollout.rollout_id}/triplets").json()
        assert (answer["complete"], len(answer["items"])) == (True, len(answers))


def test_calls_of_a_killed_server_are_lost_by_name_and_those_of_another_are_not(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watermarks, "SECONDS_UNTIL_SILENT", FEW_SECONDS)
    monkeypatch.setattr(completeness, "SECONDS_A_SILENT_SERVER_COUNTS", FEW_SECONDS)
    path = tmp_path / "generations.db"
    with (
        nursery.server(path) as server,
        nursery.server(path) as other,
        agl.open_store(str(path)) as store,
    ):
        killed, early = store.start_rollout(1), store.start_rollout(2)
        answers = run(server, store, early)
        store.wait_for_rollouts([early.rollout_id], timeout=SECONDS, recorded=True)
        with Load(server, killed.rollout_id, endless(TOKENS_UNTIL_THE_END), at_once=3) as load:
            until(lambda: len(load.begun) == 3, "answers that have begun")
            until(lambda: store.completeness(killed.rollout_id).under_way, "calls under way")
            [under_way] = store.completeness(killed.rollout_id).under_way
            assert under_way.calls == 3
            assert under_way.pid == server.process.pid
            kill(server)
            load.wait()
        killed.finish("failed")

        # The other server lives on, and its watermark counts.
        [ended] = store.wait_for_rollouts([killed.rollout_id], timeout=SECONDS, recorded=True)
        found = store.completeness(ended.rollout_id)
        assert [(each.pid, each.calls) for each in found.lost] == [(under_way.pid, 3)]
        assert [each.pid for each in found.silent] == [under_way.pid]
        assert (found.complete, found.behind, found.under_way) == (False, [], [])

        # What ended before, and what begins after, lacks nothing.
        late = store.start_rollout(3)
        last = run(other, store, late)
        store.wait_for_rollouts([late.rollout_id], timeout=SECONDS, recorded=True)
        for rollout, expected in ((early, answers), (late, last)):
            assert store.completeness(rollout.rollout_id).reasons() == []
            assert [triplet.response_id for triplet in rollout.triplets()] == expected


def test_a_server_that_was_stopped_is_not_waited_for(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "generations.db"
    with nursery.server(path) as server, agl.open_store(str(path)) as store:
        rollout = store.start_rollout(1)
        answer = ask(server, rollout)
        server.process.terminate()
        server.process.wait(SECONDS)
        rollout.finish("succeeded")

        [ended] = store.wait_for_rollouts([rollout.rollout_id], timeout=0, recorded=True)
        assert [triplet.response_id for triplet in ended.triplets()] == [answer]
        assert store.completeness(rollout.rollout_id).complete
