"""A database in PostgreSQL, which any number of hosts may write at the same time."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from typing import Any

import psycopg
from psycopg import errors
from sqlalchemy import URL, Connection, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from agentlightning.errors import InvalidRecord, StoreRefused, StoreUnavailable
from agentlightning.settings import without_secrets
from agentlightning.store import tables
from agentlightning.store.blocks import RECENT
from agentlightning.store.chains import Recent
from agentlightning.store.compaction import compact
from agentlightning.store.database import (
    EARLIEST_DEADLINE,
    STARTED,
    Conflict,
    Database,
    Start,
    accept_to_read,
    newer,
    transaction,
)
from agentlightning.store.stale import MARK_ALL, triggers

__all__ = ["PostgresqlDatabase"]

SCHEMA = "agentlightning"
"""Schema of the tables, so that the database may hold other programs' tables, too."""
_TEXT, _DOUBLE = 'TEXT COLLATE "C"', "DOUBLE PRECISION"
VERSION = 7
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
        """CREATE TABLE watermarks (sender_key BIGINT PRIMARY KEY, registered_at BIGINT NOT NULL,
        reported_at BIGINT NOT NULL, watermark BIGINT, clock_difference BIGINT, has_ended BOOLEAN NOT NULL,
        under_way TEXT COLLATE "C" NOT NULL)""",
        """CREATE TABLE lost_calls (key BIGSERIAL PRIMARY KEY, id BYTEA NOT NULL UNIQUE, sender_key BIGINT NOT NULL,
        rollout_id TEXT COLLATE "C", attempt_id TEXT COLLATE "C", count BIGINT NOT NULL,
        reason TEXT COLLATE "C" NOT NULL)""",
        "CREATE INDEX lost_calls_of_rollout ON lost_calls (rollout_id) WHERE rollout_id IS NOT NULL",
    ),
    3: (
        "ALTER TABLE generations ADD COLUMN agent_key BIGINT",
        "ALTER TABLE generations ADD COLUMN parent_agent_key BIGINT",
        "ALTER TABLE generations ADD COLUMN purpose_key BIGINT",
        "ALTER TABLE generations ADD COLUMN retry BIGINT",
        "ALTER TABLE generations ADD COLUMN via SMALLINT",
        """CREATE TABLE drifts (rollout_id TEXT COLLATE "C" PRIMARY KEY, calls BIGINT NOT NULL,
        breaks BIGINT, kept BIGINT NOT NULL, lost BIGINT NOT NULL)""",
        """CREATE TABLE breaks (rollout_id TEXT COLLATE "C" NOT NULL, generation_id BYTEA NOT NULL,
        cause TEXT COLLATE "C" NOT NULL, is_certain BOOLEAN NOT NULL, finished_at BIGINT NOT NULL,
        model TEXT COLLATE "C", agent_id TEXT COLLATE "C", PRIMARY KEY (rollout_id, generation_id))""",
        "CREATE INDEX breaks_by_time ON breaks (finished_at)",
        'CREATE TABLE drift_totals (name TEXT COLLATE "C" PRIMARY KEY, count BIGINT NOT NULL)',
    ),
    4: (
        "ALTER TABLE generations ADD COLUMN served_model_key BIGINT",
        "ALTER TABLE generations ADD COLUMN requested_params_key BIGINT",
        "ALTER TABLE generations ADD COLUMN prompt_logprobs BYTEA",
        "ALTER TABLE choices ADD COLUMN sampling_mask BYTEA",
        "ALTER TABLE choices ADD COLUMN top_logprobs BYTEA",
    ),
    5: (
        "ALTER TABLE rollouts ADD COLUMN changed BIGINT DEFAULT '0' NOT NULL",
        "CREATE INDEX rollouts_by_change ON rollouts (changed, rollout_id, status, end_time)",
    ),
    6: (
        "CREATE INDEX generations_unassigned ON generations (finished_at) WHERE rollout_key IS NULL",
        'CREATE TABLE stale_rollouts (key BIGSERIAL PRIMARY KEY, rollout_id TEXT COLLATE "C" NOT NULL)',
        "CREATE INDEX stale_rollouts_by_id ON stale_rollouts (rollout_id)",
        f"""CREATE TABLE summaries (rollout_id {_TEXT} PRIMARY KEY, since {_DOUBLE} NOT NULL, active {_DOUBLE} NOT NULL,
        status {_TEXT} NOT NULL, attempts INTEGER NOT NULL, queued {_DOUBLE}, started {_DOUBLE},
        attempt_started {_DOUBLE}, ended {_DOUBLE}, calls BIGINT NOT NULL, finished BIGINT NOT NULL,
        prompt_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, latency {_DOUBLE}, reward {_DOUBLE},
        breaks BIGINT, worker {_TEXT}, model {_TEXT}, agent {_TEXT}, version {_TEXT}, step {_TEXT},
        tags {_TEXT} NOT NULL, task {_TEXT} NOT NULL)""",
        "CREATE INDEX summaries_by_start ON summaries (since)",
        "CREATE INDEX summaries_by_activity ON summaries (active)",
        f"""CREATE TABLE tallies (axis {_TEXT}, dimension {_TEXT}, slot {_TEXT}, name {_TEXT}, measure {_TEXT},
        value {_DOUBLE}, count BIGINT NOT NULL, amount {_DOUBLE} NOT NULL,
        PRIMARY KEY (axis, dimension, slot, name, measure, value))""",
        *triggers("postgresql"),
        MARK_ALL,
    ),
}
"""Statements that turn the tables of a version into those of the next."""
# Held while the tables are created or migrated. Any number will do, as long as no other program uses it.
ADVISORY_LOCK = int.from_bytes(b"AgL1", "big")
COMPACTION_LOCK = int.from_bytes(b"AgLc", "big")
"""Advisory lock of the one session that makes tables smaller."""
WRITERS_LOCK = int.from_bytes(b"AgLw", "big")
"""Advisory lock that each write transaction has: shared with others, unless it must be alone."""

