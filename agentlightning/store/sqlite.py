"""A database in a SQLite file, which several processes of one host may write at the same time."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, NullPool, create_engine, event
from sqlalchemy.exc import DBAPIError

from agentlightning.errors import InvalidRecord, StoreRefused, StoreUnavailable
from agentlightning.store import tables
from agentlightning.store.blocks import RECENT
from agentlightning.store.chains import Recent
from agentlightning.store.database import Database, accept_to_read, newer, transaction
from agentlightning.store.filesystem import network_file_system
from agentlightning.store.snapshot import connect
from agentlightning.store.stale import MARK_ALL, triggers

__all__ = ["SqliteDatabase"]

APPLICATION_ID = int.from_bytes(b"AgL1", "big")
"""`PRAGMA application_id` of the files of agentlightning."""
VERSION = 7
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
        """CREATE TABLE watermarks (sender_key INTEGER NOT NULL, registered_at BIGINT NOT NULL,
        reported_at BIGINT NOT NULL, watermark BIGINT, clock_difference BIGINT, has_ended BOOLEAN NOT NULL,
        under_way TEXT NOT NULL, PRIMARY KEY (sender_key))""",
        """CREATE TABLE lost_calls ("key" INTEGER NOT NULL, id BLOB NOT NULL, sender_key INTEGER NOT NULL,
        rollout_id TEXT, attempt_id TEXT, count BIGINT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY ("key"),
        UNIQUE (id))""",
        "CREATE INDEX lost_calls_of_rollout ON lost_calls (rollout_id) WHERE rollout_id IS NOT NULL",
    ),
    3: (
        "ALTER TABLE generations ADD COLUMN agent_key INTEGER",
        "ALTER TABLE generations ADD COLUMN parent_agent_key INTEGER",
        "ALTER TABLE generations ADD COLUMN purpose_key INTEGER",
        "ALTER TABLE generations ADD COLUMN retry BIGINT",
        "ALTER TABLE generations ADD COLUMN via SMALLINT",
        """CREATE TABLE drifts (rollout_id TEXT NOT NULL, calls BIGINT NOT NULL, breaks BIGINT,
        kept BIGINT NOT NULL, lost BIGINT NOT NULL, PRIMARY KEY (rollout_id))""",
        """CREATE TABLE breaks (rollout_id TEXT NOT NULL, generation_id BLOB NOT NULL, cause TEXT NOT NULL,
        is_certain BOOLEAN NOT NULL, finished_at BIGINT NOT NULL, model TEXT, agent_id TEXT,
        PRIMARY KEY (rollout_id, generation_id))""",
        "CREATE INDEX breaks_by_time ON breaks (finished_at)",
        "CREATE TABLE drift_totals (name TEXT NOT NULL, count BIGINT NOT NULL, PRIMARY KEY (name))",
    ),
    4: (
        "ALTER TABLE generations ADD COLUMN served_model_key INTEGER",
        "ALTER TABLE generations ADD COLUMN requested_params_key INTEGER",
        "ALTER TABLE generations ADD COLUMN prompt_logprobs BLOB",
        "ALTER TABLE choices ADD COLUMN sampling_mask BLOB",
        "ALTER TABLE choices ADD COLUMN top_logprobs BLOB",
    ),
    5: (
        "ALTER TABLE rollouts ADD COLUMN changed BIGINT DEFAULT '0' NOT NULL",
        "CREATE INDEX rollouts_by_change ON rollouts (changed, rollout_id, status, end_time)",
    ),
    6: (
        "CREATE INDEX generations_unassigned ON generations (finished_at) WHERE rollout_key IS NULL",
        'CREATE TABLE stale_rollouts ("key" INTEGER NOT NULL, rollout_id TEXT NOT NULL, PRIMARY KEY ("key"))',
        "CREATE INDEX stale_rollouts_by_id ON stale_rollouts (rollout_id)",
        """CREATE TABLE summaries (rollout_id TEXT NOT NULL, since DOUBLE NOT NULL, active DOUBLE NOT NULL,
        status TEXT NOT NULL, attempts INTEGER NOT NULL, queued DOUBLE, started DOUBLE, attempt_started DOUBLE,
        ended DOUBLE, calls BIGINT NOT NULL, finished BIGINT NOT NULL, prompt_tokens BIGINT NOT NULL,
        output_tokens BIGINT NOT NULL, latency DOUBLE, reward DOUBLE, breaks BIGINT, worker TEXT, model TEXT,
        agent TEXT, version TEXT, step TEXT, tags TEXT NOT NULL, task TEXT NOT NULL, PRIMARY KEY (rollout_id))""",
        "CREATE INDEX summaries_by_start ON summaries (since)",
        "CREATE INDEX summaries_by_activity ON summaries (active)",
        """CREATE TABLE tallies (axis TEXT NOT NULL, dimension TEXT NOT NULL, slot TEXT NOT NULL,
        name TEXT NOT NULL, measure TEXT NOT NULL, value DOUBLE NOT NULL, count BIGINT NOT NULL,
        amount DOUBLE NOT NULL, PRIMARY KEY (axis, dimension, slot, name, measure, value))""",
        *triggers("sqlite"),
        MARK_ALL,
    ),
}
"""Statements that turn a file of a version into one of the next."""

# It can be set only before the first page is written. With rows of some KiB, smaller pages waste more space.
PAGE_BYTES = 16384
ANOTHER_PATH = "give the path of another file"
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

    def __init__(self, place: str, read_only: bool, patience: float) -> None:
        self._path = _local_path(place)
        self._patience = patience
        self.is_read_only = read_only
        if not read_only:
            self._make_file()
        self._file = self._identity()
        options: dict[str, Any] = {"connect_args": {"timeout": patience}}
        if read_only:
            # A connection for each transaction: how the file is to be read depends on who else has it open.
            options = {"creator": lambda: connect(self._path, patience), "poolclass": NullPool}
        self._engine = create_engine(
            URL.create("sqlite", database=str(self._path)),
            # This class begins and ends its transactions itself; Python's sqlite3 would guess.
            isolation_level="AUTOCOMMIT",
            execution_options={RECENT: Recent()},
            pool_reset_on_return=None,
            **options,
        )
        try:
            if read_only:
                with self.reading() as connection:
                    self._accept(self._version(connection))
            else:
                event.listen(self._engine, "connect", _configure)
                with self.explained(), self._engine.connect() as connection:
                    self._prepare(connection)
        except BaseException:
            self.close()
            raise

    @classmethod
    def try_to_record(cls, place: str, patience: float) -> str:
        file = _local_path(place)
        if not os.path.lexists(file):
            if not os.path.isdir(file.parent):
                raise StoreUnavailable(*_not_opened(file, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))))
            _require_writable(file, file.parent)
            return f"a server creates {file} when it starts"
        with closing(_Trial(place, True, patience)) as found:
            # SQLite keeps two more files beside it while it is open.
            _require_writable(file, file, file.parent)
            if found.version == VERSION:
                return f"{file} can be written"
            does = f"migrates {file}" if found.version else f"creates its tables in {file}"
            return f"a server {does} when it starts"

    def reading(self) -> AbstractContextManager[Connection]:
        return self._reading_a_snapshot() if self.is_read_only else self._transaction("BEGIN")

    @contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[Connection]:
        if self.is_read_only:
            raise StoreRefused(f"{self._path} was opened for reading only", "open it without read_only")
        # In a file, every writer is alone.
        if self._identity() != self._file:
            raise StoreUnavailable(f"{self._path} was replaced since it was opened")
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection
        self.tidy()

    def explanation(self, error: Exception) -> Exception | None:
        reason = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(reason, OSError):
            return StoreUnavailable(*_not_opened(self._path, reason))
        if isinstance(reason, OverflowError):
            return InvalidRecord(f"SQLite cannot store this number: {reason}")
        if isinstance(reason, UnicodeEncodeError):
            return InvalidRecord(f"SQLite cannot store this text: {reason.reason}")
        if isinstance(reason, sqlite3.OperationalError):
            return StoreUnavailable(f"{self._path} cannot be used now: {reason}", _advice_on(self._path, str(reason)))
        if type(reason) is sqlite3.DatabaseError:
            return StoreRefused(f"{self._path} is not a SQLite file, or is damaged: {reason}", ANOTHER_PATH)
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
        if stat.S_ISDIR(found.st_mode):
            example = self._path / "run.db"
            raise StoreRefused(f"{self._path} is a folder", f"give the path of a file in it, such as {example}")
        if not stat.S_ISREG(found.st_mode):
            raise StoreRefused(f"{self._path} is not a file", ANOTHER_PATH)
        return found.st_dev, found.st_ino

    def _prepare(self, connection: Connection) -> None:
        """Create the schema, or migrate it; refuse another program's file, and leave it unchanged."""
        with transaction(connection, "BEGIN"):
            version = self._version(connection)
        if version == 0:
            # On a file that has tables neither has an effect, but the second would wait for its writers.
            connection.exec_driver_sql(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.exec_driver_sql("PRAGMA auto_vacuum = INCREMENTAL")
        self._enter_wal_mode(connection)
        if version == VERSION:
            return
        with transaction(connection, "BEGIN IMMEDIATE"):
            # Read again: another process may have got here first.
            version = self._version(connection)
            if version == 0:
                tables.create(connection)
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
            raise StoreRefused(f"{self._path} belongs to another program", ANOTHER_PATH)
        if version > VERSION:
            raise newer(str(self._path), version, VERSION)
        return version

    def _accept(self, version: int) -> None:
        accept_to_read(str(self._path), version, VERSION)

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
    def _reading_a_snapshot(self) -> Iterator[Connection]:
        with self.explained(), self._engine.connect() as connection:
            opened: Any = connection.connection.driver_connection
            changed = StoreUnavailable(f"{self._path} was written while it was read", "run it again")
            try:
                with transaction(connection, "BEGIN"):
                    yield connection
            except (DBAPIError, sqlite3.Error) as error:
                # Data of which half is from before another process's write looks damaged.
                if not opened.snapshot.is_intact():
                    raise changed from error
                raise
            if not opened.snapshot.is_intact():
                raise changed

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        with self.explained(), self._engine.connect() as connection, transaction(connection, begin):
            yield connection


class _Trial(SqliteDatabase):
    """A file as a server that would record there finds it.

    Attributes:
        version: the version of its schema; 0 for an empty file.
    """

    def _accept(self, version: int) -> None:
        self.version = version


def _require_writable(file: Path, *needed: Path) -> None:
    for each in needed:
        if not os.access(each, os.R_OK | os.W_OK):
            raise StoreUnavailable(
                f"{file} cannot be written: this user may not write {each}",
                f"change its permissions, or {ANOTHER_PATH}",
            )


def _local_path(path: str) -> Path:
    """Return the absolute path of a file, which need not exist.

    Raises:
        StoreRefused: it is none, or on a network file system.
    """
    if path in ("", ":memory:"):
        raise StoreRefused("a SQLite store needs the path of a file", "write it like /data/run.db")
    file = Path(path).expanduser().absolute()
    if network := network_file_system(file):
        raise StoreRefused(
            f"{file} is on a network file system ({network}), where SQLite's locks and shared memory do not work",
            "give a path on a local disk",
        )
    return file


def _not_opened(path: Path, error: OSError) -> tuple[str, str]:
    """Return what happened when a file was opened, and what to do about it."""
    happened = f"{path} cannot be opened: {error.strerror}"
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        return f"{happened}, since there is no folder {path.parent}", f"create the folder, or {ANOTHER_PATH}"
    if isinstance(error, FileNotFoundError):
        return happened, "check the path: a server that records there, or `agl store`, creates the file"
    if isinstance(error, PermissionError):
        return happened, f"change the permissions of {path} or of a folder above it, or {ANOTHER_PATH}"
    return happened, ANOTHER_PATH


def _advice_on(path: Path, message: str) -> str | None:
    """Return what to do about an error that SQLite gives the code of every operation."""
    if "locked" in message:
        return "another process is writing it: try again"
    if "full" in message:
        return f"free some space where {path} is, or {ANOTHER_PATH}"
    if "readonly" in message or "unable to open" in message:
        return f"change the permissions of {path} or of its folder, or {ANOTHER_PATH}"
    return None


def _configure(connection: sqlite3.Connection, _: object) -> None:
    # In WAL mode this loses nothing when a process is killed; a power failure may lose the last transactions, each as a
    # whole.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    # Debian's SQLite would overwrite deleted pages with zeros, and write a gigabyte to delete one.
    connection.execute("PRAGMA secure_delete = FAST")
