"""Generations in a SQLite file, which several processes of one host may write at once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Table,
    create_engine,
    event,
    false,
    func,
    insert,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.sqlite import dialect
from sqlalchemy.exc import DBAPIError

from agentlightning.generation import STATUSES, Generation, Loss, Status
from agentlightning.store import Filters, Store, StoreRefused, StoreUnavailable, rows, tables
from agentlightning.store.filesystem import network_file_system

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SqliteStore"]

APPLICATION_ID = int.from_bytes(b"AgL1", "big")
"""What `PRAGMA application_id` says in our files."""
VERSION = 2
"""The schema's, as `PRAGMA user_version` says it."""
MIGRATIONS: Mapping[int, Sequence[str]] = {1: ("ALTER TABLE choices ADD COLUMN routed_experts BLOB",)}
"""The statements that make a file of this version one of the next."""

# Set before the file's first page is written, or never: smaller pages waste more of themselves on rows of some KiB.
PAGE_BYTES = 16384
ROWS_AT_ONCE = 64
# Builds of SQLite before 3.32 take no more than 999 in a statement.
VARIABLES_AT_ONCE = 500
TEXTS_IN_MEMORY = 10_000
LONG_TEXT = 1_000

FILTERED = {
    "rollout_id": tables.generations.c.rollout_key,
    "attempt_id": tables.generations.c.attempt_key,
    "session_id": tables.generations.c.session_key,
    "call_id": tables.generations.c.call_id,
    "response_id": tables.generations.c.response_id,
    "model": tables.generations.c.model_key,
}
INSERTS = {
    table: str(insert(table).compile(dialect=dialect(paramstyle="qmark"))) for table in tables.metadata.sorted_tables
}
IN_ORDER = (tables.generations.c.finished_at, tables.generations.c.key)

T = TypeVar("T")
Record = TypeVar("Record", Generation, Loss)


class SqliteStore(Store):
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
        # Texts and their keys, which never change once they are committed.
        self._keys: dict[str | None, int | None] = {None: None}
        self._texts: dict[int | None, str | None] = {None: None}
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

    def add(self, generations: Sequence[Generation]) -> int:
        if len(self._keys) > TEXTS_IN_MEMORY:
            self._keys = {None: None}
        known = self._keys
        with self._writing() as connection:
            new, first = _unknown(connection, tables.generations, generations)
            texts = {None, *(text for generation in new for text in rows.repeated_texts(generation))}
            keys = {text: known[text] for text in texts if text in known}
            fresh = _keys_of(connection, [text for text in texts if text is not None and text not in known])
            keys |= fresh
            numbered = list(zip(new, count(first), strict=False))
            _insert(connection, tables.generations, [rows.generation_row(*each, keys) for each in numbered])
            choices = ((choice, key) for generation, key in numbered for choice in generation.choices)
            _insert(connection, tables.choices, [rows.choice_row(*each, keys) for each in choices])
        # Only now: a key that is rolled back becomes another text's.
        known |= {text: key for text, key in fresh.items() if len(text) <= LONG_TEXT}
        return len(new)

    def generations(self, **filters: Unpack[Filters]) -> Iterator[Generation]:
        page = select(tables.generations).order_by(*IN_ORDER).limit(ROWS_AT_ONCE)
        after = true()
        while True:
            # A transaction a page: one that is open for long keeps SQLite from emptying the WAL file.
            with self._connected() as connection:
                found = connection.execute(page.where(after, *_conditions(connection, filters))).all()
                generations = self._generations_of(connection, found)
            yield from generations
            if len(found) < ROWS_AT_ONCE:
                return
            after = tuple_(*IN_ORDER) > tuple_(found[-1].finished_at, found[-1].key)

    def tally(self, **filters: Unpack[Filters]) -> dict[Status, int]:
        status = tables.generations.c.status
        with self._connected() as connection:
            query = (
                select(status, func.count().label("how_many")).where(*_conditions(connection, filters)).group_by(status)
            )
            found = {row.status: row.how_many for row in connection.execute(query)}
        return {name: found.get(number, 0) for number, name in enumerate(STATUSES)}

    def add_losses(self, losses: Sequence[Loss]) -> None:
        with self._writing() as connection:
            new, first = _unknown(connection, tables.losses, losses)
            _insert(connection, tables.losses, [rows.loss_row(*each) for each in zip(new, count(first), strict=False)])

    def losses(self) -> Iterator[Loss]:
        with self._connected() as connection:
            found = connection.execute(select(tables.losses).order_by(tables.losses.c.key)).all()
        yield from map(rows.loss_of, found)

    def close(self) -> None:
        self._engine.dispose()

    def _generations_of(self, connection: Connection, found: Sequence[Any]) -> list[Generation]:
        """The generations of these rows, with their choices and texts."""
        table = tables.choices
        in_order = table.c.generation_key, table.c.index
        query = select(table).where(table.c.generation_key.in_([row.key for row in found])).order_by(*in_order)
        choices = connection.execute(query).all()
        texts = self._texts_of(connection, rows.text_keys(found, choices))
        of_each = {key: list(group) for key, group in groupby(choices, lambda choice: choice.generation_key)}
        return [rows.generation_of(row, of_each.get(row.key, ()), texts) for row in found]

    def _texts_of(self, connection: Connection, keys: set[int | None]) -> Mapping[int | None, str | None]:
        if len(self._texts) > TEXTS_IN_MEMORY:
            self._texts = {None: None}
        table, known = tables.texts, self._texts
        for some in _in_parts([key for key in keys if key not in known]):
            found = connection.execute(select(table.c.key, table.c.text).where(table.c.key.in_(some)))
            known |= {row.key: row.text for row in found}
        return known

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
    def _writing(self) -> Iterator[Connection]:
        """A transaction that nobody else's write comes between; undone where it raises."""
        if self._identity() != self._file:
            raise StoreUnavailable(f"{self._path} was replaced since it was opened")
        with self._connected() as connection, _transaction(connection, "BEGIN IMMEDIATE"):
            yield connection

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


