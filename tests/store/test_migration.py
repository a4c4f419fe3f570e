"""Tests of prompts that an older version stored whole: they become blocks, and are read as before."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from agentlightning.generation import Generation
from agentlightning.store import Store, migration, open_database, open_store, tables
from agentlightning.store.chains import FIRST, NEXT
from agentlightning.store.database import Database
from agentlightning.store.rows import bytes_of, storable
from tests.common.generations import generation
from tests.common.processes import SECONDS
from tests.store.conftest import EVERY_KIND, new_store_of
from tests.store.test_deletion import killed_process, rest_of, write_until_killed

pytestmark = pytest.mark.tier("check")

FIRST_IDS, NEXT_IDS = FIRST // 4, NEXT // 4
KILLS = 20
FEW_KILLS = 3


@pytest.fixture(scope="session", params=EVERY_KIND[:2])
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def old(database: Database, kept: list[Generation]) -> None:
    """Store generations as the former version did: whole."""
    with open_store_of(database) as store:
        store.add([replace(each, prompt_token_ids=None, prompt_text=None) for each in kept])
    with database.writing() as connection:
        for each in kept:
            whole = {
                "prompt_token_ids": bytes_of(each.prompt_token_ids),
                "prompt_text": storable(each.prompt_text),
                "prompt_tokens": len(each.prompt_token_ids or ()),
            }
            table = tables.generations
            which = table.c.id == bytes.fromhex(each.id.replace("-", ""))
            connection.execute(table.update().where(which).values(**whole))


def open_store_of(database: Database) -> Store:
    from agentlightning.store.database_store import DatabaseStore

    class Open(DatabaseStore):
        def close(self) -> None:
            """Leave the database to the test."""

    return Open(database)


def prompts_of_every_length() -> list[Generation]:
    history, text = [*range(8 * FIRST_IDS)], "größe \0\ufdd0 北京 " * 3_000
    lengths = [0, 1, FIRST_IDS - 1, FIRST_IDS, FIRST_IDS + 1, 2 * FIRST_IDS + 3 * NEXT_IDS, 8 * FIRST_IDS]
    return [
        *(
            generation(n, prompt_token_ids=array("i", history[:length]), prompt_text=text[:length])
            for n, length in enumerate(lengths)
        ),
        generation(100, prompt_token_ids=None, prompt_text=text),
        generation(101, prompt_token_ids=array("i", history), prompt_text=None),
        generation(102, prompt_token_ids=array("i", [-1, 2**31 - 1] * FIRST_IDS), prompt_text=None),
    ]


def state(database: Database) -> list[Any]:
    with database.reading() as connection:
        blocks = connection.execute(select(tables.blocks).order_by(tables.blocks.c.key)).all()
        return [*blocks, *connection.execute(select(tables.generations).order_by(tables.generations.c.key))]


def test_migrated_prompts_are_read_as_before_and_a_second_run_does_nothing(store: Store, database: Database) -> None:
    kept = prompts_of_every_length()
    old(database, kept)
    assert [*store.generations()] == kept
    before = state(database)

    first = [*migration.migrate(database)]

    assert [*store.generations()] == kept
    assert sum(step.migrated for step in first) == 7
    assert sum(step.seen for step in first) == migration.count(database)
    after = state(database)
    assert before != after
    assert sum(step.migrated for step in migration.migrate(database)) == 0
    assert state(database) == after


def test_migrated_prompts_share_blocks_with_new_ones(store: Store, database: Database) -> None:
    kept = [generation(n, prompt_token_ids=array("i", [*range(5 * FIRST_IDS), n])) for n in range(6)]
    old(database, kept[:3])
    store.add(kept[3:])

    list(migration.migrate(database))

    assert [*store.generations()] == kept
    with database.reading() as connection:
        count = connection.execute(select(func.count()).select_from(tables.blocks)).scalar_one()
    assert count == 1 + 4 * FIRST_IDS // NEXT_IDS


def test_generation_deleted_or_migrated_meanwhile_is_left_alone(store: Store, database: Database) -> None:
    kept = [generation(n, prompt_token_ids=array("i", range(n, n + 2 * FIRST_IDS))) for n in range(40)]
    old(database, kept)

    steps = migration.migrate(database)
    next(steps)
    list(migration.migrate(database))
    with database.writing() as connection:
        connection.execute(tables.generations.delete().where(tables.generations.c.key > 30))
    after = state(database)

    assert sum(step.migrated for step in steps) == 0
    assert state(database) == after


def test_empty_store_has_nothing_to_migrate(database: Database) -> None:
    assert [*migration.migrate(database)] == []


def migrate_until_killed(url: str, begun: Any) -> None:
    with closing(open_database(url, patience=SECONDS)) as database:
        for step in migration.migrate(database):
            begun.send(step)


@pytest.mark.tier("test")
def test_migration_killed_at_any_moment_beside_writers_loses_nothing_and_can_be_finished(
    url: str, database: Database, thorough: bool
) -> None:
    pauses = random.Random(24)
    kills = KILLS if thorough else FEW_KILLS
    text = "what the system says " * 400
    kept = [
        generation(n, prompt_token_ids=array("i", [*range(2 * FIRST_IDS), *[n] * NEXT_IDS]), prompt_text=f"{text}{n}")
        for n in range(100 * kills)
    ]
    old(database, kept)
    written: list[int] = []
    for kill in range(kills):
        with killed_process(write_until_killed, url, 100_000 * (kill + 1)) as acknowledged:
            with killed_process(migrate_until_killed, url) as begun:
                begun.recv()
                time.sleep(pauses.uniform(0, 0.1))
            written.append(acknowledged.recv())
        written += rest_of(acknowledged)

    list(migration.migrate(database))

    with open_store(url) as store:
        found = {each.id: each for each in store.generations()}
    assert [found[each.id] for each in kept] == kept
    assert len(found) == len(kept) + sum(each.id.startswith("01900000-0000-7000") for each in found.values())
    with database.reading() as connection:
        table = tables.generations
        whole = select(func.count()).where(table.c.ids_block.is_(None), table.c.prompt_tokens >= FIRST_IDS)
        assert connection.execute(whole).scalar_one() == 0


def test_migration_leaves_a_generation_alone_that_has_the_key_of_a_deleted_one(
    url: str, store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delete the last generation after its prompt was read, and write another: SQLite gives its key again."""
    kept, gone, new = generation(1), generation(2, prompt_token_ids=array("i", range(2000))), generation(3)
    old(database, [kept, gone])
    cut = migration._cut  # pyright: ignore[reportPrivateUsage]

    def cut_and_replace(connection: Any, keys: Any) -> Any:
        found = cut(connection, keys)
        with closing(open_database(url)) as other, other.writing() as writing:
            last = writing.execute(select(func.max(tables.generations.c.key))).scalar_one()
            writing.execute(tables.choices.delete().where(tables.choices.c.generation_key == last))
            writing.execute(tables.generations.delete().where(tables.generations.c.key == last))
        store.add([new])
        return found

    monkeypatch.setattr(migration, "_cut", cut_and_replace)
    assert sum(step.migrated for step in migration.migrate(database)) == 0

    assert [each.prompt_token_ids for each in store.generations()] == [kept.prompt_token_ids, new.prompt_token_ids]
