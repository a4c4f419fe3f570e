"""Tests of prompts that share their beginnings: each part is stored once, and every prompt is read as it came."""

from __future__ import annotations

import sqlite3
import tempfile
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from agentlightning.generation import Generation
from agentlightning.store import Store, blocks, generations, open_store, tables
from agentlightning.store.blocks import Lacking
from agentlightning.store.chains import FIRST, IDS, NEXT, TEXTS, Chain, Recent
from agentlightning.store.database import Database
from tests.common.generations import generation
from tests.common.unhurried import UNHURRIED
from tests.store.conftest import back_to_version, new_store_of

pytestmark = pytest.mark.tier("check")

FIRST_IDS, NEXT_IDS = FIRST // 4, NEXT // 4
KINDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.tier("test"))]


@pytest.fixture(scope="session", params=KINDS)
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def called(number: int, ids: Sequence[int], text: str | None = None) -> Generation:
    return generation(number, prompt_token_ids=array("i", ids), prompt_text=text)


def block_count(database: Database) -> int:
    with database.reading() as connection:
        return connection.execute(select(func.count()).select_from(tables.blocks)).scalar_one()


def conversation(calls: int, growth: int) -> list[Generation]:
    """Make calls whose prompts grow, as those of an agent do."""
    history = list(range(calls * growth))
    texts = "".join(f"{number} " for number in history)
    return [called(n, history[: growth * (n + 1)], texts[: 5 * growth * (n + 1)]) for n in range(calls)]


def test_conversation_is_stored_by_what_is_new_in_each_call(store: Store, database: Database) -> None:
    kept = conversation(calls=20, growth=NEXT_IDS)

    for each in kept:
        store.add([each])

    assert [*store.generations()] == kept
    of_ids = 1 + (20 * NEXT_IDS - FIRST_IDS) // NEXT_IDS
    of_text = 1 + (len(kept[-1].prompt_text or "") - FIRST) // NEXT
    assert block_count(database) == of_ids + of_text


def test_prompts_that_begin_alike_share_blocks_in_any_order(store: Store, database: Database) -> None:
    shared = list(range(2 * FIRST_IDS))
    kept = [called(n, [*shared, *range(n, n + NEXT_IDS)]) for n in range(10)]

    store.add(kept[5:])
    store.add(kept[:5])

    assert {each.id: each for each in store.generations()} == {each.id: each for each in kept}
    assert block_count(database) == 1 + FIRST_IDS // NEXT_IDS + len(kept)


def test_prompts_of_another_process_are_shared(store: Store, url: str, database: Database) -> None:
    with open_store(url) as other:
        other.add([called(1, range(5000), "a" * 9000)])
    before = block_count(database)

    store.add([called(2, range(5000), "a" * 9000)])

    assert block_count(database) == before
    assert [found.prompt_token_ids for found in store.generations()] == [array("i", range(5000))] * 2


def test_short_prompts_are_stored_whole(store: Store, database: Database) -> None:
    kept = [called(n, range(FIRST_IDS - 1), "a" * (FIRST - 1)) for n in range(3)]

    store.add(kept)

    assert [*store.generations()] == kept
    assert block_count(database) == 0


@pytest.mark.parametrize("ids", [[2**24 - 1], [2**24], [2**31 - 1], [-1], [0]], ids=str)
def test_ids_of_every_size_are_read_as_they_came(store: Store, ids: list[int]) -> None:
    kept = called(1, ids * 3000)

    store.add([kept])

    assert [*store.generations()] == [kept]


TEXTS_OF_EVERY_KIND = {
    "beyond ASCII": "größe 北京 \N{GRINNING FACE} e\N{COMBINING ACUTE ACCENT}" * 1000,
    "NULs": "\0a" * 5000,
    "the character of escapes": "\ufdd0" * 5000,
}


@pytest.mark.parametrize("text", TEXTS_OF_EVERY_KIND.values(), ids=[*TEXTS_OF_EVERY_KIND])
def test_texts_of_every_kind_are_read_as_they_came(store: Store, text: str) -> None:
    kept = called(1, [], text)

    store.add([kept])

    assert [*store.generations()] == [kept]


def test_halves_of_surrogate_pairs_in_a_long_text_become_question_marks(store: Store) -> None:
    store.add([called(1, [], "a\ud800" * 5000)])

    assert [found.prompt_text for found in store.generations()] == ["a?" * 5000]


def test_block_that_was_rolled_back_is_stored_by_the_next_call(store: Store, database: Database) -> None:
    kept = called(1, range(5000))

    def add_and_fail() -> None:
        with database.writing() as connection:
            generations.add(connection, [kept])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_and_fail()
    # Another prompt gets the keys that the first one's blocks had.
    with database.writing() as connection:
        generations.add(connection, [called(2, range(7, 5007))])
    with database.writing() as connection:
        generations.add(connection, [kept])

    assert [found.prompt_token_ids for found in store.generations()] == [
        array("i", range(5000)),
        array("i", range(7, 5007)),
    ]


