"""Tests of a PostgreSQL store whose large tables are divided into partitions by the hash of the rollout."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier

import psycopg
import pytest

from agentlightning.errors import StoreRefused
from agentlightning.rollout_records import Span
from agentlightning.store import Store, open_database, open_store
from tests.common.generations import generation
from tests.common.postgresql import PostgresServer
from tests.common.processes import SECONDS
from tests.store.conftest import PARTITIONS

LARGE = ("generations", "choices", "spans", "blocks")


@pytest.fixture
def plain_url(postgresql: PostgresServer) -> str:
    return postgresql.new_database()


@pytest.fixture
def url(plain_url: str) -> str:
    return f"{plain_url}?partitions={PARTITIONS}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with open_store(url) as store:
        yield store


def rows_of_each(plain_url: str, table: str) -> list[int]:
    with psycopg.connect(plain_url) as connection:
        query = "SELECT count(*) FROM agentlightning.{}_{}"
        return [
            connection.execute(query.format(table, number).encode()).fetchone()[0]  # type: ignore[index]
            for number in range(PARTITIONS)
        ]


def test_rows_of_a_rollout_are_in_one_partition_and_are_read_and_deleted_as_ever(store: Store, plain_url: str) -> None:
    draw = random.Random(0)
    rollouts = [store.start_rollout(n) for n in range(40)]
    kept = [
        generation(n, rollout_id=each.rollout_id, prompt_token_ids=array("i", draw.choices(range(1_000), k=3_000)))
        for n, each in enumerate(rollouts)
    ]
    assert store.add([*kept, generation(100, rollout_id=None)]) == 41
    assert store.add(kept) == 0
    for each in rollouts:
        assert each.attempt is not None
        span = Span("a span", each.rollout_id, each.attempt.attempt_id)
        added = store.add_span(span)
        assert added is not None
        assert store.add_span(added) is None

    for table in LARGE:
        assert all(rows_of_each(plain_url, table)), table
    assert sum(rows_of_each(plain_url, "generations")) == 41
    assert [*store.generations(rollout_id=rollouts[7].rollout_id)] == [kept[7]]
    assert len(store.query_spans(rollouts[7].rollout_id)) == 1

    for each in rollouts:
        store.update_rollout(each.rollout_id, status="succeeded")
    assert store.delete_rollouts([each.rollout_id for each in rollouts]) == 40
    assert sum(rows_of_each(plain_url, "generations")) == 1
    assert sum(rows_of_each(plain_url, "spans")) == 0
    assert sum(rows_of_each(plain_url, "blocks")) == 0


@pytest.mark.parametrize("rollout_id", ["ro-1", None])
def test_same_batch_from_writers_at_once_is_stored_once(url: str, rollout_id: str | None) -> None:
    batch = [generation(n, rollout_id=rollout_id, prompt_token_ids=array("i", range(n, n + 3_000))) for n in range(20)]
    all_there = Barrier(4)

    def add(_: int) -> int:
        with open_store(url, patience=SECONDS) as store:
            all_there.wait(SECONDS)
            return store.add(batch)

    open_store(url).close()
    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(add, range(4))) == len(batch)
    with open_store(url) as store:
        assert [*store.generations()] == batch


def test_partitions_are_those_of_the_creation(
    store: Store, url: str, plain_url: str, postgresql: PostgresServer
) -> None:
    with open_store(plain_url) as same:
        assert [*same.generations()] == []
    with pytest.raises(StoreRefused, match=r"asks for 4 partitions, and has 3 partitions: leave `partitions` out"):
        open_store(f"{plain_url}?partitions=4")
    other = postgresql.new_database()
    open_store(other).close()
    with pytest.raises(StoreRefused, match=r"asks for 3 partitions, and has tables that are not divided"):
        open_store(f"{other}?partitions=3")
    with pytest.raises(StoreRefused, match=r"asks for partitions=many: give a number from 1 to 256"):
        open_store(f"{other}?partitions=many")


def test_copy_without_its_sequences_is_refused(store: Store, url: str, plain_url: str) -> None:
    store.add([generation(1, prompt_token_ids=array("i", range(3_000)))])
    with psycopg.connect(plain_url) as connection:
        connection.execute("SELECT setval('agentlightning.blocks_key_seq', 1, false)")

    with pytest.raises(StoreRefused, match=r"assigns keys that are already in use, .* blocks has the key"):
        open_store(url)


def test_space_of_each_partition_is_returned(store: Store, url: str) -> None:
    rollouts = [store.start_rollout(n) for n in range(4)]
    draw = random.Random(0)
    store.add(
        [
            generation(
                n, rollout_id=each.rollout_id, prompt_token_ids=array("i", draw.choices(range(10**6), k=500_000))
            )
            for n, each in enumerate(rollouts)
        ]
    )
    for each in rollouts:
        store.update_rollout(each.rollout_id, status="failed")
    with closing(open_database(url)) as database:
        before = database.size()
        store.delete_rollouts([each.rollout_id for each in rollouts])
        assert database.size() < before / 2
        database.rewrite()
