"""Where it is all kept: `open_store(url)`, and what every store of generations can do.

Nothing above this knows which store it is. What a store is made of is imported when one is opened.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, TypedDict

from agentlightning.generation import Generation, Loss, Status

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from agentlightning.store.database import Database

__all__ = ["Filters", "Store", "StoreRefused", "StoreUnavailable", "open_database", "open_store"]

SECONDS_FOR_OTHERS = 5.0


class StoreUnavailable(Exception):
    """The store cannot be reached or written now; trying again may help. The message is one sentence that says why."""


class StoreRefused(Exception):
    """The store cannot be used as it is, and waiting does not help. The message is one sentence that says why."""


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
    def add(self, generations: Sequence[Generation]) -> int:
        """Keep all of them, or none where it raises; returns how many are new.

        One whose id is known already is left as it is: whoever does not know whether an `add` has worked repeats it.

        Raises:
            ValueError: one of them cannot be kept by any store: its `id` or `call_id` is no UUID, for one.
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
    def close(self) -> None:
        """Let go of the store. Idempotent."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_store(url: str, *, create: bool = True, patience: float = SECONDS_FOR_OTHERS) -> Store:
    """Open the store at `url`, as `AGL_STORE` has it, for generations. The arguments are those of `open_database`."""
    # First, since it says what is missing where SQLAlchemy is.
    database = open_database(url, create=create, patience=patience)
    from agentlightning.store.database_store import DatabaseStore

    return DatabaseStore(database)


def open_database(url: str, *, create: bool = True, patience: float = SECONDS_FOR_OTHERS) -> Database:
    """Open the database of a store, for all that is kept in it.

    Args:
        url: the path of a SQLite file, or `sqlite:///` and the path; `sqlite:////` and the rest of an absolute one.
        create: make the file where there is none, readable by its owner alone.
        patience: how many seconds a call waits while another process writes.

    Raises:
        StoreUnavailable: it is not there, or cannot be opened now.
        StoreRefused: nothing that this version can use, or on a file system where it would not be safe.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, path = "sqlite", url
    else:
        path = rest.removeprefix("/")
    match scheme:
        case "sqlite" if not separator or rest.startswith("/"):
            try:
                from agentlightning.store.sqlite import SqliteDatabase
            except ImportError as error:
                install = f"{sys.executable} -m pip install 'sqlalchemy>=2'"
                raise StoreRefused(f"a SQLite store needs SQLAlchemy: {install}") from error
            return SqliteDatabase(path, create, patience)
        case "sqlite":
            raise StoreRefused(f"{url} has no path: it is sqlite:///PATH, or sqlite:////PATH from the root on")
        case "postgresql" | "http" | "https":
            raise StoreRefused(f"{scheme}:// stores are not supported in this version: give the path of a SQLite file")
        case _:
            raise StoreRefused(f"there is no {scheme}:// store: give the path of a SQLite file")
