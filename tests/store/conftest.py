"""Fixtures: stores of every kind, and what they are stored in."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentlightning.store import Store, open_database, open_store, tables
from agentlightning.store.database import Database
from tests.common.postgresql import PostgresServer
from tests.server.process import StoreServer

EVERY_KIND = [
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.tier("test")),
    pytest.param("http", marks=pytest.mark.tier("test")),
]
"""The kinds of stores: a file, a PostgreSQL database, and an `agl store`."""


BACK_TO_VERSION_5 = ("DROP INDEX rollouts_by_change", "ALTER TABLE rollouts DROP COLUMN changed")
"""Statements that give a database of version 6 the tables of version 5."""
BACK_TO_VERSION_4 = (
    *BACK_TO_VERSION_5,
    *(
        f"ALTER TABLE generations DROP COLUMN {name}"
        for name in ("served_model_key", "requested_params_key", "prompt_logprobs")
    ),
    *(f"ALTER TABLE choices DROP COLUMN {name}" for name in ("sampling_mask", "top_logprobs")),
)
"""Statements that give a database of version 6 the tables of version 4."""
BACK_TO_VERSION_3 = (
    *BACK_TO_VERSION_4,
    *(
        f"ALTER TABLE generations DROP COLUMN {name}"
        for name in ("agent_key", "parent_agent_key", "purpose_key", "retry", "via")
    ),
    *(f"DROP TABLE {name}" for name in ("drifts", "breaks", "drift_totals")),
)
"""Statements that give a database of version 6 the tables of version 3."""
BACK_TO_VERSION_2 = (
    *BACK_TO_VERSION_3,
    *(f"DROP INDEX generations_by_{name}" for name in ("ids_block", "text_block")),
    *(f"ALTER TABLE generations DROP COLUMN {name}" for name in ("ids_block", "text_block")),
    *(f"DROP TABLE {name}" for name in ("blocks", "watermarks", "lost_calls")),
)
"""Statements that give a database of version 6 the tables of version 2."""


def new_store_of(kind: str, request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Return a function that creates an empty store of a kind, and returns its URL."""
    if kind == "sqlite":
        return str
    if kind == "http":
        server: StoreServer = request.getfixturevalue("server")
        return lambda _: emptied(server)
    postgresql: PostgresServer = request.getfixturevalue("postgresql")
    return lambda _: postgresql.new_database()


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
