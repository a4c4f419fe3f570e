"""Tests of senders in every database: their counts, their lag, and the vocabularies of their token ids."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import time
import zlib
from array import array
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from agentlightning.errors import InvalidRecord
from agentlightning.generation import Choice, Loss, new_id
from agentlightning.sender import Sender, Vocabulary
from agentlightning.store import Store, generations, open_store, senders, tables
from agentlightning.store.database import Database
from tests.common.generations import EMPTY, HOSTILE, generation

pytestmark = pytest.mark.tier("check")

MINUTE = 60 * 10**9
DAY = 24 * 60 * MINUTE
NOW = 1_700_000_000 * 10**9
VOCABULARY = Vocabulary(["<s>", "Ġthe", "größe", '\0"\\', None, "北京"], frozenset({0}))


def sender(**fields: Any) -> Sender:
    usual: dict[str, Any] = {"host": "gpu-1", "pid": 7, "started_at": NOW - DAY, "version": "0.1.0"}
    return Sender(**usual | {"vllm": "0.32.0", "model": "a model", "vocabulary": VOCABULARY} | fields)


def reports(database: Database, since: int = 0, limit: int = 100) -> list[senders.SenderReport]:
    with database.reading() as connection:
        return senders.recent(connection, since, limit)


def rows_of(database: Database, table: Any) -> int:
    with database.reading() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def count(database: Database, each: Sender, at: int, finished_at: int, how_many: int = 1) -> None:
    new = [dataclasses.replace(generation(number), finished_at=finished_at) for number in range(how_many)]
    database.write(
        lambda connection: senders.count_generations(connection, each.id, new, [12] * how_many, [5] * how_many, at)
    )


def test_register_twice_keeps_the_last(store: Store, database: Database) -> None:
    early = sender(vllm=None, model=None, vocabulary=None)
    complete = dataclasses.replace(early, vllm="0.32.0", model="größe\0", vocabulary=VOCABULARY)

    store.register_sender(early)
    store.register_sender(complete)
    store.register_sender(complete)

    [found] = reports(database)
    assert found.sender == dataclasses.replace(complete, vocabulary=None)
    assert found.vocabulary_digest == VOCABULARY.digest
    assert abs(found.seen_at - time.time_ns()) < 600 * 10**9
    assert (found.minutes, found.lost) == ([], 0)


def test_register_with_an_id_that_is_not_a_uuid_is_refused(store: Store, database: Database) -> None:
    with pytest.raises(InvalidRecord, match="UUID"):
        store.register_sender(sender(id="me"))

    assert reports(database) == []


def test_senders_of_one_model_share_one_stored_vocabulary(store: Store, database: Database) -> None:
    one, two, other = sender(), sender(), sender(vocabulary=Vocabulary(["a"]))
    kept = [generation(number) for number in range(4)]

    for number, each in enumerate((one, two, other)):
        store.register_sender(each)
        store.add([kept[number]], each.id)
    store.add([kept[3]])

    assert rows_of(database, tables.vocabularies) == 2
    with database.reading() as connection:
        found = [senders.vocabulary_of(connection, each.id) for each in kept]
        digests = [senders.vocabulary_digest_of(connection, each.id) for each in kept]
        assert senders.vocabulary(connection, VOCABULARY.digest) == VOCABULARY
    assert found == [VOCABULARY, VOCABULARY, Vocabulary(["a"]), None]
    assert digests == [VOCABULARY.digest, VOCABULARY.digest, Vocabulary(["a"]).digest, None]


@pytest.mark.parametrize("generation_id", [new_id(), "no UUID"])
def test_vocabulary_of_an_unknown_generation_is_none(database: Database, generation_id: str) -> None:
    with database.reading() as connection:
        assert senders.vocabulary_of(connection, generation_id) is None


def test_vocabulary_that_arrives_late_is_found_for_earlier_generations(database: Database) -> None:
    early, kept = sender(vocabulary=None), generation(1)
    database.write(lambda connection: senders.register_without_vocabulary(connection, early, VOCABULARY.digest))
    database.write(lambda connection: generations.add(connection, [kept], early.id))
    with database.reading() as connection:
        assert not senders.has_vocabulary(connection, VOCABULARY.digest)
        assert senders.vocabulary_of(connection, kept.id) is None

    database.write(lambda connection: senders.add_vocabulary(connection, VOCABULARY.digest, VOCABULARY.to_bytes()))

    with database.reading() as connection:
        assert senders.vocabulary_of(connection, kept.id) == VOCABULARY


@pytest.mark.parametrize("sender_id", [None, new_id(), "no UUID", ""])
def test_generations_of_an_unregistered_sender_are_stored(
    store: Store, database: Database, sender_id: str | None
) -> None:
    store.register_sender(sender())

    assert store.add([generation(1)], sender_id) == 1

    assert len([*store.generations()]) == 1
    assert [each.minutes for each in reports(database)] == [[]]


def test_counts_include_only_new_generations(store: Store, database: Database) -> None:
    one, other = sender(), sender()
    store.register_sender(one)
    store.register_sender(other)
    kept = [generation(number, prompt=10, output=3) for number in range(7)]
    two = [Choice(token_ids=array("i", [1, 2])), Choice(index=1), Choice(index=2, token_ids=array("i", [3]))]

    store.add(kept[:4], one.id)
    store.add(kept, one.id)
    store.add([*kept, generation(8, prompt=0, choices=two)], other.id)
    store.add([EMPTY], other.id)

    counted = {each.sender.id: each.minutes for each in reports(database)}
    assert _sums(counted[one.id]) == (7, 70, 21)
    assert _sums(counted[other.id]) == (2, 0, 3)
    with database.reading() as connection:
        table = tables.generations.c
        rows = connection.execute(select(table.prompt_tokens, table.output_tokens).order_by(table.key)).all()
    assert rows == [*[(10, 3)] * 7, (0, 3), (0, 0)]


def _sums(minutes: Any) -> tuple[int, int, int]:
    return (
        sum(each.generations for each in minutes),
        sum(each.prompt_tokens for each in minutes),
        sum(each.output_tokens for each in minutes),
    )


def test_minute_has_the_lag_between_end_and_arrival(database: Database) -> None:
    each = sender()
    database.write(lambda connection: senders.register(connection, each))
    count(database, each, NOW, NOW - 3 * 10**9, 2)
    count(database, each, NOW + 10**9, NOW - 10**9)
    # By a sender's clock that is ahead.
    count(database, each, NOW + MINUTE, NOW + MINUTE + 10**9)
    count(database, each, NOW + 2 * MINUTE, -(2**63))

    first, second, third = reports(database)[0].minutes
    assert (first.minute, first.generations, first.lag_sum, first.lag_max) == (NOW // MINUTE, 3, 8e9, 3e9)
    assert (second.minute, second.generations, second.lag_sum, second.lag_max) == (NOW // MINUTE + 1, 1, 0.0, 0.0)
    assert third.lag_max == pytest.approx(NOW + 2 * MINUTE + 2**63)
    assert reports(database, NOW + MINUTE)[0].minutes == [second, third]


def test_minutes_older_than_a_day_are_deleted_for_that_sender_only(database: Database) -> None:
    one, other = sender(), sender()
    for each in (one, other):
        database.write(lambda connection, each=each: senders.register(connection, each))
        for minute in range(3):
            count(database, each, NOW + minute * MINUTE, NOW)

    count(database, one, NOW + DAY + MINUTE, NOW)

    kept = {each.sender.id: [minute.minute - NOW // MINUTE for minute in each.minutes] for each in reports(database)}
    assert kept == {one.id: [1, 2, 24 * 60 + 1], other.id: [0, 1, 2]}


def test_recent_lists_senders_by_last_activity_and_omits_older_ones(database: Database) -> None:
    every = [sender(pid=pid) for pid in range(5)]
    for each in every:
        database.write(lambda connection, each=each: senders.register(connection, each))
    # Later than the registration.
    later = time.time_ns() + DAY
    for number, place in enumerate((3, 1, 4)):
        count(database, every[place], later + number * 10**9, later)

    assert [each.sender.pid for each in reports(database)][:3] == [4, 1, 3]
    assert [each.sender.pid for each in reports(database, later + 10**9)] == [4, 1]
    assert [each.sender.pid for each in reports(database, limit=2)] == [4, 1]
    times = [each.seen_at for each in reports(database)]
    assert all(one >= another for one, another in pairwise(times))


def test_loss_counts_for_the_process_that_ran_at_its_time(store: Store, database: Database) -> None:
    # In a restarted container the process has the same id as the one before.
    first, second, other = sender(started_at=NOW), sender(started_at=NOW + 100), sender(pid=8, started_at=NOW)
    for each in (first, second, other):
        store.register_sender(each)
    store.add_losses(
        [
            Loss(count=1, reason="queue full", first_at=NOW, last_at=NOW + 99, host="gpu-1", pid=7),
            Loss(count=10, reason="queue full", first_at=NOW, last_at=NOW + 100, host="gpu-1", pid=7),
            Loss(count=100, reason="queue full", first_at=NOW, last_at=NOW + 500, host="gpu-1", pid=7),
            Loss(count=1000, reason="queue full", first_at=NOW, last_at=NOW + 500, host="gpu-2", pid=7),
            Loss(count=10000, reason="queue full", first_at=NOW - 9, last_at=NOW - 5, host="gpu-1", pid=7),
        ]
    )

    assert {each.sender.id: each.lost for each in reports(database)} == {first.id: 1, second.id: 110, other.id: 0}
    assert {each.lost for each in reports(database, NOW + 200)} == {100, 0}


def test_counts_of_a_rollout_are_read_from_a_covering_index(tmp_path: Path) -> None:
    path = tmp_path / "generations.db"
    with open_store(str(path)) as store:
        store.add([generation(number) for number in range(20)])
    query = """SELECT attempt_key, status, count(*), sum(prompt_tokens), sum(output_tokens), max(finished_at)
               FROM generations WHERE rollout_key = 1 GROUP BY attempt_key, status"""

    with closing(sqlite3.connect(path)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")]

    # The wording is SQLite's.
    assert "COVERING INDEX generations_by_rollout" in plan[0]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_vocabulary_round_trips(text: str) -> None:
    kept = Vocabulary([text, None, "\ud800", *map(str, range(5_000))], frozenset({1, 4_000}))

    found = Vocabulary.from_bytes(kept.to_bytes())

    assert found == kept
    assert found.digest == kept.digest
    assert Vocabulary(kept.tokens).digest != kept.digest


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (b"", "truncated"),
        (b"a vocabulary", "cannot be decompressed"),
        (VOCABULARY.to_bytes()[:-1], "truncated"),
        (VOCABULARY.to_bytes() + b"\0", "followed by other data"),
        (zlib.compress(os.urandom(100)), "not JSON"),
        (zlib.compress(b"[" * 100_000), "not JSON"),
        (zlib.compress(b"[]"), "not an object"),
        (zlib.compress(b'{"tokens":["a"]}'), "not an object"),
        (zlib.compress(b'{"special":[],"tokens":{}}'), "not an object"),
        (zlib.compress(b'{"special":[],"tokens":[1]}'), "not a string"),
        (zlib.compress(b'{"special":[1],"tokens":["a"]}'), "not one of its ids"),
        (zlib.compress(b'{"special":[true],"tokens":["a","b"]}'), "not one of its ids"),
        (zlib.compress(bytes(65 << 20)), "more than 64 MiB"),
    ],
)
def test_unpacking_an_invalid_vocabulary_gives_the_reason(packed: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Vocabulary.from_bytes(packed)