# A transaction begins with these, in one message. The lock is taken before all others, so that it cannot be part of a
# deadlock.
READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
WRITE = f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock_shared({WRITERS_LOCK})"
WRITE_ALONE = f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock({WRITERS_LOCK})"
START = f"SELECT extract(epoch FROM clock_timestamp())::float8, ({EARLIEST_DEADLINE})"
CLOCK = "SELECT extract(epoch FROM clock_timestamp())::float8, NULL"
"""The same as `START`, where there may be no tables."""

AHEAD = "changed > pg_snapshot_xmax(pg_current_snapshot())::text::bigint"
RENUMBER = f"UPDATE rollouts SET changed = pg_snapshot_xmax(pg_current_snapshot())::text::bigint WHERE {AHEAD}"

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

# Ids and bodies of spans are compressed in a fraction of the time that PostgreSQL's own algorithm takes. A server may
# be built without it.
USE_LZ4 = """
    SELECT set_config(name, 'lz4', false) FROM pg_settings
    WHERE name = 'default_toast_compression' AND 'lz4' = ANY(enumvals)
"""

# A store is mostly read at a terminal, where a person waits.
OPTIONS_TO_READ = {"connect_timeout": "3"}
PARTITIONS = "partitions"
"""Option of a URL: into how many partitions its large tables are divided when they are created."""
PARTITIONS_LIMIT = 256
PARTITIONS_SINCE = 15
"""The first version of PostgreSQL that lets a unique index take nulls as equal."""
FORM = "write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE"

