"""Writes that are committed together: each is kept or undone for itself, unless the database is the reason."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from agentlightning.server import transactions
from agentlightning.server.transactions import Busy, Transactions
from agentlightning.store import StoreUnavailable, open_database

ADD = "INSERT INTO span_sequences (rollout_id, last) VALUES (?, 1)"


def add(*names: str) -> Callable[[Connection], int]:
    """A write that adds rows of these names, which have to be new."""

    def work(connection: Connection) -> int:
        for name in names:
            connection.exec_driver_sql(ADD, (name,))
        return len(names)

    return work


def run(path: Path, script: Callable[[Transactions], Awaitable[Any]], patience: float = 5.0) -> Any:
    async def main() -> Any:
        database = open_database(str(path), patience=patience)
        running = Transactions(database)
        try:
            return await script(running)
        finally:
            await running.close()
            database.close()

    return asyncio.run(main())


def kept(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT rollout_id FROM span_sequences ORDER BY 1")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def test_a_write_that_raises_is_undone_alone(path: Path) -> None:
    def refuse(connection: Connection) -> None:
        add("undone")(connection)
        raise LookupError("not this one")

    async def script(running: Transactions) -> list[Any]:
        writes = [running.write(add("a")), running.write(refuse), running.write(add("b"))]
        # Two that cannot be: a name that is taken, and the row before it goes with it.
        writes += [running.write(add("also undone", "a")), running.write(add("c"))]
        return await asyncio.gather(*writes, return_exceptions=True)

    first, refused, second, taken, third = run(path, script)
    assert (first, second, third) == (1, 1, 1)
    assert isinstance(refused, LookupError)
    assert isinstance(taken, ValueError)
    assert "UNIQUE" in str(taken)
    assert kept(path) == ["a", "b", "c"]


def test_what_cannot_be_written_now_is_told_to_all_and_not_kept(path: Path) -> None:
    async def script(running: Transactions) -> list[Any]:
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            writes = [running.write(add(name)) for name in "ab"]
            return await asyncio.gather(*writes, return_exceptions=True)

    refused = run(path, script, patience=0.05)
    assert [type(each) for each in refused] == [StoreUnavailable, StoreUnavailable]
    assert "locked" in str(refused[0])
    assert kept(path) == []


def test_who_writes_when_too_many_wait_is_told_to_come_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "WRITES_WAITING", 3)

    async def script(running: Transactions) -> list[Any]:
        writes = [running.write(add(name)) for name in "abcde"]
        return await asyncio.gather(*writes, return_exceptions=True)

    assert [each if isinstance(each, int) else type(each) for each in run(path, script)] == [1, 1, 1, Busy, Busy]
    assert kept(path) == ["a", "b", "c"]


def test_what_waits_is_committed_before_the_end(path: Path) -> None:
    async def script(running: Transactions) -> None:
        for number in range(1_000):
            # Nobody waits for the answer.
            task = asyncio.ensure_future(running.write(add(f"{number:04}")))
            task.add_done_callback(lambda done: done.exception())
        await asyncio.sleep(0)

    run(path, script)
    assert len(kept(path)) == 1_000
