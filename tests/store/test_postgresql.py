"""Tests of PostgreSQL: what only this database does, and several processes that write to it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from threading import Barrier, Event
from typing import Any

import psycopg
import pytest
from psycopg import errors
from sqlalchemy.exc import DBAPIError

from agentlightning.errors import InvalidRecord, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation
from agentlightning.rollout_records import RolloutConfig
from agentlightning.settings import without_secrets
from agentlightning.store import open_store, postgresql, try_to_record
from tests.common.generations import FULL, generation
from tests.common.postgresql import PostgresServer
from tests.common.processes import SECONDS, fork, together

WRITERS = 4
BATCHES = 25
BATCH = 20
KILLS = 20
FEW_KILLS = 2


@pytest.fixture
def url(postgresql: PostgresServer) -> str:
    return postgresql.new_database()


def query(url: str, statement: str) -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchone() if cursor.description else None


def reason(caught: pytest.ExceptionInfo[Exception]) -> BaseException | None:
    """Return the database's own error. Its class stands for a code; its message may be in any language."""
    error = caught.value.__cause__
    return error.orig if isinstance(error, DBAPIError) else error


def test_tables_are_in_their_own_schema_beside_others(url: str) -> None:
    query(url, "CREATE TABLE generations (theirs integer)")

    with open_store(url) as store:
        store.add([generation(1)])

    assert query(url, "SELECT count(*) FROM agentlightning.generations") == (1,)
    assert query(url, "SELECT count(*) FROM public.generations") == (0,)


def test_tables_have_little_endian_int32_ids_and_float32_logprobs(url: str) -> None:
    with open_store(url) as store:
        store.add([FULL])

    found = query(url, "SELECT encode(prompt_token_ids, 'hex') FROM agentlightning.generations")
    assert found == ("0000000001000000ffffff7fffffffff",)
    found = query(url, "SELECT encode(logprobs, 'hex') FROM agentlightning.choices WHERE index = 0")
    assert found == ("cdccccbd000080ff",)


def test_schema_of_another_program_is_refused_and_unchanged(url: str) -> None:
    query(url, "CREATE SCHEMA agentlightning CREATE TABLE generations (theirs integer)")

    with pytest.raises(StoreRefused, match=r"the schema agentlightning of .* has tables of another program"):
        open_store(url)

    assert query(url, "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'agentlightning'") == (1,)


def test_open_for_reading_makes_no_tables(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="has no store in it"):
        open_store(url, read_only=True)

    assert query(url, "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'agentlightning'") == (0,)


def test_tables_of_a_newer_version_are_refused(url: str) -> None:
    open_store(url).close()
    newer = postgresql.VERSION + 1
    query(url, f"UPDATE agentlightning.version SET version = {newer}")

    with pytest.raises(StoreRefused, match=rf"by a newer \w+ \(schema {newer}, this one knows {postgresql.VERSION}\)"):
        open_store(url)


