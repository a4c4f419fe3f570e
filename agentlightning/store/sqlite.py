"""A database in a SQLite file, which several processes of one host may write at once."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import DBAPIError

from agentlightning.store import StoreRefused, StoreUnavailable, tables
from agentlightning.store.database import Database
from agentlightning.store.filesystem import network_file_system

__all__ = ["SqliteDatabase"]

APPLICATION_ID = int.from_bytes(b"AgL1", "big")
"""What `PRAGMA application_id` says in our files."""
VERSION = 1
"""The schema's, as `PRAGMA user_version` says it."""
MIGRATIONS: Mapping[int, Sequence[str]] = {}
"""The statements that make a file of this version one of the next."""

# Set before the file's first page is written, or never: smaller pages waste more of themselves on rows of some KiB.
PAGE_BYTES = 16384


class SqliteDatabase(Database):
    """A file in WAL mode: readers never wait, and who writes waits only for who writes."""

    def __init__(self, path: str, create: bool, patience: float) -> None:
        if path in ("", ":memory:"):
            raise StoreRefused("a SQLite store needs the path of a file")
        self._path = Path(path).expanduser().absolute()
        if network := network_file_system(self._path):
            raise StoreRefused(
                f"{self._path} is on a network file system ({network}), where the locks and the shared memory of "
                "SQLite do not hold: give a path on a local disk"
            )
        self._patience = patience
        if create:
            self._make_file()
        self._file = self._identity()
        self._engine = create_engine(
            URL.create("sqlite", database=str(self._path)),
            # Where a transaction begins and ends is said here, not guessed by Python's sqlite3.
            isolation_level="AUTOCOMMIT",
            connect_args={"timeout": patience},
            pool_reset_on_return=None,
        )
        event.listen(self._engine, "connect", _configure)
        try:
            with self._connected() as connection:
                self._prepare(connection)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self._connected() as connection, _transaction(connection, "BEGIN"):
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        if self._identity() != self._file:
            raise StoreUnavailable(f"{self._path} was replaced since it was opened")
        with self._connected() as connection, _transaction(connection, "BEGIN IMMEDIATE"):
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    def _make_file(self) -> None:
        with self._explained(), suppress(FileExistsError):
            # SQLite gives the files beside it, -wal and -shm, the same mode.
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def _identity(self) -> tuple[int, int]:
        with self._explained():
            found = os.stat(self._path)
            return found.st_dev, found.st_ino

    def _prepare(self, connection: Connection) -> None:
        """Make the schema where there is none, or bring it up to date; what is not ours is refused, and left alone."""
        with _transaction(connection, "BEGIN"):
            version = self._version(connection)
        connection.exec_driver_sql(f"PRAGMA page_size = {PAGE_BYTES}")
        self._enter_wal_mode(connection)
        if version == VERSION:
            return
        with _transaction(connection, "BEGIN IMMEDIATE"):
            # Read again: somebody may have been here first.
            version = self._version(connection)
            if version == 0:
                tables.metadata.create_all(connection, checkfirst=False)
                connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            else:
                for statement in (statement for older in range(version, VERSION) for statement in MIGRATIONS[older]):
                    connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")

    def _version(self, connection: Connection) -> int:
        """The version of the file's schema; 0 where it is empty."""
        of_whom, version, found = (
            connection.exec_driver_sql(query).scalar_one()
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if (of_whom, version, found) == (0, 0, 0):
            return 0
        if of_whom != APPLICATION_ID:
            raise StoreRefused(f"{self._path} is the database of another program")
        if version > VERSION:
            raise StoreRefused(
                f"{self._path} was written by a newer agentlightning (schema {version}, this one knows {VERSION}): "
                "upgrade agentlightning, or give another path"
            )
        return version

    def _enter_wal_mode(self, connection: Connection) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
                return
            except DBAPIError as error:
                # This one statement does not wait for whoever does the same at this moment.
                if "locked" not in str(error.orig) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Makes one of the errors that a store may raise of those of SQLite and of the system."""
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(f"{self._path} cannot be opened: {error.strerror}") from error
        except OverflowError as error:
            raise ValueError(f"a number that SQLite cannot hold: {error}") from error
        except (DBAPIError, sqlite3.Error) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            if isinstance(reason, sqlite3.OperationalError):
                raise StoreUnavailable(f"{self._path} cannot be used now: {reason}") from error
            if type(reason) is sqlite3.DatabaseError:
                raise StoreRefused(f"{self._path} is no SQLite file, or a broken one: {reason}") from error
            raise ValueError(f"{reason}") from error


def _configure(connection: sqlite3.Connection, _: object) -> None:
    # In WAL mode this loses nothing when a process is killed; without power, the last transactions, whole.
    connection.execute("PRAGMA synchronous = NORMAL")


@contextmanager
def _transaction(connection: Connection, begin: str) -> Iterator[None]:
    connection.exec_driver_sql(begin)
    try:
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        # SQLite has taken it back itself where the disk is full.
        if connection.connection.in_transaction:  # type: ignore[attr-defined]
            connection.exec_driver_sql("ROLLBACK")
        raise
