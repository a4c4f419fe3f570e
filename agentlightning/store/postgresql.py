"""A database in PostgreSQL, which any number of hosts may write at the same time."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import psycopg
from psycopg import errors
from sqlalchemy import Connection, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from agentlightning.errors import InvalidRecord, StoreRefused, StoreUnavailable
from agentlightning.settings import without_secrets
from agentlightning.store import tables
from agentlightning.store.blocks import RECENT
from agentlightning.store.chains import Recent
from agentlightning.store.database import Conflict, Database, transaction

__all__ = ["PostgresqlDatabase"]

SCHEMA = "agentlightning"
"""Schema of the tables, so that the database may hold other programs' tables, too."""
VERSION = 3
"""Version of the tables, which the table `agentlightning.version` holds."""
MIGRATIONS: Mapping[int, Sequence[str]] = {
    1: (
        "ALTER TABLE spans ADD COLUMN is_numbered BOOLEAN",
        "ALTER TABLE spans ADD COLUMN common_key BIGINT",
        'CREATE TABLE probes (name TEXT COLLATE "C" PRIMARY KEY, written_at DOUBLE PRECISION NOT NULL)',
        *tables.CLEAR_STALE_END_TIMES,
    ),
    2: (
        (
            "CREATE TABLE blocks (key BIGSERIAL NOT NULL, depth INTEGER NOT NULL, parent BIGINT NOT NULL, "
            "name BYTEA NOT NULL, body BYTEA NOT NULL, PRIMARY KEY (key))"
        ),
        "CREATE UNIQUE INDEX blocks_by_parent ON blocks (parent, name)",
        "ALTER TABLE generations ADD COLUMN ids_block BIGINT",
        "ALTER TABLE generations ADD COLUMN text_block BIGINT",
        "CREATE INDEX generations_by_ids_block ON generations (ids_block) WHERE ids_block IS NOT NULL",
        "CREATE INDEX generations_by_text_block ON generations (text_block) WHERE text_block IS NOT NULL",
    ),
}
"""Statements that turn the tables of a version into those of the next."""
# Held while the tables are created or migrated. Any number will do, as long as no other program uses it.
ADVISORY_LOCK = int.from_bytes(b"AgL1", "big")
WRITERS_LOCK = int.from_bytes(b"AgLw", "big")
"""Advisory lock that each write transaction has: shared with others, unless it must be alone."""

CONNECTIONS = 8
# Options of libpq. Without them a connection to a vanished host would wait for TCP's timeout, a quarter of an hour.
OPTIONS = {
    "application_name": SCHEMA,
    "client_encoding": "utf8",
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "tcp_user_timeout": "10000",
}

# Caused by other writers: a deadlock, or an id that another writer has inserted since this one looked for it.
CONFLICTS = (errors.DeadlockDetected, errors.SerializationFailure)
IDS = ("generations_id_key", "losses_id_key", "blocks_by_parent")
KEYS = ("generations_pkey", "losses_pkey", "texts_pkey", "blocks_pkey")
# The database, or the permission to use it, is at fault.
REFUSALS = (
    errors.InvalidAuthorizationSpecification,
    errors.InvalidCatalogName,
    errors.InsufficientPrivilege,
    errors.UndefinedTable,
    errors.UndefinedColumn,
)


