"""The drift of rollouts, in stores of every kind."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentlightning.drift import AttemptDrift
from agentlightning.errors import NotFound
from agentlightning.generation import Generation
from agentlightning.sender import Sender, Vocabulary
from agentlightning.store import Store, drift, drift_index, open_database, rollout_list, summaries
from agentlightning.store.database import Database
from agentlightning.store.rollout_list import ListQuery
from tests.common.generations import START
from tests.drift.conversations import TEMPLATE, call_of, conversation, record
from tests.drift.templates import Message
from tests.store.conftest import EVERY_KIND, back_to_version, new_store_of

pytestmark = pytest.mark.tier("check")

SECOND = 10**9


@pytest.fixture(scope="session", params=EVERY_KIND)
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def test_attempts_follow_one_another_with_their_breaks(store: Store) -> None:
    record(store, *conversation("whole", "It is."), *conversation("broken/größe", "It is.\n\n", 3, "other"))

    whole, broken = store.drift()

    assert (whole.rollout_id, whole.attempt_id, whole.calls, whole.breaks) == ("whole", "a", 2, [])
    assert (broken.rollout_id, broken.calls, broken.cached) == ("broken/größe", 2, 16)
    [found] = broken.breaks
    assert (found.cause, found.is_certain, found.message, found.role) == ("answer_end", True, 2, "assistant")
    assert any(each.differs and each.text == "\n" for each in found.before)
    assert (
        [*store.drift("broken/größe", "a")]
        == [*store.drift(model="other")]
        == [*store.drift(after="whole")]
        == [broken]
    )
    assert [*store.drift("none")] == [*store.drift(model="none")] == []
    with pytest.raises(NotFound):
        list(store.drift(after="none"))


def test_a_vocabulary_that_changes_within_a_rollout_is_compared_as_text(store: Store, url: str) -> None:
    first, second = conversation("r", "It is.")
    record(store, first)
    larger = Vocabulary([*TEMPLATE.vocabulary.tokens, "more"], TEMPLATE.vocabulary.special)
    other = Sender(host="h", pid=2, started_at=START, version="1", vocabulary=larger)
    store.register_sender(other)
    second.prompt_token_ids = array("i", TEMPLATE.retokenised(list(second.prompt_token_ids or ()), _First()))
    store.add([second], other.id)

    [attempt] = store.drift("r")

    assert [each.cause for each in attempt.breaks] == ["retokenised"]


class _First:
    def choice(self, some: Sequence[int]) -> int:
        return some[0]


@pytest.fixture
def served(url: str, store: Store) -> Iterator[Database]:
    """Open the database as a server does, which a store over HTTP has for itself."""
    if url.startswith("http"):
        pytest.skip("the index is in the database")
    database = open_database(url)
    yield database
    database.close()


def looked(database: Database) -> Sequence[str]:
    """Compare what is new, as a server does once somebody looks; returns the ids of the rollouts."""
    with database.reading() as connection:
        found = drift_index.changed(connection)
    for rollout_id in found.rollouts:
        put(database, *compared(database, rollout_id))
    if found.seen is not None:
        with database.writing() as connection:
            drift_index.has_compared(connection, found.seen)
    return found.rollouts


def compared(database: Database, rollout_id: str) -> tuple[str, int, list[AttemptDrift]]:
    with database.reading() as connection:
        calls = drift_index.state_of(connection, rollout_id).calls
        return rollout_id, calls, [*drift.analyse_all(drift.read(connection, rollout_id))]


def put(database: Database, rollout_id: str, calls: int, attempts: Sequence[AttemptDrift] | None) -> None:
    with database.writing() as connection:
        drift_index.put(connection, rollout_id, calls, attempts)


def totals(database: Database) -> dict[str, int]:
    with database.reading() as connection:
        return {name: count for name, count in drift_index.totals(connection).items() if count}


def breaks(database: Database, **wanted: Any) -> dict[str, int | None]:
    """Return the column of breaks, as the table of rollouts has it."""
    assert summaries.refresh(database)
    with database.reading() as connection:
        return {each.rollout_id: each.breaks for each in rollout_list.page(connection, ListQuery(**wanted)).rollouts}


def test_a_look_compares_what_is_new_and_the_totals_only_grow(store: Store, served: Database) -> None:
    record(store, *conversation("whole", "It is."), *conversation("broken", "It is.\n\n", 3))
    assert breaks(served) == {"whole": None, "broken": None}

    first = looked(served)
    after = totals(served)

    assert first == ["whole", "broken"]
    assert after["answer_end"] == 1
    assert breaks(served) == {"whole": 0, "broken": 1}
    assert breaks(served, ranges={"breaks": (1, None)}) == {"broken": 1}
    assert looked(served) == []
    assert totals(served) == after

    assert store.delete_rollouts(["broken"]) == 1
    assert breaks(served) == {"whole": 0}
    record(store, *conversation("again", "It is.\n\n", 5))
    assert looked(served) == ["again"]
    assert totals(served)["answer_end"] == 2


def test_repeated_reads_count_the_same_sampled_ids(store: Store, served: Database) -> None:
    """An answer is kept until the next call has lost it, and an edited history may keep it again."""
    calls = _alternating("often", 10, 1), _alternating("once", 10, 101)
    for call in calls[0]:
        record(store, call)
        looked(served)
    often = totals(served)
    assert store.delete_rollouts(["often"]) == 1

    record(store, *calls[1])
    looked(served)

    once = totals(served)
    assert (once["kept"], once["lost"]) == (often["kept"], often["lost"])
    assert once["kept"] + once["lost"] == sum(len(each.choices[0].token_ids or ()) for each in calls[1])


def _alternating(rollout: str, count: int, first: int) -> list[Generation]:
    """Make calls of one rollout, of which every other history has other white space than the answer."""
    messages: list[Message] = [{"role": "user", "content": "Is it cold?"}]
    found: list[Generation] = []
    for number in range(count):
        answer = f"It is {number}." + "\n" * (number % 2)
        found.append(call_of(rollout, first + number, TEMPLATE.prompt(messages), answer, "m"))
        said = {"role": "assistant", "content": f"It is {number}.", "tool_calls": []}
        messages += [said, {"role": "user", "content": "And then?"}]
    return found


def test_two_looks_at_once_count_a_break_once(store: Store, served: Database) -> None:
    calls = _alternating("r", 3, 1)
    record(store, *calls[:2])
    early = compared(served, "r")
    record(store, calls[2])
    late = compared(served, "r")

    for each in (late, early, late):
        put(served, *each)
    looked(served)

    assert totals(served)["answer_end"] == 1
    assert breaks(served) == {"r": 1}


def test_what_is_deleted_while_it_is_compared_leaves_nothing(store: Store, served: Database) -> None:
    record(store, *conversation("gone", "It is.\n\n"))
    found = compared(served, "gone")
    assert store.delete_rollouts(["gone"]) == 1

    put(served, *found)

    with served.reading() as connection:
        assert drift_index.counts(connection, START, START + 10 * SECOND, 5)[0] == []
    assert totals(served) == {}


def test_a_rollout_that_cannot_be_compared_is_noted_as_such_and_not_again(store: Store, served: Database) -> None:
    record(store, *conversation("damaged", "It is.\n\n"))
    put(served, "damaged", 2, None)

    assert looked(served) == []
    assert breaks(served) == {"damaged": None}


def test_a_rollout_with_more_calls_is_compared_anew_and_counted_once(store: Store, served: Database) -> None:
    first, second = conversation("r", "It is.\n\n")
    record(store, first)
    looked(served)
    assert breaks(served) == {"r": 0}

    record(store, second)
    looked(served)

    assert breaks(served) == {"r": 1}
    assert totals(served)["answer_end"] == 1


def test_causes_are_counted_by_time_and_model(store: Store, served: Database) -> None:
    record(store, *conversation("one", "It is.\n\n"), *conversation("other", "It is.\n\n", 3, "other"))
    looked(served)

    with served.reading() as connection:
        [found], names = drift_index.counts(connection, START, START + 10 * SECOND, 5)
        [others], _ = drift_index.counts(connection, START, START + 10 * SECOND, 5, model="other")
        assert drift_index.counts(connection, START, START + SECOND, 5)[0] == []

    assert (found.cause, found.count, found.certain, found.bars, found.latest) == (
        "answer_end",
        2,
        2,
        [0, 1, 1, 0, 0],
        "other",
    )
    assert (others.count, others.bars, names) == (1, [0, 0, 1, 0, 0], {"model": ["m", "other"], "agent_id": []})


def test_tables_of_an_older_version_get_the_index(store: Store, served: Database, url: str) -> None:
    record(store, *conversation("broken", "It is.\n\n"))
    with served.writing() as connection:
        for statement in back_to_version(3, url):
            connection.exec_driver_sql(statement)
    served.close()

    migrated = open_database(url)
    looked(migrated)

    assert breaks(migrated) == {"broken": 1}
    migrated.close()
