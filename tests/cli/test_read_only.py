"""The commands that read a store write nothing: not a byte of a file, not another file beside it, and no state."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from agentlightning.rollout_records import RolloutConfig
from agentlightning.store import open_store, sqlite
from tests.common.forking import run_agl
from tests.common.generations import generation
from tests.common.vllm import without_agl

SECONDS = 120
READERS = {
    "doctor": ("doctor", "--quick"),
    "doctor --store": ("doctor", "--store"),
    "export": ("export", "--store"),
    "export triplets": ("export", "--what", "triplets", "--store"),
}
"""The commands, each followed by the store; the first one takes it from AGL_STORE."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(reader: str, path: Path) -> subprocess.CompletedProcess[bytes]:
    command = READERS[reader]
    arguments = command if reader == "doctor" else (*command, str(path))
    return run_agl(*arguments, env={**without_agl(os.environ), "AGL_STORE": str(path)}, timeout=SECONDS)


def store(path: Path) -> None:
    with open_store(str(path)) as opened:
        opened.add([generation(number) for number in range(3)])
        opened.start_rollout({}, config=RolloutConfig(timeout_seconds=1e-9))


def older(path: Path) -> None:
    store(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {sqlite.VERSION - 1}")


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (a)")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Path.touch, "has no store in it: a server that records there, or `agl store`, creates it"),
        (foreign, "belongs to another program: give the path of another file"),
        (older, f"(schema {sqlite.VERSION - 1}, this one reads {sqlite.VERSION}): run `agl migrate --store"),
        (store, None),
    ],
    ids=["empty", "of another program", "older", "store"],
)
def test_reader_changes_nothing_and_says_why_it_cannot_read(
    tmp_path: Path, make: Callable[[Path], object], said: str | None, reader: str
) -> None:
    path = tmp_path / "run.db"
    make(path)
    before = contents(tmp_path)

    result = read(reader, path)

    assert contents(tmp_path) == before
    is_server_to_start = reader == "doctor" and make in (Path.touch, older)
    if said is None or is_server_to_start:
        assert result.returncode == 0, result.stdout + result.stderr
        return
    assert result.returncode == 1
    told = " ".join((result.stdout + result.stderr).decode().split())
    assert said in told.replace(" -> ", ": ")


@pytest.mark.parametrize("reader", READERS)
def test_reader_beside_a_writer_changes_nothing(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "run.db"
    with open_store(str(path)) as opened:
        opened.add([generation(number) for number in range(3)])
        before = contents(tmp_path)
        assert set(before) == {"run.db", "run.db-wal", "run.db-shm"}

        assert read(reader, path).returncode == 0

        assert contents(tmp_path) == before


@pytest.mark.parametrize("reader", READERS)
def test_reader_of_a_file_that_does_not_exist_creates_none(tmp_path: Path, reader: str) -> None:
    result = read(reader, tmp_path / "run.db")

    assert result.returncode == (0 if reader == "doctor" else 1)
    assert [*tmp_path.iterdir()] == []
