"""Fixtures: stores of every kind, and what they are stored in."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentlightning.store import Store, open_database, open_store, tables
from agentlightning.store.database import Database
from agentlightning.store.stale import triggers
from tests.common.postgresql import PostgresServer
from tests.server.process import StoreServer

EVERY_KIND = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.tier("test")),
    pytest.param("http", marks=pytest.mark.tier("test")),
    pytest.param("partitions", marks=pytest.mark.tier("all")),
]
"""The kinds of stores: a file, a PostgreSQL database, an `agl store`, and a PostgreSQL database with partitions."""
PARTITIONS = 3


def back_to_version(version: int, url: str) -> Iterator[str]:
    """Yield statements that give a database of today the tables of an older version, down to version 2."""
    is_file = "postgresql" not in url
    for name in re.findall(r"CREATE TRIGGER (\w+)", "\n".join(triggers("sqlite"))):
        yield f"DROP TRIGGER {name}" if is_file else f"DROP FUNCTION {name} CASCADE"
    yield "DROP INDEX generations_unassigned"
    yield from (f"DROP TABLE {name}" for name in ("stale_rollouts", "summaries", "tallies"))
    if version < 6:
        yield "DROP INDEX rollouts_by_change"
        yield "ALTER TABLE rollouts DROP COLUMN changed"
    if version < 5:
        for name in ("served_model_key", "requested_params_key", "prompt_logprobs"):
            yield f"ALTER TABLE generations DROP COLUMN {name}"
        yield from (f"ALTER TABLE choices DROP COLUMN {name}" for name in ("sampling_mask", "top_logprobs"))
    if version < 4:
        for name in ("agent_key", "parent_agent_key", "purpose_key", "retry", "via"):
            yield f"ALTER TABLE generations DROP COLUMN {name}"
        yield from (f"DROP TABLE {name}" for name in ("drifts", "breaks", "drift_totals"))
    if version < 3:
        for name in ("ids_block", "text_block"):
            yield f"DROP INDEX generations_by_{name}"
            yield f"ALTER TABLE generations DROP COLUMN {name}"
        yield from (f"DROP TABLE {name}" for name in ("blocks", "watermarks", "lost_calls"))
    yield f"PRAGMA user_version = {version}" if is_file else f"UPDATE version SET version = {version}"


def new_store_of(kind: str, request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Return a function that creates an empty store of a kind, and returns its URL."""
    if kind == "sqlite":
        return str
    if kind == "http":
        server: StoreServer = request.getfixturevalue("server")
        return lambda _: emptied(server)
    postgresql: PostgresServer = request.getfixturevalue("postgresql")
    end = f"?partitions={PARTITIONS}" if kind == "partitions" else ""
    return lambda _: postgresql.new_database() + end


@pytest.fixture
def url(new_store: Callable[[Path], str], tmp_path: Path) -> str:
    """Return the URL of an empty store."""
    return new_store(tmp_path / "generations.db")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as store:
        yield store


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """Open the database under the store."""
    database = open_database(url)
    yield database
    database.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """Run an `agl store` that tests share; each empties it first."""
    with StoreServer(tmp_path_factory.mktemp("agl") / "store.db", "--max-body-mb=16") as server:
        yield server


def emptied(server: StoreServer) -> str:
    """Delete all records of the server's store, and return its URL."""
    with closing(sqlite3.connect(server.path)) as connection, connection:
        for table in tables.metadata.tables:
            if table not in ("probes", "secrets"):
                connection.execute(f"DELETE FROM {table}")
    return server.url
