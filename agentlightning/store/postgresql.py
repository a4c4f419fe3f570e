"""A database in PostgreSQL, which any number of hosts may write at once."""

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
from agentlightning.store.database import Conflict, Database, transaction

__all__ = ["PostgresqlDatabase"]

SCHEMA = "agentlightning"
"""Our tables are in a schema of their own, whatever else the database has."""
VERSION = 2
"""Of our tables, as `agentlightning.version` says it."""
MIGRATIONS: Mapping[int, Sequence[str]] = {
    1: (
        "ALTER TABLE spans ADD COLUMN is_numbered BOOLEAN",
        "ALTER TABLE spans ADD COLUMN common_key BIGINT",
        'CREATE TABLE probes (name TEXT COLLATE "C" PRIMARY KEY, written_at DOUBLE PRECISION NOT NULL)',
        *tables.ENDS_THAT_WERE_LEFT,
    ),
}
"""The statements that make tables of this version those of the next."""
# Whoever makes or changes the tables holds it: any number, as long as it is ours.
ADVISORY_LOCK = int.from_bytes(b"AgL1", "big")

CONNECTIONS = 8
# As libpq has them. A host that is gone without a word would be waited for as long as TCP does, a quarter of an hour.
OPTIONS = {
    "application_name": SCHEMA,
    "client_encoding": "utf8",
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "tcp_user_timeout": "10000",
}

# What others are the reason of: a lock that they wait for while we wait for theirs, or an id that they put in since we
# looked for it.
CONFLICTS = (errors.DeadlockDetected, errors.SerializationFailure)
IDS = ("generations_id_key", "losses_id_key")
KEYS = ("generations_pkey", "losses_pkey", "texts_pkey")
# What is wrong with the database, or with who may use it.
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
        url: as libpq takes it, `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, options included.
        create: make the tables where there are none.
        patience: how many seconds a statement waits for a lock that somebody else holds.
    """

    def __init__(self, url: str, create: bool, patience: float) -> None:
        self._name = without_secrets(url)
        self._patience = patience
        try:
            parsed = make_url(url).set(drivername="postgresql+psycopg")
        except (ArgumentError, ValueError) as error:
            raise StoreRefused(f"{self._name} is no URL of a database: {error}") from error
        if not parsed.database:
            raise StoreRefused(f"{self._name} names no database: it is postgresql://USER:PASSWORD@HOST/DATABASE")
        # What the URL says is not overruled.
        options = {name: value for name, value in OPTIONS.items() if name not in parsed.query}
        self._engine = create_engine(
            parsed,
            # Where a transaction begins and ends is said here.
            isolation_level="AUTOCOMMIT",
            connect_args=options,
            # Rows go to the driver as they are, as tuples.
            paramstyle="format",
            pool_size=CONNECTIONS,
            max_overflow=0,
            # A server that was started again has closed them all, and a statement that fails is a write that waits.
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

    def writing(self) -> AbstractContextManager[Connection]:
        return self._transaction("BEGIN ISOLATION LEVEL READ COMMITTED")

    def explanation(self, error: Exception) -> Exception | None:
        reason = error.orig if isinstance(error, DBAPIError) else error
        told = str(reason).strip().partition("\n")[0]
        match reason:
            case errors.UniqueViolation() if reason.diag.constraint_name in IDS:
                return Conflict(f"{self._name}: {told}")
            case errors.UniqueViolation() if reason.diag.constraint_name in KEYS:
                # Ours by its sequence, which a copy of the database has not taken over.
                return StoreRefused(f"{self._name} gives out keys that it has given out before: {told}")
            case _ if isinstance(reason, CONFLICTS):
                return Conflict(f"{self._name}: {told}")
            case _ if isinstance(reason, REFUSALS):
                return StoreRefused(f"{self._name} cannot be used: {told}")
            case errors.ProgramLimitExceeded() | psycopg.DataError() | psycopg.IntegrityError():
                # The first is of an id of some KiB, for one, that an index has no room for.
                return InvalidRecord(told)
            case psycopg.ProgrammingError() if reason.sqlstate is None:
                # Of the driver itself: a value that is of no type that it knows.
                return InvalidRecord(told)
            case OverflowError() | struct.error():
                return InvalidRecord(f"a number that PostgreSQL cannot hold: {told}")
            case UnicodeEncodeError():
                return InvalidRecord(f"a text that PostgreSQL cannot hold: {reason.reason}")
            case psycopg.Error() | PoolTimeout():
                # A server that only reads, since another has taken its place, is none of a value's doing either.
                return self._unreachable(told)
        return None

    def close(self) -> None:
        self._engine.dispose()

    def _unreachable(self, told: str) -> StoreUnavailable | StoreRefused:
        """What a server says before it lets anybody in has no code: psycopg gives no more than its sentence."""
        for refusal in ("password authentication failed", "does not exist", "no pg_hba.conf entry", "no password"):
            if refusal in told:
                return StoreRefused(f"{self._name} cannot be used: {told}")
        return StoreUnavailable(f"{self._name} cannot be used now: {told}")

    def _configure(self, connection: psycopg.Connection, _: object) -> None:
        connection.execute(f"SET search_path TO {SCHEMA}")
        milliseconds = max(1, int(self._patience * 1000))
        connection.execute("SELECT set_config('lock_timeout', %s, false)", (str(milliseconds),))

    def _prepare(self, create: bool) -> None:
        """Make the tables where there are none, or bring them up to date; what is not ours is refused."""
        with self.writing() as connection:
            encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
            if encoding != "UTF8":
                raise StoreRefused(
                    f"{self._name} has the encoding {encoding}, which not every text fits: it has to be UTF8"
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
        """The version of the tables; 0 where there are none."""
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