def _unknown(connection: Connection, table: Table, records: Iterable[Record]) -> tuple[list[Record], int]:
    """Those that the table does not have yet, each once, and the key for the first of them."""
    by_id = {rows.uuid_bytes(record.id): record for record in records}
    for some in _in_parts(list(by_id)):
        query = f"SELECT id FROM {table.name} WHERE id IN ({', '.join('?' * len(some))})"
        for known in connection.exec_driver_sql(query, tuple(some)).scalars():
            del by_id[known]
    return list(by_id.values()), _next_key(connection, table)


def _next_key(connection: Connection, table: Table) -> int:
    return (connection.execute(select(func.max(table.c.key))).scalar() or 0) + 1


def _insert(connection: Connection, table: Table, new: Sequence[rows.Row]) -> None:
    # As text, so that the rows go to SQLite as they are: SQLAlchemy looks through each for as long as writing it takes.
    if new:
        connection.exec_driver_sql(INSERTS[table], new)


def _keys_of(connection: Connection, wanted: Iterable[str]) -> dict[str, int]:
    """The keys of these texts, which are put into the table where they are not in it."""
    table = tables.texts
    digests = {text: _digest(text) for text in wanted}
    known: dict[bytes, int] = {}
    for some in _in_parts(list(digests.values())):
        query = select(table.c.digest, table.c.key).where(table.c.digest.in_(some))
        known |= {row.digest: row.key for row in connection.execute(query)}
    fresh = {digest: text for text, digest in digests.items() if digest not in known}
    new = [
        (key, digest, rows.storable(text))
        for key, (digest, text) in enumerate(fresh.items(), _next_key(connection, table))
    ]
    _insert(connection, table, new)
    known |= {digest: key for key, digest, _ in new}
    return {text: known[digest] for text, digest in digests.items()}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _conditions(connection: Connection, filters: Filters) -> list[ColumnElement[bool]]:
    return [_condition(connection, name, value) for name, value in filters.items()]


def _condition(connection: Connection, name: str, value: Any) -> ColumnElement[bool]:
    """What a filter asks of a row."""
    if name == "since":
        return tables.generations.c.finished_at >= value
    if name == "until":
        return tables.generations.c.finished_at < value
    if name == "status":
        return tables.generations.c.status == STATUSES.index(value)
    column = FILTERED[name]
    if value is None:
        return column.is_(None)
    if name == "call_id":
        with suppress(ValueError):
            return column == rows.uuid_bytes(value)
        return false()
    if name == "response_id":
        return column == rows.storable(value)
    key = connection.execute(select(tables.texts.c.key).where(tables.texts.c.digest == _digest(value))).scalar()
    return false() if key is None else column == key


def _in_parts(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as a statement has room for."""
    for start in range(0, len(values), VARIABLES_AT_ONCE):
        yield values[start : start + VARIABLES_AT_ONCE]
