"""Where it is all kept: `open_store(url)`, and what every store of generations can do.

Nothing above this knows which store it is. What a store is made of is imported when one is opened.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypedDict

from agentlightning import settings
from agentlightning.errors import StoreRefused
from agentlightning.generation import Generation, Loss, Status
from agentlightning.sender import Sender
from agentlightning.triplet import Triplet

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from agentlightning.store.database import Database

__all__ = ["Filters", "Store", "open_database", "open_store"]

SECONDS_FOR_OTHERS = 5.0


class Filters(TypedDict, total=False):
    """Which generations: those that all of these hold for. An id that is None stands for those that have none.

    `since` and `until` are nanoseconds since the epoch, and about `finished_at`: `since <= finished_at < until`.
    """

    rollout_id: str | None
    attempt_id: str | None
    session_id: str | None
    call_id: str | None
    response_id: str | None
    model: str | None
    since: int
    until: int
    status: Status


class Store(AbstractContextManager["Store"], ABC):
    """Keeps generations. Safe for several threads, not for a fork: each process opens its own, and forks without it.

    Every method raises `StoreUnavailable` or `StoreRefused` where the store is the reason that it cannot do its work.
    """

    @abstractmethod
    def greet(self, sender: Sender) -> None:
        """Note who will write. May be told again, and otherwise: what is told last holds.

        Raises:
            ValueError: no store can keep what is told.
        """

    @abstractmethod
    def add(self, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        """Keep all of them that can be kept; returns how many are new.

        One whose id is known already is left as it is: whoever does not know whether an `add` has worked repeats it.

        Args:
            sender_id: whose they are; one that has never greeted is as none.

        Raises:
            InvalidRecord: some cannot be kept by any store (an `id` or `call_id` that is no UUID, for one). It names
                them, and all others are kept.
        """

    @abstractmethod
    def generations(self, **filters: Unpack[Filters]) -> Iterator[Generation]:
        """Those that the filters let through, in the order in which they finished; all of them without filters.

        Reads on as it is iterated, so it never holds more than a few, nor keeps anybody from writing. What is written
        meanwhile may be among them or not.
        """

    @abstractmethod
    def tally(self, **filters: Unpack[Filters]) -> dict[Status, int]:
        """How many the filters let through, by status; every status is there."""

    @abstractmethod
    def add_losses(self, losses: Sequence[Loss]) -> None:
        """Write down what could not be kept: all or none, each once, as `add` does."""

    @abstractmethod
    def losses(self) -> Iterator[Loss]:
        """What could not be kept, in the order in which it was written down."""

    @abstractmethod
    def rollout_status(self, rollout_id: str) -> str | None:
        """The status of a rollout in the queue; None where that does not have it."""

    @abstractmethod
    def triplets(self, rollout_id: str | None = None, attempt_id: str | None = None) -> Iterator[Triplet]:
        """Those of a rollout, or of an attempt of it, in order; without a rollout those of all.

        One rollout after the other, each as it is when it is reached, in the order of the first call that finished.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the store. Idempotent."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_store(url: str, *, create: bool = True, patience: float = SECONDS_FOR_OTHERS) -> Store:
    """Open the store at `url`, as `AGL_STORE` has it, for generations: an `agl store` at `http(s)://HOST:PORT`, or a
    database, for which the arguments are those of `open_database`.
    """
    if url.startswith(("http://", "https://")):
        with _needing("a store over HTTP needs msgspec", "'msgspec>=0.18'"):
            from agentlightning.store.http import HttpStore
        return HttpStore(url)
    # First, since it says what is missing where SQLAlchemy is.
    database = open_database(url, create=create, patience=patience)
    from agentlightning.store.database_store import DatabaseStore

    return DatabaseStore(database)


def open_database(url: str, *, create: bool = True, patience: float = SECONDS_FOR_OTHERS) -> Database:
    """Open the database of a store, for all that is kept in it.

    Args:
        url: the path of a SQLite file, or `sqlite:///` and the path (`sqlite:////` and the rest of an absolute one); or
            `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, with libpq's options.
        create: make what is not there: the file, readable by its owner alone, or the tables.
        patience: how many seconds a call waits while another process writes.

    Raises:
        StoreUnavailable: it is not there, or cannot be opened now.
        StoreRefused: nothing that this version can use, or on a file system where it would not be safe.
    """
    scheme, separator, rest = url.partition("://")
    match scheme if separator else "sqlite":
        case "sqlite" if not separator or rest.startswith("/"):
            with _needing("a SQLite store needs SQLAlchemy", "'sqlalchemy>=2'"):
                from agentlightning.store.sqlite import SqliteDatabase
            return SqliteDatabase(rest.removeprefix("/") if separator else url, create, patience)
        case "sqlite":
            raise StoreRefused(f"{url} has no path: it is sqlite:///PATH, or sqlite:////PATH from the root on")
        case "postgresql":
            with _needing("a PostgreSQL store needs SQLAlchemy and psycopg", "'sqlalchemy>=2' 'psycopg[binary]>=3.2'"):
                from agentlightning.store.postgresql import PostgresqlDatabase
            return PostgresqlDatabase(url, create, patience)
        case "http" | "https":
            shown = settings.without_secrets(url)
            raise StoreRefused(f"{shown} is an agl store, and no database to serve one on: give the path of a file")
        case _:
            raise StoreRefused(f"there is no {scheme}:// store: give the path of a SQLite file")


@contextmanager
def _needing(sentence: str, packages: str) -> Iterator[None]:
    """Around an import: says what is missing, and how to install it."""
    try:
        yield
    except ImportError as error:
        raise StoreRefused(f"{sentence}: {sys.executable} -m pip install {packages}") from error