def test_migration_opened_by_several_at_once_runs_each_step_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the present version as an old one with two migrations after it."""
    with open_store(url) as store:
        store.add([FULL])
    today = postgresql.VERSION
    steps = {
        today: ("ALTER TABLE losses ADD COLUMN note TEXT", "CREATE TABLE notes (note TEXT)"),
        today + 1: ("INSERT INTO notes VALUES ('of the second step')",),
    }
    monkeypatch.setattr(postgresql, "VERSION", today + 2)
    monkeypatch.setattr(postgresql, "MIGRATIONS", steps)
    all_there = Barrier(8)

    def open_with_others(_: int) -> list[Generation]:
        all_there.wait(SECONDS)
        with open_store(url, patience=SECONDS) as store:
            return [*store.generations()]

    with ThreadPoolExecutor(8) as threads:
        assert [*threads.map(open_with_others, range(8))] == [[FULL]] * 8
    assert query(url, "SELECT version FROM agentlightning.version") == (today + 2,)
    assert query(url, "SELECT count(*) FROM agentlightning.notes") == (1,)


def test_migration_that_fails_leaves_the_tables_unchanged(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(url) as store:
        store.add([FULL])
    with monkeypatch.context() as newer:
        newer.setattr(postgresql, "VERSION", postgresql.VERSION + 1)
        newer.setattr(
            postgresql,
            "MIGRATIONS",
            {postgresql.VERSION - 1: ("CREATE TABLE notes (note TEXT)", "CREATE TABLE texts (again)")},
        )
        with pytest.raises(StoreUnavailable, match="cannot be used now: ") as failed:
            open_store(url)
    assert isinstance(reason(failed), errors.SyntaxError)

    assert query(url, "SELECT to_regclass('agentlightning.notes')") == (None,)
    with open_store(url) as store:
        assert [*store.generations()] == [FULL]


def test_id_too_long_for_an_index_is_refused_alone(url: str) -> None:
    # Random digits, since PostgreSQL would compress a repetitive text until it fits.
    digits = random.Random(1).randbytes(20_000).hex()
    with open_store(url) as store:
        kept, refused_one = generation(1), generation(2, response_id=digits)
        with pytest.raises(InvalidRecord) as refused:
            store.add([kept, refused_one])

        assert [*refused.value.reasons] == [refused_one.id]
        assert refused.value.new == 1
        assert [*store.generations()] == [kept]


def test_open_of_an_invalid_database_gives_the_reason(url: str, postgresql: PostgresServer) -> None:
    nothing = postgresql.url("there_is_no_such_database")
    with pytest.raises(StoreRefused, match="/there_is_no_such_database cannot be used: "):
        open_store(nothing)
    reason = "names no database: write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
    with pytest.raises(StoreRefused, match=reason):
        open_store("postgresql://127.0.0.1")
    with pytest.raises(StoreRefused, match=r"\*\*\*@127.0.0.1:x/db is not a database URL"):
        open_store("postgresql://agl:secret@127.0.0.1:x/db")


def test_database_with_a_limited_encoding_is_refused(postgresql: PostgresServer) -> None:
    query(postgresql.url("postgres"), "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")

    with pytest.raises(
        StoreRefused, match=r"has the encoding LATIN1, which cannot hold every text: give a database .* UTF8"
    ):
        open_store(postgresql.url("latin"))


@pytest.mark.parametrize("table", ["generations", "texts"])
def test_reused_keys_blame_the_database_not_a_generation(url: str, table: str) -> None:
    """A copy of a database may have the rows but not the sequences."""
    with open_store(url) as store:
        store.add([FULL])
        query(url, f"SELECT setval('agentlightning.{table}_key_seq', 1, false)")
        with pytest.raises(StoreRefused, match="assigns keys that are already in use"):
            store.add([generation(1, model="another")])


def test_unreachable_server_is_unavailable_and_its_password_hidden() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql://agl:secret@127.0.0.1:{taken.getsockname()[1]}/db"
        with pytest.raises(StoreUnavailable, match="cannot be used now: ") as away:
            open_store(url)

    assert "secret" not in str(away.value)


def test_restarted_server_is_used_again(postgresql: PostgresServer, url: str) -> None:
    with open_store(url) as store:
        store.add([generation(1)])
        postgresql.stop()
        with pytest.raises(StoreUnavailable, match="cannot be used now"):
            store.add([generation(2)])
        postgresql.start()

        assert store.add([generation(2)]) == 1
        assert [*store.generations()] != []


def test_same_batch_from_two_writers_at_once_is_stored_once(url: str) -> None:
    """A client that cannot tell whether an `add` worked repeats it, maybe while the first one is still running."""
    with open_store(url) as one, open_store(url) as other:
        for number in range(20):
            batch = [generation(each) for each in range(number * 100, number * 100 + 100)]
            both = Barrier(2)

            def add(store: Any, batch: list[Generation] = batch, both: Barrier = both) -> int:
                both.wait(SECONDS)
                return store.add(batch)

            with ThreadPoolExecutor(2) as threads:
                assert sum(threads.map(add, (one, other))) == 100

        assert one.tally()["finished"] == 2_000


def test_read_only_server_is_unavailable(url: str) -> None:
    """After a failover the old server is read-only: no generation is at fault."""
    with open_store(url) as store:
        store.add([generation(1)])
    database = url.rpartition("/")[2]
    query(url, f"ALTER DATABASE {database} SET default_transaction_read_only TO on")
    with open_store(url) as store:
        with pytest.raises(StoreUnavailable, match="cannot be used now: ") as refused:
            store.add([generation(2)])
        assert isinstance(reason(refused), errors.ReadOnlySqlTransaction)
        assert [found.request_id for found in store.generations()] == [generation(1).request_id]


def test_write_behind_a_long_lock_is_given_up_after_patience(url: str) -> None:
    with open_store(url, patience=0.2) as store, psycopg.connect(url) as another:
        another.execute("LOCK TABLE agentlightning.generations")
        with pytest.raises(StoreUnavailable, match="cannot be used now: ") as waited:
            store.add([generation(1)])
        assert isinstance(reason(waited), errors.LockNotAvailable)
        another.rollback()

        assert store.add([generation(1)]) == 1


def batch(writer: int, number: int) -> list[Generation]:
    first = (writer * BATCHES + number) * BATCH
    # All writers use the same rollouts and models, each in its own order.
    numbers = random.Random(first).sample(range(first, first + BATCH), BATCH)
    return [generation(each, model=f"model-{each % 7}", rollout_id=f"rollout-{each % 10}") for each in numbers]


def test_processes_that_create_the_tables_and_write_together_lose_nothing(url: str) -> None:
    def write(writer: int) -> None:
        with open_store(url, patience=SECONDS) as store:
            for number in range(BATCHES):
                store.add(batch(writer, number))

    together(WRITERS, write)

    with open_store(url) as store:
        found = [*store.generations()]
        of_one_rollout = [*store.generations(rollout_id="rollout-3")]
    assert len({each.id for each in found}) == len(found) == WRITERS * BATCHES * BATCH
    for each in found:
        number = int(str(each.response_id).removeprefix("chatcmpl-"), 16)
        names: Any = {"model": f"model-{number % 7}", "rollout_id": f"rollout-{number % 10}"}
        assert each == generation(number, id=each.id, call_id=each.call_id, **names)
    assert len(of_one_rollout) == len(found) / 10


def write_forever(url: str, first: int, acknowledge: Connection) -> None:
    """Write batches without end, repeating each until it is stored, as the recorder does."""
    number = first
    while True:
        some = [generation(each, prompt=5_000) for each in range(number, number + random.randint(1, 10))]
        while True:
            try:
                with open_store(url) as store:
                    store.add(some)
                break
            except StoreUnavailable:
                continue
        acknowledge.send([each.id for each in some])
        number += len(some)


def test_postgresql_killed_at_any_moment_keeps_acknowledged_generations_once_and_complete(
    postgresql: PostgresServer, url: str, thorough: bool
) -> None:
    receiver, sender = fork.Pipe(duplex=False)
    writers = [fork.Process(target=write_forever, args=(url, each * 100_000, sender)) for each in range(2)]
    for writer in writers:
        writer.start()
    sender.close()
    acknowledged: list[str] = []
    for _ in range(KILLS if thorough else FEW_KILLS):
        for _ in range(random.randint(2, 12)):
            acknowledged += receiver.recv()
        Event().wait(random.uniform(0, 0.02))
        postgresql.kill()
        postgresql.start()
    acknowledged += receiver.recv()
    for writer in writers:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(SECONDS)
    with contextlib.suppress(EOFError):
        while True:
            acknowledged += receiver.recv()

    with open_store(url) as store:
        found = {each.id: each for each in store.generations()}
        assert sum(store.tally().values()) == len(found)
    assert found.keys() >= set(acknowledged)
    assert len({each.response_id for each in found.values()}) == len(found)
    for each in found.values():
        number = int(str(each.response_id).removeprefix("chatcmpl-"), 16)
        assert each == generation(number, prompt=5_000, id=each.id, call_id=each.call_id)


def as_user(url: str, name: str, *grants: str) -> str:
    """Create a user with these rights; return the URL that logs in as that user."""
    query(url, f"CREATE USER {name}")
    for grant in grants:
        query(url, f"GRANT {grant} TO {name}")
    return url.replace("//agl@", f"//{name}@")


def drop(url: str, name: str) -> None:
    query(url, f"DROP OWNED BY {name}")
    query(url, f"DROP USER {name}")


def test_read_only_store_changes_nothing(url: str) -> None:
    with open_store(url) as store:
        store.add([FULL])
        store.start_rollout({}, config=RolloutConfig(timeout_seconds=1e-9))

    with open_store(url, read_only=True) as store:
        assert [*store.generations()] == [FULL]
        assert [each.status for each in store.query_rollouts()] == ["preparing"]
        with pytest.raises(StoreRefused, match="was opened for reading only: open it without read_only"):
            store.add([generation(1)])
        assert store.statistics()["total_generations"] == 1


def test_tables_of_an_older_version_are_refused_for_reading_and_unchanged(url: str) -> None:
    open_store(url).close()
    query(url, f"UPDATE agentlightning.version SET version = {postgresql.VERSION - 1}")

    with pytest.raises(
        StoreRefused, match=r"by an older \w+ \(schema \d, this one reads \d\): run `agl migrate --store"
    ):
        open_store(url, read_only=True)

    assert query(url, "SELECT version FROM agentlightning.version") == (postgresql.VERSION - 1,)


def test_user_who_may_only_read_reads(url: str) -> None:
    with open_store(url) as store:
        store.add([FULL])
    reader = as_user(url, "reader", "USAGE ON SCHEMA agentlightning", "SELECT ON ALL TABLES IN SCHEMA agentlightning")
    try:
        with open_store(reader, read_only=True) as store:
            assert [*store.generations()] == [FULL]
        with pytest.raises(
            StoreRefused, match=r"its user lacks INSERT on agentlightning\.\w+: let an owner run: GRANT"
        ):
            try_to_record(reader)
    finally:
        drop(url, "reader")


def test_trial_says_what_a_server_would_do_and_does_not_do_it(url: str) -> None:
    assert try_to_record(url) == f"a server creates its tables in {without_secrets(url)} when it starts"
    assert query(url, "SELECT count(*) FROM pg_namespace WHERE nspname = 'agentlightning'") == (0,)

    open_store(url).close()
    assert try_to_record(url) == f"{without_secrets(url)} can be written"

    query(url, "DROP TABLE agentlightning.blocks")
    query(url, "UPDATE agentlightning.version SET version = 1")
    assert try_to_record(url) == f"a server migrates its tables in {without_secrets(url)} when it starts"
    assert query(url, "SELECT version FROM agentlightning.version") == (1,)


def test_trial_of_a_database_in_which_nothing_may_be_created_gives_the_right(url: str) -> None:
    stranger = as_user(url, "stranger")
    try:
        with pytest.raises(StoreRefused, match="its user lacks CREATE on the database: let an owner run: GRANT CREATE"):
            try_to_record(stranger)
    finally:
        drop(url, "stranger")


def test_trial_of_a_server_that_only_reads_names_the_primary(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="only reads, as a standby does: give the URL of the primary server"):
        try_to_record(f"{url}?options=-cdefault_transaction_read_only%3Don")


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda url: f"{url}_missing", "create what is missing, or correct the URL"),
        (lambda url: url.replace("//agl@", "//nobody@"), "create what is missing, or correct the URL"),
        (lambda url: re.sub(r":\d+/", ":1/", url), "is PostgreSQL running there, and does it let this machine in?"),
        (lambda url: url.replace("127.0.0.1", "no.such.host.invalid"), "correct the host's name in the URL"),
    ],
    ids=["no database", "no user", "not running", "no host"],
)
def test_database_that_cannot_be_reached_has_fitting_advice(
    url: str, change: Callable[[str], str], advice: str
) -> None:
    with pytest.raises((StoreRefused, StoreUnavailable)) as refused:
        open_store(change(url), read_only=True)

    assert refused.value.advice == advice, str(refused.value)
