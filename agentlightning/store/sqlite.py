"""A database in a SQLite file, which several processes of one host may write at the same time."""

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
from agentlightning.store.blocks import RECENT
from agentlightning.store.chains import Recent
from agentlightning.store.database import Database, transaction
from agentlightning.store.filesystem import network_file_system

__all__ = ["SqliteDatabase"]

APPLICATION_ID = int.from_bytes(b"AgL1", "big")
"""`PRAGMA application_id` of the files of agentlightning."""
VERSION = 3
"""Version of the schema, which `PRAGMA user_version` holds."""
MIGRATIONS: Mapping[int, Sequence[str]] = {
    1: (
        "ALTER TABLE spans ADD COLUMN is_numbered BOOLEAN",
        "ALTER TABLE spans ADD COLUMN common_key INTEGER",
        "CREATE TABLE probes (name TEXT NOT NULL, written_at DOUBLE NOT NULL, PRIMARY KEY (name))",
        *tables.CLEAR_STALE_END_TIMES,
    ),
    2: (
        (
            "CREATE TABLE blocks (key INTEGER NOT NULL, depth INTEGER NOT NULL, parent INTEGER NOT NULL, "
            "name BLOB NOT NULL, body BLOB NOT NULL, PRIMARY KEY (key))"
        ),
        "CREATE UNIQUE INDEX blocks_by_parent ON blocks (parent, name)",
        "ALTER TABLE generations ADD COLUMN ids_block INTEGER",
        "ALTER TABLE generations ADD COLUMN text_block INTEGER",
        "CREATE INDEX generations_by_ids_block ON generations (ids_block) WHERE ids_block IS NOT NULL",
        "CREATE INDEX generations_by_text_block ON generations (text_block) WHERE text_block IS NOT NULL",
    ),
}
"""Statements that turn a file of a version into one of the next."""

# It can be set only before the first page is written. With rows of some KiB, smaller pages waste more space.
PAGE_BYTES = 16384
INCREMENTAL = 2
"""`PRAGMA auto_vacuum` of a file that returns its unused pages to the file system when it is asked to."""
PAGES_AT_ONCE = 64
"""Pages that are returned at once: each may have to be moved."""
SECONDS_AT_ONCE = 0.1
"""Longest transaction that returns pages."""
WAL_BYTES = 16 << 20
"""Size to which the WAL file shrinks once all of it has been copied to the database file."""