# Caused by other writers: a deadlock, or an id that another writer has inserted since this one looked for it.
CONFLICTS = (errors.DeadlockDetected, errors.SerializationFailure)
IDS = ("generations_id_key", "losses_id_key", "blocks_by_parent")
# The same of partitions, whose indexes PostgreSQL names itself.
ID_OF_PARTITION = re.compile(r"(generations_\d+_id|blocks_\d+_parent)_")
KEYS = ("generations_pkey", "rollouts_pkey", "losses_pkey", "texts_pkey", "blocks_pkey")
# Parts of the messages with which a login fails, and what to do.
LOGIN_REFUSALS = {
    "password authentication failed": "correct the user and the password in the URL",
    "no password": "put the password into the URL: postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
    "no pg_hba.conf entry": "let PostgreSQL's pg_hba.conf admit this user from this machine",
    "does not exist": "create what is missing, or correct the URL",
}
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
        place: a URL for libpq, `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, options included.
        read_only: neither create tables nor migrate them, and read in read-only transactions.
        patience: seconds that a statement waits for the lock of another transaction.
    """

    def __init__(self, place: str, read_only: bool, patience: float) -> None:
        self._name = without_secrets(place)
        self._patience = patience
        self.is_read_only = read_only
        try:
            parsed = make_url(place).set(drivername="postgresql+psycopg")
        except (ArgumentError, ValueError) as error:
            raise StoreRefused(f"{self._name} is not a database URL ({error})", FORM) from error
        if not parsed.database:
            raise StoreRefused(f"{self._name} names no database", FORM)
        self._partitions = _partitions_of(self._name, parsed)
        parsed = parsed.difference_update_query([PARTITIONS])
        # Options in the URL take precedence.
        usual = OPTIONS | OPTIONS_TO_READ if read_only else OPTIONS
        options = {name: value for name, value in usual.items() if name not in parsed.query}
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
            pool_reset_on_return=None,
        )
        event.listen(self._engine, "connect", self._configure)
        try:
            if read_only:
                with self._transaction(READ, CLOCK) as connection:
                    self._check_encoding(connection)
                    self._accept(connection, self._version(connection))
            else:
                self._prepare()
        except BaseException:
            self.close()
            raise

    @classmethod
    def try_to_record(cls, place: str, patience: float) -> str:
        name = without_secrets(place)
        with closing(_Trial(place, True, patience)) as found:
            if found.version == VERSION:
                return f"{name} can be written"
            return f"a server {'migrates' if found.version else 'creates'} its tables in {name} when it starts"

    def reading(self) -> AbstractContextManager[Connection]:
        return self._transaction(READ, START)

    def writing(self, *, alone: bool = False) -> AbstractContextManager[Connection]:
        if self.is_read_only:
            raise StoreRefused(f"{self._name} was opened for reading only", "open it without read_only")
        return self._transaction(WRITE_ALONE if alone else WRITE, START)

    def explanation(self, error: Exception) -> Exception | None:
        reason = error.orig if isinstance(error, DBAPIError) else error
        message = str(reason).strip().partition("\n")[0]
        match reason:
            case errors.UniqueViolation() if _is_of_id(reason.diag.constraint_name or ""):
                return Conflict(f"{self._name}: {message}")
            case errors.UniqueViolation() if reason.diag.constraint_name in KEYS:
                return self._reused_keys(message)
            case _ if isinstance(reason, CONFLICTS):
                return Conflict(f"{self._name}: {message}")
            case _ if isinstance(reason, REFUSALS):
                return StoreRefused(f"{self._name} cannot be used: {message}", _advice_on_refusal(reason))
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
        with self.explained(), self._engine.connect() as connection:
            # What one moves, another would take for its own, and the indexes that one builds, for left behind.
            if not connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({COMPACTION_LOCK})").scalar_one():
                return
            try:
                for table in self._tables():
                    yield from compact(table, self.reading, partial(self.writing, alone=True), self._run_alone)
            finally:
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock({COMPACTION_LOCK})")

    def space_advice(self) -> str | None:
        return None

    def rewrite(self) -> None:
        for table in self._tables():
            self._run_alone(f"VACUUM FULL {table}")

    def close(self) -> None:
        self._engine.dispose()

    def _tables(self) -> Sequence[str]:
        """List the tables that have rows: partitions in the place of the tables that are divided into them."""
        query = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = %s::regnamespace ORDER BY oid"
        with self.reading() as connection:
            found = connection.exec_driver_sql(query, (SCHEMA,)).scalars().all()
        return [
            name for name in found if name in tables.metadata.tables or name.rpartition("_")[0] in tables.PARTITIONED
        ]

    def _run_alone(self, statement: str) -> None:
        """Run a statement that PostgreSQL refuses inside a transaction."""
        with self.explained(), self._engine.connect() as connection:
            connection.exec_driver_sql(statement)

    def _unreachable(self, message: str) -> StoreUnavailable | StoreRefused:
        """Classify an error by its message: psycopg gives errors that precede the login no code."""
        for refusal, advice in LOGIN_REFUSALS.items():
            if refusal in message:
                return StoreRefused(f"{self._name} cannot be used: {message}", advice)
        if "read-only" in message:
            advice = "give the URL of the primary server, or of one that may be written"
        elif "could not translate host name" in message or "getaddrinfo" in message or "resolve" in message:
            advice = "correct the host's name in the URL"
        else:
            advice = "is PostgreSQL running there, and does it let this machine in?"
        return StoreUnavailable(f"{self._name} cannot be used now: {message}", advice)

    def _configure(self, connection: psycopg.Connection, _: object) -> None:
        connection.execute(f"SET search_path TO {SCHEMA}")
        connection.execute(USE_LZ4)
        milliseconds = max(1, int(self._patience * 1000))
        connection.execute("SELECT set_config('lock_timeout', %s, false)", (str(milliseconds),))

    def _check_encoding(self, connection: Connection) -> None:
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise StoreRefused(
                f"{self._name} has the encoding {encoding}, which cannot hold every text",
                "give a database whose encoding is UTF8",
            )

    def _accept(self, connection: Connection, version: int) -> None:
        accept_to_read(self._name, version, VERSION)

    def _prepare(self) -> None:
        """Create the tables, or migrate them; refuse those of another program."""
        with self._transaction(WRITE, CLOCK) as connection:
            self._check_encoding(connection)
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (ADVISORY_LOCK,))
            version = self._version(connection)
            if version == 0:
                self._check_for_partitions(connection)
                connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                tables.create(connection, self._partitions)
                connection.exec_driver_sql("CREATE TABLE version (version integer NOT NULL)")
                connection.exec_driver_sql("INSERT INTO version VALUES (%s)", (VERSION,))
                return
            for statement in (statement for older in range(version, VERSION) for statement in MIGRATIONS[older]):
                connection.exec_driver_sql(statement)
            if version != VERSION:
                connection.exec_driver_sql("UPDATE version SET version = %s", (VERSION,))
            self._check_partitions(connection)
            # In a cluster that a copy was restored into, transactions have lower numbers.
            if connection.exec_driver_sql(f"SELECT EXISTS (SELECT 1 FROM rollouts WHERE {AHEAD})").scalar_one():
                connection.exec_driver_sql(RENUMBER)

    def _check_for_partitions(self, connection: Connection) -> None:
        if self._partitions is not None:
            version = int(connection.exec_driver_sql("SHOW server_version_num").scalar_one()) // 10_000
            if version < PARTITIONS_SINCE:
                raise StoreRefused(
                    f"{self._name} asks for partitions, which need PostgreSQL {PARTITIONS_SINCE}; this is {version}",
                    "leave `partitions` out of the URL",
                )

    def _check_partitions(self, connection: Connection) -> None:
        """Check that tables are divided as the URL says, and that their sequences are ahead of them.

        The second is what primary keys do for tables that are not divided.
        """
        query = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'generations'::regclass"
        partitions = connection.exec_driver_sql(query).scalar_one()
        if self._partitions is not None and self._partitions != partitions:
            has = f"has {partitions} partitions" if partitions else "has tables that are not divided"
            raise StoreRefused(
                f"{self._name} asks for {self._partitions} partitions, and {has}",
                "leave `partitions` out of the URL: it counts only when the tables are created",
            )
        for table in ("generations", "spans", "blocks") if partitions else ():
            # Evaluated in this order: another writer may take numbers meanwhile.
            highest = connection.exec_driver_sql(f"SELECT coalesce(max(key), 0) FROM {table}").scalar_one()
            last = connection.exec_driver_sql(
                f"SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM {table}_key_seq"
            ).scalar_one()
            if highest > last:
                raise self._reused_keys(f"{table} has the key {highest}, and its sequence is at {last}")

    def _reused_keys(self, message: str) -> StoreRefused:
        # Keys come from a sequence, which a copy of the database may have left behind.
        return StoreRefused(
            f"{self._name} assigns keys that are already in use, as a copy without sequences does: {message}",
            "set its sequences to the highest keys of their tables",
        )

    def _version(self, connection: Connection) -> int:
        """Return the version of the tables; 0 where there are none."""
        query = "SELECT table_name FROM information_schema.tables WHERE table_schema = %s"
        found = set(connection.exec_driver_sql(query, (SCHEMA,)).scalars())
        if not found:
            return 0
        if "version" not in found:
            raise StoreRefused(
                f"the schema {SCHEMA} of {self._name} has tables of another program", "give another database"
            )
        version = connection.exec_driver_sql("SELECT version FROM version").scalar_one()
        if version > VERSION:
            raise newer(self._name, version, VERSION)
        return version

    @contextmanager
    def _transaction(self, *begin: str) -> Iterator[Connection]:
        with self.explained(), self._begun("; ".join(begin)) as connection, transaction(connection, None):
            yield connection

    def _begun(self, message: str) -> Connection:
        """Return a connection whose transaction has begun by one message to the server, which brings the `Start`, too.

        A restarted server has closed all connections of the pool, which is not known before they are used: then
        another one takes its place.
        """
        while True:
            connection = self._engine.connect()
            driver: Any = connection.connection.driver_connection
            try:
                found = driver.execute(message)
                while found.nextset():
                    pass
                clock, deadline = found.fetchone()
                connection.info[STARTED] = Start(clock, time.monotonic(), deadline)
                return connection
            except BaseException as error:
                is_gone = driver.broken
                was_used = STARTED in connection.info
                if is_gone:
                    connection.invalidate()
                else:
                    with suppress(psycopg.Error):
                        driver.execute("ROLLBACK")
                connection.close()
                if not (is_gone and was_used and isinstance(error, psycopg.OperationalError)):
                    raise


class _Trial(PostgresqlDatabase):
    """A database as a server that would record there finds it.

    Attributes:
        version: the version of its tables; 0 where there are none.
    """

    def _accept(self, connection: Connection, version: int) -> None:
        self.version = version
        query = "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean"
        if connection.exec_driver_sql(query).scalar_one():
            raise StoreUnavailable(f"{self._name} only reads, as a standby does", "give the URL of the primary server")
        if version:
            needed = [table.name for table in tables.metadata.sorted_tables]
            # An older version lacks some of the tables, for which this is NULL.
            query = "SELECT has_table_privilege(to_regclass(%s), 'INSERT')"
            needed = [each for each in needed if connection.exec_driver_sql(query, (each,)).scalar_one() is False]
            if needed:
                self._refuse(f"INSERT on {SCHEMA}.{needed[0]}", f"GRANT ALL ON ALL TABLES IN SCHEMA {SCHEMA}")
            return
        query = "SELECT has_database_privilege(current_database(), 'CREATE')"
        if not connection.exec_driver_sql(query).scalar_one():
            self._refuse("CREATE on the database", "GRANT CREATE ON DATABASE")

    def _refuse(self, right: str, grant: str) -> None:
        raise StoreRefused(f"{self._name} cannot be written: its user lacks {right}", f"let an owner run: {grant} ...")


def _is_of_id(constraint: str) -> bool:
    return constraint in IDS or ID_OF_PARTITION.match(constraint) is not None


def _partitions_of(name: str, url: URL) -> int | None:
    """Return the number of partitions that a URL asks for; None where it does not."""
    if (text := url.query.get(PARTITIONS)) is None:
        return None
    if not isinstance(text, str) or not text.isdecimal() or not 1 <= int(text) <= PARTITIONS_LIMIT:
        raise StoreRefused(
            f"{name} asks for partitions={text}", f"give a number from 1 to {PARTITIONS_LIMIT}, or leave it out"
        )
    return int(text)


def _advice_on_refusal(error: object) -> str:
    if isinstance(error, errors.InsufficientPrivilege):
        return f"let an owner grant this user the rights on the schema {SCHEMA}, or CREATE on the database"
    if isinstance(error, errors.InvalidAuthorizationSpecification):
        return "correct the user and the password in the URL"
    if isinstance(error, errors.InvalidCatalogName):
        return "create the database, or correct its name in the URL"
    return "give another database: the tables of this one were changed by another program"
