"""The databases and the server that stores stand on."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentlightning.store import Store, open_database, open_store
from agentlightning.store.database import Database
from tests.server.process import StoreServer


@pytest.fixture
def url(new_store: Callable[[Path], str], tmp_path: Path) -> str:
    """Where a store may be made: in a file, or in a database of PostgreSQL."""
    return new_store(tmp_path / "generations.db")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as store:
        yield store


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """The same, as who shows what is in it reads it."""
    database = open_database(url)
    yield database
    database.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """`agl store`, which tests share; each has it `emptied`."""
    with StoreServer(tmp_path_factory.mktemp("agl") / "store.db", "--max-body-mb=16") as server:
        yield server


def emptied(server: StoreServer) -> str:
    """The URL of this server, from whose store all generations are gone."""
    with closing(sqlite3.connect(server.path)) as connection, connection:
        for table in ("generations", "choices", "texts", "losses"):
            connection.execute(f"DELETE FROM {table}")
    return server.url
