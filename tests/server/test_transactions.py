"""Tests of writes that are committed together: each succeeds or fails alone, unless the database is at fault."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from fastapi import Response
from sqlalchemy import Connection, delete, insert, select, update

from agentlightning.errors import InvalidRecord, StoreUnavailable
from agentlightning.server import answers, transactions
from agentlightning.server.routes.workers import QueryWorkers
from agentlightning.server.transactions import Busy, Transactions
from agentlightning.store import open_database, tables, workers
from agentlightning.store.pages import ROWS_AT_ONCE
from agentlightning.store.tables import span_sequences as table
from tests.common.postgresql import PostgresServer


def add(*names: str) -> Callable[[Connection], int]:
    """Return a write that inserts rows with these names, which have to be new."""

    def work(connection: Connection) -> int:
        for name in names:
            connection.execute(insert(table).values(rollout_id=name, last=1))
        return len(names)

    return work


class RollBackError(Exception):
    """Raised to roll back a transaction."""


def run(url: str, script: Callable[[Transactions], Awaitable[Any]], patience: float = 5.0) -> Any:
    async def main() -> Any:
        database = open_database(url, patience=patience)
        running = Transactions(database)
        try:
            return await script(running)
        finally:
            await running.close()
            database.close()

    return asyncio.run(main())


def kept(url: str) -> list[str]:
    with closing(open_database(url)) as database, database.reading() as connection:
        return [*connection.execute(select(table.c.rollout_id).order_by(table.c.rollout_id)).scalars()]


@pytest.fixture
def url(new_store: Callable[[Path], str], tmp_path: Path) -> str:
    return new_store(tmp_path / "store.db")


def test_write_that_raises_is_rolled_back_alone(url: str) -> None:
    def refuse(connection: Connection) -> None:
        add("undone")(connection)
        raise LookupError("not this one")

    async def script(running: Transactions) -> list[Any]:
        writes = [running.write(add("a")), running.write(refuse), running.write(add("b"))]
        # The second name is taken, so the row before it is rolled back, too.
        writes += [running.write(add("also undone", "a")), running.write(add("c"))]
        return await asyncio.gather(*writes, return_exceptions=True)

    first, refused, second, taken, third = run(url, script)
    assert (first, second, third) == (1, 1, 1)
    assert isinstance(refused, LookupError)
    assert isinstance(taken, InvalidRecord)
    assert kept(url) == ["a", "b", "c"]


def test_writes_of_one_kind_are_run_at_once_and_each_gets_its_outcome(url: str) -> None:
    runs: list[list[str]] = []

    def add_all(connection: Connection, names: Sequence[str]) -> list[str]:
        runs.append([*names])
        add(*names)(connection)
        return [name.upper() for name in names]

    async def script(running: Transactions) -> list[str]:
        first = asyncio.ensure_future(running.write(lambda _: time.sleep(0.2)))
        # The others wait while the first one is written.
        await asyncio.sleep(0.05)
        found = await asyncio.gather(*(running.write_together(add_all, name) for name in "abc"))
        await first
        return found

    assert run(url, script) == ["A", "B", "C"]
    assert runs == [["a", "b", "c"]]
    assert kept(url) == ["a", "b", "c"]


def test_one_of_several_that_cannot_be_written_fails_alone(url: str) -> None:
    def add_all(connection: Connection, names: Sequence[str]) -> list[str]:
        if "refused" in names:
            raise LookupError("not this one")
        add(*names)(connection)
        return [*names]

    async def script(running: Transactions) -> list[Any]:
        names = ("a", "refused", "b", "a", "c")
        return await asyncio.gather(*(running.write_together(add_all, name) for name in names), return_exceptions=True)

    first, refused, second, taken, third = run(url, script)
    assert (first, second, third) == ("a", "b", "c")
    assert isinstance(refused, LookupError)
    assert isinstance(taken, InvalidRecord)
    assert kept(url) == ["a", "b", "c"]


def test_locked_database_fails_all_writes_and_stores_none(url: str) -> None:
    async def script(running: Transactions) -> list[Any]:
        with closing(open_database(url)) as database, database.writing() as other:
            add("a", "b")(other)
            writes = [running.write(add(name)) for name in "ab"]
            refused = await asyncio.gather(*writes, return_exceptions=True)
            raise RollBackError(refused)

    with pytest.raises(RollBackError) as told:
        run(url, script, patience=0.05)
    [refused] = told.value.args
    assert [type(each) for each in refused] == [StoreUnavailable, StoreUnavailable]
    assert kept(url) == []


def test_write_beyond_the_waiting_limit_is_refused_as_busy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "WRITES_WAITING", 3)

    async def script(running: Transactions) -> list[Any]:
        writes = [running.write(add(name)) for name in "abcde"]
        return await asyncio.gather(*writes, return_exceptions=True)

    assert [each if isinstance(each, int) else type(each) for each in run(url, script)] == [1, 1, 1, Busy, Busy]
    assert kept(url) == ["a", "b", "c"]


def test_close_commits_waiting_writes(url: str) -> None:
    async def script(running: Transactions) -> None:
        for number in range(1_000):
            # Nothing awaits the result.
            task = asyncio.ensure_future(running.write(add(f"{number:04}")))
            task.add_done_callback(lambda done: done.exception())
        await asyncio.sleep(0)

    run(url, script)
    assert len(kept(url)) == 1_000


def test_deadlock_of_two_servers_is_retried_until_both_commit(postgresql: PostgresServer) -> None:
    """Each server holds a lock that the other waits for, until PostgreSQL aborts one of them."""
    url = postgresql.new_database()
    both = Barrier(2)

    def increment(first: str, then: str) -> Callable[[Connection], None]:
        meets = [True]

        def work(connection: Connection) -> None:
            _increment(connection, first)
            if meets:
                meets.clear()
                both.wait(60)
            _increment(connection, then)

        return work

    async def script(one: Transactions) -> None:
        await one.write(add("a", "b"))
        with closing(open_database(url)) as database:
            other = Transactions(database)
            await asyncio.gather(one.write(increment("a", "b")), other.write(increment("b", "a")))
            await other.close()

    run(url, script, patience=60)
    with closing(open_database(url)) as database, database.reading() as connection:
        assert [*connection.execute(select(table.c.last)).scalars()] == [3, 3]


def _increment(connection: Connection, name: str) -> None:
    connection.execute(update(table).where(table.c.rollout_id == name).values(last=table.c.last + 1))


@pytest.mark.parametrize("rows", [ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 3 * ROWS_AT_ONCE])
def test_page_whose_rows_are_deleted_during_the_answer_is_valid_json(url: str, rows: int) -> None:
    def fill(connection: Connection) -> None:
        for number in range(rows):
            workers.note(connection, f"w-{number}", last_heartbeat_time=1.0)

    async def script(running: Transactions) -> tuple[bytes, bytes]:
        async def page() -> Response:
            query = QueryWorkers.model_validate({"sort_by": None})
            return await answers.listed(running, workers.listing(), query, workers.worker_fields)

        async def body(of: Any) -> bytes:
            parts: list[Any] = [part async for part in of.body_iterator] if hasattr(of, "body_iterator") else [of.body]
            return b"".join(parts)

        await running.write(fill)
        whole = await body(await page())
        begun = await page()
        await running.write(lambda connection: connection.execute(delete(tables.workers)))
        return whole, await body(begun)

    whole, cut = map(json.loads, run(url, script))
    assert [each["worker_id"] for each in whole["items"]] == [f"w-{number}" for number in range(rows)]
    assert cut == {**whole, "items": whole["items"][:ROWS_AT_ONCE]}
