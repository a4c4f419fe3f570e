"""Tests of several processes on one file: nothing is mixed up or duplicated, and nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from agentlightning.generation import Generation
from agentlightning.store import open_store
from tests.common.generations import generation
from tests.common.processes import SECONDS, fork, together

WRITERS = 4
BATCHES = 25
BATCH = 20
KILLS = 20
FEW_KILLS = 3
# A generation longer than a page of the file, so that a torn write would show.
LONG = 5_000


def batch(writer: int, number: int) -> list[Generation]:
    first = (writer * BATCHES + number) * BATCH
    # All processes use the same rollouts and models, so each has to find the keys that others gave to their texts.
    return [
        generation(each, model=f"model-{each % 7}", rollout_id=f"rollout-{each % 10}")
        for each in range(first, first + BATCH)
    ]


def is_whole(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def by_request(generations: Any) -> list[Generation]:
    return sorted(generations, key=lambda found: found.request_id)


def equal_except_ids(found: list[Generation], wanted: list[Generation]) -> bool:
    """Compare generations without their ids, which each process made for itself."""
    for one, other in zip(found, wanted, strict=True):
        other.id, other.call_id = one.id, one.call_id
    return found == wanted


def test_processes_that_write_a_new_file_together_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "generations.db"

    def write(writer: int) -> None:
        with open_store(str(path), patience=SECONDS) as store:
            for number in range(BATCHES):
                store.add(batch(writer, number))

    together(WRITERS, write)

    wanted = [each for writer in range(WRITERS) for number in range(BATCHES) for each in batch(writer, number)]
    with open_store(str(path)) as store:
        found = [*store.generations()]
        of_one_rollout = [*store.generations(rollout_id="rollout-3")]
    assert len({each.id for each in found}) == len(wanted)
    assert equal_except_ids(by_request(found), by_request(wanted))
    assert len(of_one_rollout) == len(wanted) / 10
    assert is_whole(path)


@pytest.mark.parametrize("attempt", range(5))
def test_processes_that_create_one_file_together_all_succeed(tmp_path: Path, attempt: int) -> None:
    path = tmp_path / "generations.db"

    together(10, lambda number: open_store(str(path), patience=SECONDS).add([generation(number)]))

    with open_store(str(path)) as store:
        assert store.tally()["finished"] == 10
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA page_size").fetchone() == (16384,)


def write_until_killed(path: Path, first: int, acknowledge: Connection) -> None:
    with open_store(str(path), patience=SECONDS) as store:
        number = first
        while True:
            some = [generation(each, prompt=LONG) for each in range(number, number + random.randint(1, 10))]
            store.add(some)
            acknowledge.send([each.id for each in some])
            number += len(some)


def test_writer_killed_at_any_moment_leaves_acknowledged_generations_once_and_complete(
    tmp_path: Path, thorough: bool
) -> None:
    path = tmp_path / "generations.db"
    everything = 0
    for first in range(0, (KILLS if thorough else FEW_KILLS) * 100_000, 100_000):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=write_until_killed, args=(path, first, sender))
        process.start()
        sender.close()
        acknowledged = [each for _ in range(random.randint(1, 10)) for each in receiver.recv()]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(SECONDS)
        assert process.exitcode == -signal.SIGKILL
        # Read what it acknowledged before it died.
        with contextlib.suppress(EOFError):
            while True:
                acknowledged += receiver.recv()
        receiver.close()

        with open_store(str(path)) as store:
            found = {each.id: each for each in store.generations(since=generation(first).finished_at)}
            everything += len(found)
            assert sum(store.tally().values()) == everything
        assert found.keys() >= set(acknowledged)
        for each in found.values():
            number = int(str(each.response_id).removeprefix("chatcmpl-"), 16)
            assert equal_except_ids([each], [generation(number, prompt=LONG)])
    assert is_whole(path)