class PostgresqlDatabase(Database):
    """The tables in the database that a URL names.

    Args:
        url: a URL for libpq, `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, options included.
        create: create the tables where there are none.
        patience: seconds that a statement waits for the lock of another transaction.
    """

    def __init__(self, url: str, create: bool, patience: float) -> None:
        self._name = without_secrets(url)
        self._patience = patience
        try:
            parsed = make_url(url).set(drivername="postgresql+psycopg")
        except (ArgumentError, ValueError) as error:
            raise StoreRefused(f"{self._name} is not a database URL: {error}") from error
        if not parsed.database:
            raise StoreRefused(f"{self._name} names no database: write it as postgresql://USER:PASSWORD@HOST/DATABASE")
        # Options in the URL take precedence.
        options = {name: value for name, value in OPTIONS.items() if name not in parsed.query}
        self._engine = create_engine(
            parsed,
            # This class begins and ends its transactions itself.
            isolation_level="AUTOCOMMIT",
            connect_args=options,
            execution_options={RECENT: Recent()},
            # Rows go to the driver unchanged, as tuples.
            paramstyle="format",
            pool_size=CONNECTIONS,
            max_overflow=0,
            # A restarted server has closed every connection, and each statement that fails delays a write.
            pool_pre_ping=True,
            pool_reset_on_return=None,
        )
        event.listen(self._engine, "connect", self._configure)
        try:
            self._prepare(create)
        except BaseException:
            self.close()
            raise

    def reading(self) -> AbstractContextManager[Connection]:
        return self._transaction("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def writing(self, *, alone: bool = False) -> AbstractContextManager[Connection]:
        # One message to the server. Taken before all other locks, so that it cannot be part of a deadlock.
        take = "pg_advisory_xact_lock" if alone else "pg_advisory_xact_lock_shared"
        return self._transaction(f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT {take}({WRITERS_LOCK})")

    def explanation(self, error: Exception) -> Exception | None:
        reason = error.orig if isinstance(error, DBAPIError) else error
        message = str(reason).strip().partition("\n")[0]
        match reason:
            case errors.UniqueViolation() if reason.diag.constraint_name in IDS:
                return Conflict(f"{self._name}: {message}")
            case errors.UniqueViolation() if reason.diag.constraint_name in KEYS:
                # Keys come from a sequence, which a copy of the database may have left behind.
                return StoreRefused(
                    f"{self._name} assigns keys that are already in use, as a copy without sequences does: {message}"
                )
            case _ if isinstance(reason, CONFLICTS):
                return Conflict(f"{self._name}: {message}")
            case _ if isinstance(reason, REFUSALS):
                return StoreRefused(f"{self._name} cannot be used: {message}")
            case errors.ProgramLimitExceeded() | psycopg.DataError() | psycopg.IntegrityError():
                # ProgramLimitExceeded: a value is too long for an index, such as an id of some KiB.
                return InvalidRecord(message)
            case psycopg.ProgrammingError() if reason.sqlstate is None:
                # Raised by the driver itself, for a value of a type that it does not know.
                return InvalidRecord(message)
            case OverflowError() | struct.error():
                return InvalidRecord(f"PostgreSQL cannot store this number: {message}")
            case UnicodeEncodeError():
                return InvalidRecord(f"PostgreSQL cannot store this text: {reason.reason}")
            case psycopg.Error() | PoolTimeout():
                # Includes a server that is read-only since another took its place: no value is at fault.
                return self._unreachable(message)
        return None

    def size(self) -> int:
        query = (
            "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c WHERE c.relkind = 'r' AND "
        )
        with self.reading() as connection:
            return connection.exec_driver_sql(f"{query} c.relnamespace = %s::regnamespace", (SCHEMA,)).scalar_one()

    def shrink(self) -> Iterator[None]:
        for table in tables.metadata.tables:
            with self.explained(), self._engine.connect() as connection:
                connection.exec_driver_sql(f"VACUUM {table}")
            yield

    def space_advice(self) -> str | None:
        return (
            "PostgreSQL uses the freed space for what is written next, and has returned to the file system what was at "
            f"the end of a table; to return all, run `agl prune --store '{self._name}' --vacuum`, which locks readers "
            "and writers out, one table at a time"
        )

    def rewrite(self) -> None:
        for table in tables.metadata.tables:
            with self.explained(), self._engine.connect() as connection:
                connection.exec_driver_sql(f"VACUUM FULL {table}")

    def close(self) -> None:
        self._engine.dispose()

    def _unreachable(self, message: str) -> StoreUnavailable | StoreRefused:
        """Classify an error by its message: psycopg gives errors that precede the login no code."""
        for refusal in ("password authentication failed", "does not exist", "no pg_hba.conf entry", "no password"):
            if refusal in message:
                return StoreRefused(f"{self._name} cannot be used: {message}")
        return StoreUnavailable(f"{self._name} cannot be used now: {message}")

    def _configure(self, connection: psycopg.Connection, _: object) -> None:
        connection.execute(f"SET search_path TO {SCHEMA}")
        milliseconds = max(1, int(self._patience * 1000))
        connection.execute("SELECT set_config('lock_timeout', %s, false)", (str(milliseconds),))

    def _prepare(self, create: bool) -> None:
        """Create the tables, or migrate them; refuse those of another program."""
        with self.writing() as connection:
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
            if encoding != "UTF8":
                raise StoreRefused(
                    f"{self._name} has the encoding {encoding}, which cannot hold every text: it has to be UTF8"
                )
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (ADVISORY_LOCK,))
            version = self._version(connection)
            if version == VERSION:
                return
            if version > VERSION:
                raise StoreRefused(
                    f"{self._name} was written by a newer agentlightning (schema {version}, this one knows {VERSION}): "
                    "upgrade agentlightning, or give another database"
                )
            if version == 0:
                if not create:
                    raise StoreUnavailable(f"{self._name} has no store in it")
                connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                tables.metadata.create_all(connection, checkfirst=False)
                connection.exec_driver_sql("CREATE TABLE version (version integer NOT NULL)")
                connection.exec_driver_sql("INSERT INTO version VALUES (%s)", (VERSION,))
                return
            for statement in (statement for older in range(version, VERSION) for statement in MIGRATIONS[older]):
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql("UPDATE version SET version = %s", (VERSION,))

    def _version(self, connection: Connection) -> int:
        """Return the version of the tables; 0 where there are none."""
        query = "SELECT table_name FROM information_schema.tables WHERE table_schema = %s"
        found = set(connection.exec_driver_sql(query, (SCHEMA,)).scalars())
        if "version" in found:
            return connection.exec_driver_sql("SELECT version FROM version").scalar_one()
        if found:
            raise StoreRefused(f"the schema {SCHEMA} of {self._name} has tables of another program")
        return 0

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Connection]:
        with self.explained(), self._engine.connect() as connection, transaction(connection, begin):
            yield connection