def test_block_that_was_deleted_is_stored_again(store: Store, database: Database) -> None:
    with database.writing() as connection:
        generations.add(connection, [called(1, range(5000))])
        for table in (tables.generations, tables.choices, tables.blocks):
            connection.execute(table.delete())
    with database.writing() as connection:
        generations.add(connection, [called(2, range(5000))])

    assert [found.prompt_token_ids for found in store.generations()] == [array("i", range(5000))]


def test_prompt_whose_block_is_missing_is_unknown_and_logged(
    store: Store, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    store.add([called(1, range(5000)), called(2, range(10))])
    with database.writing() as connection:
        connection.execute(tables.blocks.delete().where(tables.blocks.c.depth == 3))

    assert [found.prompt_token_ids for found in store.generations()] == [None, array("i", range(10))]
    assert "the store is damaged: block " in caplog.text


def test_content_that_continues_an_unknown_block_is_refused(database: Database) -> None:
    name = b"sixteen bytes..."

    with database.writing() as connection, pytest.raises(Lacking) as refused:
        blocks.add(connection, IDS, [Chain(b"", after=name)])

    assert refused.value.names == {name}


def test_content_may_continue_one_of_the_same_batch(database: Database) -> None:
    whole = IDS.cut(array("i", range(4 * FIRST_IDS)).tobytes())
    middle = len(whole.names) // 2
    first = Chain(b"", whole.blocks[:middle], whole.names[:middle])
    second = Chain(b"", whole.blocks[middle:], whole.names[middle:], whole.names[middle - 1])

    for _ in range(2):
        with database.writing() as connection:
            stored = blocks.add(connection, IDS, [first, second])
            read = blocks.contents(connection, IDS, [stored[1].key])

        assert read == {stored[1].key: b"".join(whole.blocks)}
        assert [each.depth for each in stored] == [middle, len(whole.names)]


def test_ids_and_a_text_of_the_same_bytes_are_told_apart(store: Store) -> None:
    text = "abcd" * 3000
    ids = array("i", text.encode())

    store.add([generation(1, prompt_token_ids=ids, prompt_text=text)])

    (found,) = store.generations()
    assert (found.prompt_token_ids, found.prompt_text) == (ids, text)


@settings(UNHURRIED, max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3 * FIRST_IDS), st.lists(st.integers(0, 9), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 8),
)
def test_any_prompts_in_any_batches_are_read_as_they_came(drawn: list[Any], at_once: int) -> None:
    """Draw prompts that share beginnings of any length, and end differently."""
    kept = [called(n, [*range(kind % 2, kind % 2 + length), *end]) for n, (kind, length, end) in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as folder, open_store(f"{folder}/store.db") as store:
        for first in range(0, len(kept), at_once):
            store.add(kept[first : first + at_once])

        assert [*store.generations()] == kept


def test_recent_keeps_what_is_used() -> None:
    recent = Recent(blocks=2)
    for number in range(4):
        recent.put(bytes([number]), number)
        recent.get(b"\0")

    assert recent.get(b"\0") == 0
    assert recent.get(b"\3") == 3
    assert recent.get(b"\1") is None


def test_file_of_the_former_schema_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    whole = called(1, range(5000), "a" * 9000)
    with open_store(str(path)) as store:
        store.add([called(1, range(10), "a")])
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in back_to_version(2, str(path)):
            connection.execute(statement)
        values = array("i", range(5000)).tobytes(), "a" * 9000
        connection.execute("UPDATE generations SET prompt_tokens = 5000, prompt_token_ids = ?, prompt_text = ?", values)

    with open_store(str(path)) as store:
        store.add([called(2, range(5000), "a" * 9000)])

        first, second = store.generations()
    assert (first.prompt_token_ids, first.prompt_text) == (whole.prompt_token_ids, whole.prompt_text)
    assert (second.prompt_token_ids, second.prompt_text) == (whole.prompt_token_ids, whole.prompt_text)


def test_contents_of_a_conversation_are_cut_as_if_each_came_alone() -> None:
    recent = Recent(length=100_000)
    texts = ["a" * length + "b" * more for length in range(0, 12_000, 1500) for more in (0, 3000)]
    for place, text in enumerate(texts * 2):
        chain, alone = recent.cut(TEXTS, text, place % 3), TEXTS.cut(text)

        assert (chain.names, chain.rest, [*chain.blocks]) == (alone.names, alone.rest, [*alone.blocks])


def test_text_whose_blocks_are_not_text_is_read_without_an_error(
    store: Store, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    store.add([called(1, range(5000), "a" * 5000), called(2, range(10))])
    with database.writing() as connection:
        connection.execute(tables.blocks.update().values(body=b"neither"))

    assert [found.prompt_text for found in store.generations()] == [None, None]
    assert "cannot be read" in caplog.text
