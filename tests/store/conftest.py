"""The databases that stores stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentlightning.store import Store, open_database, open_store
from agentlightning.store.database import Database


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