class SqliteDatabase(Database):
    """A file in WAL mode: readers never wait, and writers wait only for each other."""

    def __init__(self, path: str, create: bool, patience: float) -> None:
        if path in ("", ":memory:"):
            raise StoreRefused("a SQLite store needs the path of a file")
        self._path = Path(path).expanduser().absolute()
        if network := network_file_system(self._path):
            raise StoreRefused(
                f"{self._path} is on a network file system ({network}), where SQLite's locks and shared memory do "
                "not work: give a path on a local disk"
            )
        self._patience = patience
        if create:
            self._make_file()
        self._file = self._identity()
        self._engine = create_engine(
            URL.create("sqlite", database=str(self._path)),
            # This class begins and ends its transactions itself; Python's sqlite3 would guess.
            isolation_level="AUTOCOMMIT",
            connect_args={"timeout": patience},
            execution_options={RECENT: Recent()},
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
    def writing(self, *, alone: bool = False) -> Iterator[Connection]:
        # In a file, every writer is alone.
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
            return InvalidRecord(f"SQLite cannot store this number: {reason}")
        if isinstance(reason, UnicodeEncodeError):
            return InvalidRecord(f"SQLite cannot store this text: {reason.reason}")
        if isinstance(reason, sqlite3.OperationalError):
            return StoreUnavailable(f"{self._path} cannot be used now: {reason}")
        if type(reason) is sqlite3.DatabaseError:
            return StoreRefused(f"{self._path} is not a SQLite file, or is damaged: {reason}")
        return InvalidRecord(f"{reason}") if isinstance(reason, sqlite3.Error) else None

    def tidy(self) -> None:
        """Empty the WAL file, if a large transaction has left it large and no reader is in the way."""
        if self._has_large_wal():
            with suppress(StoreUnavailable, StoreRefused):
                self._checkpoint()

    def size(self) -> int:
        with self.explained():
            return sum(
                os.stat(f"{self._path}{end}").st_size for end in ("", "-wal") if os.path.exists(f"{self._path}{end}")
            )

    def shrink(self) -> Iterator[None]:
        while self._shrinks():
            with self.writing() as connection:
                ends = time.monotonic() + SECONDS_AT_ONCE
                left = 1
                while left and time.monotonic() < ends:
                    # It goes on only while its rows are fetched, although they have no values.
                    connection.connection.cursor().execute(f"PRAGMA incremental_vacuum({PAGES_AT_ONCE})").fetchall()
                    left = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
            yield
            if not left:
                break
        self._checkpoint()

    def space_advice(self) -> str | None:
        if self._shrinks():
            return None
        return (
            "the file was made by an older version, and keeps its size: freed space is used for what is written next; "
            f"to return it now, and each time from then on, run `agl prune --store {self._path} --vacuum`, which locks "
            "writers out until it is done, and needs about twice the final size on the disk meanwhile"
        )

    def rewrite(self) -> None:
        with self.explained(), self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA auto_vacuum = INCREMENTAL")
            connection.exec_driver_sql("VACUUM")
        self._checkpoint()

    def close(self) -> None:
        self._engine.dispose()

    def _shrinks(self) -> bool:
        with self.reading() as connection:
            return connection.exec_driver_sql("PRAGMA auto_vacuum").scalar_one() == INCREMENTAL

    def _checkpoint(self) -> None:
        """Copy the WAL file to the database file, as far as readers let it, and empty it.

        Writers wait only for what is left after the first step.
        """
        with self.explained(), self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")
            try:
                for how in ("PASSIVE", "TRUNCATE"):
                    with suppress(DBAPIError):
                        connection.exec_driver_sql(f"PRAGMA wal_checkpoint({how})").fetchall()
            finally:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {int(self._patience * 1000)}")

    def _has_large_wal(self) -> bool:
        try:
            return os.stat(f"{self._path}-wal").st_size > WAL_BYTES
        except OSError:
            return False

    def _make_file(self) -> None:
        with self.explained(), suppress(FileExistsError):
            # SQLite creates the -wal and -shm files with the same permissions.
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def _identity(self) -> tuple[int, int]:
        with self.explained():
            found = os.stat(self._path)
            return found.st_dev, found.st_ino

    def _prepare(self, connection: Connection) -> None:
        """Create the schema, or migrate it; refuse another program's file, and leave it unchanged."""
        with transaction(connection, "BEGIN"):
            version = self._version(connection)
        connection.exec_driver_sql(f"PRAGMA page_size = {PAGE_BYTES}")
        # As the size of pages, it has no effect on a file that has tables.
        connection.exec_driver_sql("PRAGMA auto_vacuum = INCREMENTAL")
        self._enter_wal_mode(connection)
        if version == VERSION:
            return
        with transaction(connection, "BEGIN IMMEDIATE"):
            # Read again: another process may have got here first.
            version = self._version(connection)
            if version == 0:
                tables.metadata.create_all(connection, checkfirst=False)
                connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            else:
                for statement in (statement for older in range(version, VERSION) for statement in MIGRATIONS[older]):
                    connection.exec_driver_sql(statement)
            connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")

    def _version(self, connection: Connection) -> int:
        """Return the version of the file's schema; 0 for an empty file."""
        application_id, version, objects = (
            connection.exec_driver_sql(query).scalar_one()
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if (application_id, version, objects) == (0, 0, 0):
            return 0
        if application_id != APPLICATION_ID:
            raise StoreRefused(f"{self._path} belongs to another program")
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
                # Unlike others, this statement does not wait while another process executes it.
                if "locked" not in str(error.orig) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        with self.explained(), self._engine.connect() as connection, transaction(connection, begin):
            yield connection


def _configure(connection: sqlite3.Connection, _: object) -> None:
    # In WAL mode this loses nothing when a process is killed; a power failure may lose the last transactions, each as a
    # whole.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    # Debian's SQLite would overwrite deleted pages with zeros, and write a gigabyte to delete one.
    connection.execute("PRAGMA secure_delete = FAST")
