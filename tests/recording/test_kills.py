"""Servers and engines that are killed: the file is intact, and has all earlier answers."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import psutil

from agentlightning.recorder._recorder import GATHERING_SECONDS
from tests.recording.load import Load, checked, endless
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until

KILLS = 10
FEW_KILLS = 2
TOKENS_UNTIL_THE_END = 900


def is_whole(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def kill(server: RecordingServer) -> None:
    """Kill the API server at once, and then the processes that it leaves behind."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait()
    for child in children:
        child.kill()


def numbers(server: RecordingServer, rollout: str) -> set[int]:
    """Return the numbers of the streams recorded so far."""
    return {int(str(each.attempt_id)) for each in server.kept(rollout_id=rollout)}


def test_answers_a_second_before_an_api_server_is_killed_are_recorded(
    nursery: Nursery, tmp_path: Path, rollout: str, thorough: bool
) -> None:
    assert GATHERING_SECONDS <= 0.5, "a second is promised, and writing takes its time too"
    path = tmp_path / "generations.db"
    chance = random.Random(9)
    for round_ in range(KILLS if thorough else FEW_KILLS):
        whose = f"{rollout} {round_}"
        with nursery.server(path) as server, Load(server, whose, endless()) as load:
            enough = chance.randint(1, 60)
            until(lambda enough=enough, load=load: len(load.answered) >= enough, "answers")
            before = {stream.number for stream in load.answered}
            # Within the second that is promised, unless others have the disk: no test can tell how long that takes.
            until(lambda before=before, whose=whose: before <= numbers(server, whose), "those that were answered")
            kill(server)
            load.wait()

        assert is_whole(path)
        kept = checked(server.kept(rollout_id=whose), load.streams)
        assert before <= kept.keys()


def test_requests_unfinished_when_the_engine_is_killed_are_recorded_as_failed(
    nursery: Nursery, tmp_path: Path, rollout: str
) -> None:
    with nursery.server(tmp_path / "generations.db") as server:
        with Load(server, rollout, endless(TOKENS_UNTIL_THE_END)) as load:
            until(lambda: len(load.begun) == len(load.streams) == 16, "answers that have begun")
            [engine] = set(re.findall(r"^\(EngineCore pid=(\d+)\)", server.log, re.MULTILINE))
            os.kill(int(engine), signal.SIGKILL)
            load.wait()
        server.process.wait(60)

        assert is_whole(server.path)
        kept = checked(server.kept(rollout_id=rollout), load.streams)
        assert kept.keys() == {stream.number for stream in load.streams}
        assert {each.status for each in kept.values()} == {"error"}
