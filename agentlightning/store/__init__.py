"""Stores: `open_store(url)` opens any of them.

Each kind of store is imported when one is opened, so that a program needs only what its own store needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agentlightning import settings
from agentlightning.errors import StoreRefused
from agentlightning.store.filters import Filters
from agentlightning.store.interface import Store

if TYPE_CHECKING:
    from agentlightning.store.database import Database

__all__ = ["Filters", "Store", "open_database", "open_store", "place_of", "try_to_record"]

SECONDS_FOR_OTHERS = 5.0


def open_store(
    url: str, *, read_only: bool = False, patience: float = SECONDS_FOR_OTHERS, seconds: float | None = None
) -> Store:
    """Open a store. A file or tables that do not exist are created, unless it is opened for reading only.

    Args:
        url: as in `AGL_STORE`: the path of a SQLite file, `sqlite:///PATH`, `postgresql://...`, or the
            `http(s)://HOST:PORT` of an `agl store`.
        read_only: for a database: change nothing, neither a byte of a file nor the state of a rollout that is overdue.
            Every method that would write raises `StoreRefused`.
        patience: for a database: seconds to wait while another process writes.
        seconds: over HTTP: the most that a request waits for an answer; None for half a minute.

    Raises:
        StoreUnavailable: the store does not exist, or cannot be opened now.
        StoreRefused: the store cannot be used by this version, or with this URL or key.

    Example:
        >>> with open_store("run.db") as store:
        ...     store.enqueue_rollout({"question": "Paris?"}).status
        'queuing'
    """
    if _is_served(url):
        with _needing("a store over HTTP needs msgspec and urllib3", "'msgspec>=0.18' 'urllib3>=1.26'"):
            from agentlightning.store.http import HttpStore
        return HttpStore(url) if seconds is None else HttpStore(url, seconds)
    # First, because it names the missing package if SQLAlchemy is not installed.
    database = open_database(url, read_only=read_only, patience=patience)
    from agentlightning.store.database_store import DatabaseStore

    return DatabaseStore(database)


def open_database(url: str, *, read_only: bool = False, patience: float = SECONDS_FOR_OTHERS) -> Database:
    """Open the database of a store.

    Args:
        url: the path of a SQLite file, or `sqlite:///` and the path (`sqlite:////` and the rest of an absolute one); or
            `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, with libpq's options.
        read_only: change nothing: neither create the file or the tables, nor migrate them, nor write to them.
        patience: seconds that a call waits while another process writes.

    Raises:
        StoreUnavailable: the database does not exist, or cannot be opened now.
        StoreRefused: this version cannot use it, or it is on a file system where it would not be safe.
    """
    kind, place = _kind_of(url)
    return kind(place, read_only, patience)


def try_to_record(url: str, *, patience: float = SECONDS_FOR_OTHERS) -> str:
    """Check, without writing anything, that a server with this `AGL_STORE` could record; say what it would do there.

    Args:
        url, patience: as for `open_store`.

    Raises:
        StoreUnavailable, StoreRefused: the reason why it could not.
    """
    if _is_served(url):
        open_store(url).close()
        return f"{settings.without_secrets(url)} answers"
    kind, place = _kind_of(url)
    return kind.try_to_record(place, patience)


def place_of(url: str) -> str:
    """Return where a store is, as it may be shown: the absolute path of a file, or its URL without secrets."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "sqlite":
        return settings.without_secrets(url)
    return os.path.abspath(os.path.expanduser(rest.removeprefix("/") if separator else url))


def _is_served(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _kind_of(url: str) -> tuple[type[Database], str]:
    """Return the kind of a database, and its place as that kind writes it."""
    scheme, separator, rest = url.partition("://")
    match scheme if separator else "sqlite":
        case "sqlite" if not separator or rest.startswith("/"):
            with _needing("a SQLite store needs SQLAlchemy", "'sqlalchemy>=2'"):
                from agentlightning.store.sqlite import SqliteDatabase
            return SqliteDatabase, rest.removeprefix("/") if separator else url
        case "sqlite":
            raise StoreRefused(f"{url} has no path", "write sqlite:///PATH, or sqlite:////PATH for an absolute path")
        case "postgresql":
            with _needing("a PostgreSQL store needs SQLAlchemy and psycopg", "'sqlalchemy>=2' 'psycopg[binary]>=3.2'"):
                from agentlightning.store.postgresql import PostgresqlDatabase
            return PostgresqlDatabase, url
        case "http" | "https":
            shown = settings.without_secrets(url)
            raise StoreRefused(f"{shown} is already an agl store", "give the path of a file or a postgresql:// URL")
        case _:
            raise StoreRefused(
                f"{scheme}:// is not a store", "give the path of a SQLite file, or a postgresql:// or http:// URL"
            )


@contextmanager
def _needing(sentence: str, packages: str) -> Generator[None]:
    """Turn a failed import into an error that says what to install."""
    try:
        yield
    except ImportError as error:
        raise StoreRefused(sentence, f"{sys.executable} -m pip install {packages}") from error
