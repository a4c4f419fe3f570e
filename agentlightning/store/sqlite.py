"""A database in a SQLite file, which several processes of one host may write at once."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import DBAPIError

from agentlightning.errors import InvalidRecord, StoreRefused, StoreUnavailable
from agentlightning.store import tables
from agentlightning.store.database import Database, transaction
from agentlightning.store.filesystem import network_file_system

__all__ = ["SqliteDatabase"]

APPLICATION_ID = int.from_bytes(b"AgL1", "big")
"""What `PRAGMA application_id` says in our files."""
VERSION = 2
"""The schema's, as `PRAGMA user_version` says it."""
MIGRATIONS: Mapping[int, Sequence[str]] = {
    1: (
        "ALTER TABLE spans ADD COLUMN is_numbered BOOLEAN",
        "ALTER TABLE spans ADD COLUMN common_key INTEGER",
        "CREATE TABLE probes (name TEXT NOT NULL, written_at DOUBLE NOT NULL, PRIMARY KEY (name))",
        *tables.ENDS_THAT_WERE_LEFT,
    ),
}
"""The statements that make a file of this version one of the next."""

# Set before the file's first page is written, or never: smaller pages waste more of themselves on rows of some KiB.
PAGE_BYTES = 16384
WAL_BYTES = 16 << 20
"""The size to which the WAL file shrinks when all that is in it has been copied to the database file."""


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
            with self.explained(), self._engine.connect() as connection:
                self._prepare(connection)
        except BaseException:
            self.close()
            raise

    def reading(self) -> AbstractContextManager[Connection]:
        return self._transaction("BEGIN")

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        if self._identity() != self._file:
            raise StoreUnavailable(f"{self._path} was replaced since it was opened")
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection
        self.tidy()

    def explanation(self, error: Exception) -> Exception | None:
        reason = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(reason, OSError):
            return StoreUnavailable(f"{self._path} cannot be opened: {reason.strerror}")
        if isinstance(reason, OverflowError):
            return InvalidRecord(f"a number that SQLite cannot hold: {reason}")
        if isinstance(reason, UnicodeEncodeError):
            return InvalidRecord(f"a text that SQLite cannot hold: {reason.reason}")
        if isinstance(reason, sqlite3.OperationalError):
            return StoreUnavailable(f"{self._path} cannot be used now: {reason}")
        if type(reason) is sqlite3.DatabaseError:
            return StoreRefused(f"{self._path} is no SQLite file, or a broken one: {reason}")
        return InvalidRecord(f"{reason}") if isinstance(reason, sqlite3.Error) else None

    def tidy(self) -> None:
        """Empty the WAL file, if a large transaction has left it large and no reader is in the way."""
        if not self._has_large_wal():
            return
        with suppress(StoreUnavailable, StoreRefused), self.explained(), self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")
            try:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(self._patience * 1000)}")

    def close(self) -> None:
        self._engine.dispose()

    def _has_large_wal(self) -> bool:
        try:
            return os.stat(f"{self._path}-wal").st_size > WAL_BYTES
        except OSError:
            return False

    def _make_file(self) -> None:
        with self.explained(), suppress(FileExistsError):
            # SQLite gives the files beside it, -wal and -shm, the same mode.
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def _identity(self) -> tuple[int, int]:
        with self.explained():
            found = os.stat(self._path)
            return found.st_dev, found.st_ino

    def _prepare(self, connection: Connection) -> None:
        """Make the schema where there is none, or bring it up to date; what is not ours is refused, and left alone."""
        with transaction(connection, "BEGIN"):
            version = self._version(connection)
        connection.exec_driver_sql(f"PRAGMA page_size = {PAGE_BYTES}")
        self._enter_wal_mode(connection)
        if version == VERSION:
            return
        with transaction(connection, "BEGIN IMMEDIATE"):
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
    def _transaction(self, begin: str) -> Iterator[Connection]:
        with self.explained(), self._engine.connect() as connection, transaction(connection, begin):
            yield connection


def _configure(connection: sqlite3.Connection, _: object) -> None:
    # In WAL mode this loses nothing when a process is killed; without power, the last transactions, whole.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
