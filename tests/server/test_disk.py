"""Databases that cannot be written, and their size on disk."""

from __future__ import annotations

import re
import sqlite3
import time
from array import array
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import psutil
import psycopg

from agentlightning.generation import Choice
from agentlightning.store import open_database, open_store, sqlite
from tests.common.generations import generation
from tests.common.postgresql import PostgresServer
from tests.common.rollouts import fill, long_generation
from tests.server.process import SECONDS, StoreServer

MIB = 1 << 20


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_ready(client: httpx.Client) -> bool:
    answer = client.get("/readyz")
    assert answer.status_code in (200, 503)
    if answer.status_code == 503:
        assert answer.json() == {"detail": "the store cannot be used now: its log says why"}
        assert answer.headers["Retry-After"] == "1"
    return answer.status_code == 200


def test_full_disk_is_not_ready_until_space_is_free(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        process = psutil.Process(server.process.pid)
        assert is_ready(client)
        # The server can write no file beyond this size, as on a full disk.
        process.rlimit(psutil.RLIMIT_FSIZE, (4096, psutil.RLIM_INFINITY))
        assert client.post("/v1/agl/rollouts", json={"input": 1}).status_code == 503
        assert [is_ready(client) for _ in range(3)] == [False] * 3
        # The store can still be read.
        assert client.get("/v1/agl/rollouts").json()["total"] == 0
        assert client.get("/healthz").status_code == 200
        process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        assert is_ready(client)
        assert client.post("/v1/agl/rollouts", json={"input": 1}).status_code == 201


def test_read_only_postgresql_is_not_ready_until_it_writes(tmp_path: Path, postgresql: PostgresServer) -> None:
    url = postgresql.new_database()
    name = url.rpartition("/")[2]

    def set_read_only(value: str) -> None:
        with psycopg.connect(postgresql.url("postgres"), autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}".encode())
            # A failover ends connections as well.
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))

    with StoreServer(tmp_path / "store.db", store=url) as server, server.client() as client:
        assert is_ready(client)
        set_read_only("on")
        until(lambda: not is_ready(client))
        assert client.get("/v1/agl/rollouts").json()["total"] == 0
        assert client.post("/v1/agl/rollouts", json={"input": 1}).status_code == 503
        assert [is_ready(client) for _ in range(3)] == [False] * 3
        assert "cannot be used now: " in server.log.read_text()
        set_read_only("off")
        until(lambda: is_ready(client))
        assert client.post("/v1/agl/rollouts", json={"input": 1}).status_code == 201


def test_wal_shrinks_after_a_large_transaction(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    wal = Path(f"{path}-wal")
    large = [generation(number, choices=[Choice(token_ids=array("i", range(1_000_000)))]) for number in range(10)]
    with open_store(str(path)) as store:
        store.add([generation(11)])
        # Another reader keeps the WAL from being reset.
        with open_store(str(path)) as other:
            reading = other.generations()
            next(reading)
            store.add(large)
            assert wal.stat().st_size < sqlite.WAL_BYTES
        store.add([generation(12)])
        assert wal.stat().st_size < sqlite.WAL_BYTES


def test_wal_shrinks_once_a_long_reader_ends(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    wal = Path(f"{path}-wal")
    with StoreServer(path) as server, server.client() as client:
        client.post("/v1/agl/rollouts", json={"input": 1})
        with closing(open_database(str(path))) as database, database.reading() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM rollouts").scalar()
            for _ in range(2):
                assert client.post("/v1/agl/rollouts", json={"input": "x" * 40 * MIB}).status_code == 201
            assert wal.stat().st_size > 40 * MIB
        until(lambda: wal.stat().st_size < sqlite.WAL_BYTES)
        assert client.get("/v1/agl/statistics").json()["total_rollouts"] == 3


def test_damaged_data_answers_500_and_is_logged(tmp_path: Path, new_store: Callable[[Path], str]) -> None:
    """Damaged ids in the database stand for any error in the store."""
    path = tmp_path / "store.db"
    url = new_store(path)
    kept = long_generation(url, 100)
    fill(url, 1)
    with StoreServer(path, store=url) as server, server.client() as client:
        assert client.get("/generation", params={"id": kept.id}).status_code == 200
        assert "Traceback" not in server.log.read_text()
        damaged = "UPDATE {}choices SET token_ids = {}"
        if url == str(path):
            with sqlite3.connect(path) as connection:
                connection.execute(damaged.format("", "x'00'"))
        else:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(damaged.format("agentlightning.", "'x'").encode())
        answer = client.get("/generation", params={"id": kept.id})
        assert answer.status_code == 500
        assert "cannot keep a value" not in answer.text
        pattern = re.compile(r"Traceback.*ValueError: ", re.DOTALL)
        until(lambda: pattern.search(server.log.read_text()) is not None)
        assert client.get("/readyz").status_code == 200
