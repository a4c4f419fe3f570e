"""A store that cannot be written for a while: answers go on, and losses are counted and recorded."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentlightning.store import open_store
from tests.common.answers import post
from tests.common.postgresql import PostgresServer
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until
from tests.server.process import StoreServer

# So long that some thirty of them fill the queue of one MiB.
PROMPT = [7] * 900
CALLS = 60


# The queue of the servers here.
QUEUE = {"AGL_QUEUE_MB": "1"}


@pytest.fixture
def server(nursery: Nursery, tmp_path: Path) -> Iterator[RecordingServer]:
    with nursery.server(tmp_path / "generations.db", env=QUEUE) as server:
        yield server


@contextmanager
def locked(server: RecordingServer) -> Iterator[None]:
    """Lock the file by another writer."""
    with closing(sqlite3.connect(server.path, isolation_level=None)) as another:
        another.execute("BEGIN IMMEDIATE")
        yield
        another.execute("ROLLBACK")


@contextmanager
def full(server: RecordingServer) -> Iterator[None]:
    """Limit the size of the server's files."""
    _, most = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1 << 16, most))
    yield
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, most))


@contextmanager
def killed(store: StoreServer | PostgresServer) -> Iterator[None]:
    """Kill the store, and start it again afterwards."""
    store.kill()
    yield
    store.start()


def ask(server: RecordingServer, **options: Any) -> str:
    return post(server, "/v1/completions", server.body(prompt=PROMPT, max_tokens=1, **options))["id"]


def lost(server: RecordingServer) -> float:
    return server.metrics()['agentlightning_lost_generations_total{reason="queue full"}']


@pytest.mark.parametrize("away", [locked, full])
def test_answers_go_on_while_a_file_cannot_be_written(server: RecordingServer, away: Any) -> None:
    assert_answers_go_on(server, away(server))


def test_answers_go_on_while_agl_store_is_away(nursery: Nursery, tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", key="secret") as store:
        url = store.url.replace("//", "//agl:secret@")
        with nursery.server(tmp_path / "generations.db", env=QUEUE, store=url) as server:
            assert_answers_go_on(server, killed(store))
            assert "secret" not in server.log


def test_answers_go_on_while_postgresql_is_away(nursery: Nursery, tmp_path: Path, postgresql: PostgresServer) -> None:
    url = postgresql.new_database()
    with nursery.server(tmp_path / "generations.db", env=QUEUE, store=url) as server:
        assert_answers_go_on(server, killed(postgresql))


def assert_answers_go_on(server: RecordingServer, away: AbstractContextManager[None]) -> None:
    """Assert that queued generations arrive when the store is back, and that the others are recorded as lost."""
    first = ask(server)
    until(lambda: server.kept(response_id=first), "the first one")
    with away:
        answered = [ask(server) for _ in range(CALLS)]
        until(lambda: lost(server), "a loss")
        status = server.metrics()["agentlightning_queue_bytes"]
        assert 0 < status <= 1 << 20

    until(lambda: len(server.kept()) + lost(server) == 1 + CALLS, "what waited")
    kept = [each.response_id for each in server.kept()]
    # What fitted the queue, in order; what came when it was full is lost.
    assert kept == [first, *answered][: len(kept)]
    assert 10 < len(kept) < CALLS
    until(lambda: written_down(server) == 1 + CALLS - len(kept), "the losses")
    again = ask(server)
    until(lambda: server.kept(response_id=again), "the one after that")


def written_down(server: RecordingServer) -> int:
    with open_store(server.store) as store:
        return sum(loss.count for loss in store.losses())


def test_a_server_that_ends_waits_for_the_store(server: RecordingServer) -> None:
    first = ask(server)
    until(lambda: server.kept(response_id=first), "the first one")
    with locked(server):
        others = [ask(server) for _ in range(5)]
        server.process.terminate()
        # vLLM has done its part, and the rest is the recorder's: uvicorn's words, whose version is locked.
        until(lambda: "Application shutdown complete" in server.log, "the end")
    server.process.wait(60)

    assert [each.response_id for each in server.kept()] == [first, *others]
    assert written_down(server) == 0
