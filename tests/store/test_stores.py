"""Tests of generations and losses that every kind of store passes."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentlightning.errors import InvalidRecord
from agentlightning.generation import Choice, Generation, Loss
from agentlightning.store import Store, open_database, open_store
from tests.common.generations import EMPTY, FULL, HOSTILE, SECOND, START, generation
from tests.store.conftest import EVERY_KIND, back_to_version, new_store_of

pytestmark = pytest.mark.tier("check")

TEXTS = ("rollout_id", "attempt_id", "session_id", "response_id", "model", "agent_id", "parent_agent_id", "purpose")


@pytest.fixture(scope="session", params=EVERY_KIND)
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def ids(store: Store, **filters: Any) -> list[str]:
    return [found.id for found in store.generations(**filters)]


@pytest.mark.parametrize("kept", [FULL, EMPTY], ids=["everything known", "nothing known"])
def test_generation_round_trips(store: Store, url: str, kept: Generation) -> None:
    assert store.add([kept]) == 1

    with open_store(url) as another:
        assert [*store.generations()] == [*another.generations()] == [kept]


def test_generation_of_a_million_ids_round_trips(store: Store) -> None:
    kept = generation(1, prompt=1_000_000, output=131_072, prompt_text="a" * 4_000_000)

    store.add([kept])

    assert [*store.generations()] == [kept]


def test_generations_are_read_without_what_there_is_for_each_id(store: Store) -> None:
    store.add([FULL])

    [found] = store.generations(details=False)

    details = dict.fromkeys(("logprobs", "routed_experts", "sampling_mask", "top_logprobs"))
    assert any(getattr(FULL.choices[0], name) is not None for name in details)
    assert found == replace(FULL, prompt_logprobs=None, choices=[replace(each, **details) for each in FULL.choices])


def test_choices_are_read_with_their_generation_in_order(store: Store) -> None:
    kept = [
        generation(number, choices=[Choice(index=i, token_ids=array("i", [number, i])) for i in range(number)])
        for number in range(200)
    ]

    store.add(kept)

    assert [*store.generations()] == kept


def test_half_a_surrogate_pair_becomes_a_question_mark(store: Store) -> None:
    store.add([generation(1, prompt_text="a\ud800b", rollout_id="r\udfff")])

    (found,) = store.generations()
    assert (found.prompt_text, found.rollout_id) == ("a?b", "r?")


def test_generations_are_read_in_the_order_in_which_they_finished(store: Store) -> None:
    kept = [generation(number) for number in range(300)]
    # Three that finished at the same time are read in the order in which they were written.
    for same in kept[100:103]:
        same.finished_at = kept[100].finished_at
    for start in (200, 100, 0):
        store.add(kept[start : start + 100])

    assert [*store.generations()] == kept
    assert ids(store, rollout_id="rollout-20") == [found.id for found in kept[200:210]]


@pytest.mark.parametrize(("name", "value"), [("via", "nope"), ("status", "asleep")])
def test_filter_with_a_value_that_no_generation_has_is_refused(store: Store, name: str, value: str) -> None:
    filters: Any = {name: value}

    for read in (store.generations, store.tally):
        with pytest.raises(InvalidRecord, match=name):
            list(read(**filters))


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        ({}, range(30)),
        ({"rollout_id": "rollout-1"}, range(10, 20)),
        ({"rollout_id": "rollout"}, ()),
        ({"rollout_id": None}, (25,)),
        ({"attempt_id": "attempt-2"}, range(20, 30)),
        ({"attempt_id": "attempt-1", "rollout_id": "rollout-2"}, ()),
        ({"session_id": "a session"}, (3, 4)),
        ({"response_id": "chatcmpl-00000000000000000000000000000005"}, (5,)),
        ({"response_id": "CHATCMPL-00000000000000000000000000000005"}, ()),
        ({"call_id": "01a20c2a-865d-7b56-9503-9601311bea6e"}, (6, 7)),
        ({"call_id": "01A20C2A-865D-7B56-9503-9601311BEA6E"}, ()),
        ({"call_id": "no UUID"}, ()),
        ({"model": "another model"}, (8,)),
        ({"model": "another model", "rollout_id": "rollout-1"}, ()),
        ({"status": "aborted"}, (9, 10)),
        ({"agent_id": "an agent"}, (11, 12)),
        ({"agent_id": "an agent", "purpose": "title"}, (12,)),
        ({"parent_agent_id": "its parent"}, (11,)),
        ({"purpose": None, "rollout_id": "rollout-1"}, (10, 11, *range(13, 20))),
        ({"retry": 0}, (13,)),
        ({"retry": 2}, (14,)),
        ({"via": "router"}, (15,)),
        ({"via": "process"}, ()),
        ({"via": None, "rollout_id": "rollout-1"}, (*range(10, 15), *range(16, 20))),
        ({"status": "aborted", "rollout_id": "rollout-1"}, (10,)),
        ({"since": START + 28 * SECOND}, (28, 29)),
        ({"until": START + 2 * SECOND}, (0, 1)),
        ({"since": START + 5 * SECOND, "until": START + 6 * SECOND, "rollout_id": "rollout-0"}, (5,)),
        ({"since": START + 6 * SECOND, "until": START + 6 * SECOND}, ()),
    ],
)
def test_filters_select_generations_that_match_all_of_them(
    store: Store, filters: dict[str, Any], numbers: range | tuple[int, ...]
) -> None:
    kept = [generation(number) for number in range(30)]
    kept[25].rollout_id = None
    kept[3].session_id = kept[4].session_id = "a session"
    kept[6].call_id = kept[7].call_id = "01a20c2a-865d-7b56-9503-9601311bea6e"
    kept[8].model = "another model"
    kept[9].status = kept[10].status = "aborted"
    kept[11].agent_id = kept[12].agent_id = "an agent"
    kept[11].parent_agent_id, kept[12].purpose = "its parent", "title"
    kept[13].retry, kept[14].retry, kept[15].via = 0, 2, "router"
    store.add(kept)
    if filters.get("rollout_id") is None:
        wanted = [kept[number].id for number in numbers]
    else:
        wanted = [kept[number].id for number in numbers if kept[number].rollout_id is not None]

    assert ids(store, **filters) == wanted
    assert sum(store.tally(**filters).values()) == len(wanted)


def test_tally_counts_generations_by_status(store: Store) -> None:
    assert store.tally() == {"finished": 0, "aborted": 0, "error": 0}

    store.add([generation(1), generation(2), generation(3, status="aborted")])

    assert store.tally() == {"finished": 2, "aborted": 1, "error": 0}


def test_unknown_filter_is_an_error(store: Store) -> None:
    store.add([generation(1)])

    with pytest.raises(KeyError, match="rollout"):
        ids(store, rollout="rollout-0")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_ids_are_stored_and_found(store: Store, text: str) -> None:
    names = dict.fromkeys((*TEXTS, "request_id"), text)
    kept, other = generation(1, **names), generation(2)
    store.add([kept, other])

    for name in TEXTS:
        assert ids(store, **{name: text}) == [kept.id]
    # An empty attempt id is the same as none.
    assert [*store.generations()] == [replace(kept, attempt_id=text or None), other]


def test_store_of_the_former_version_is_read_and_goes_on(store: Store, url: str) -> None:
    if url.startswith("http"):
        pytest.skip("a server's database is one of the other two")
    caller: dict[str, Any] = {"agent_id": "a", "parent_agent_id": "p", "purpose": "title", "retry": 1, "via": "http"}
    old, new = generation(1), generation(2, **caller)
    store.add([generation(1, id=old.id, call_id=old.call_id, **caller)])
    with closing(open_database(url)) as database, database.writing() as connection:
        for statement in back_to_version(3, url):
            connection.exec_driver_sql(statement)

    with open_store(url) as migrated:
        migrated.add([new])

        assert [*migrated.generations()] == [old, new]
        assert [*migrated.generations(purpose=None)] == [old]


def test_store_of_version_4_is_read_and_goes_on(store: Store, url: str) -> None:
    if url.startswith("http"):
        pytest.skip("a server's database is one of the other two")
    old, new = generation(1), replace(FULL, id=generation(2).id)
    store.add([old])
    with closing(open_database(url)) as database, database.writing() as connection:
        for statement in back_to_version(4, url):
            connection.exec_driver_sql(statement)

    with open_store(url) as migrated:
        migrated.add([new])

        found = {each.id: each for each in migrated.generations()}
        assert found[old.id] == old
        assert found[new.id].choices[0].sampling_mask == FULL.choices[0].sampling_mask
        assert found[new.id].prompt_logprobs == FULL.prompt_logprobs
        assert found[new.id].requested_params == FULL.requested_params


def test_add_twice_stores_once(store: Store) -> None:
    kept = [generation(number) for number in range(1_200)]

    assert store.add(kept[:700]) == 700
    assert store.add(kept[:700]) == 0
    assert store.add([*kept[600:], *kept[600:]]) == 500

    assert [*store.generations()] == kept


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"id": "no-uuid"}, "'no-uuid' is not a lower-case UUID"),
        ({"id": "01A20C2A-865D-7B56-9503-9601311BEA6E"}, "is not a lower-case UUID"),
        ({"call_id": "x" * 32}, "is not a lower-case UUID"),
        # Without a reason: the message is Python's or the database's.
        ({"status": "asleep"}, None),
        ({"finished_at": None}, None),
        ({"started_at": 2**63}, r"\w+ cannot store this number"),
        ({"started_at": 2**64}, None),
        ({"choices": [*FULL.choices, *FULL.choices]}, None),
    ],
)
def test_add_names_an_invalid_generation_and_stores_the_others(
    store: Store, bad: dict[str, Any], reason: str | None
) -> None:
    kept = [generation(number, rollout_id=f"rollout-{number}") for number in range(1, 8)]
    wrong = generation(8, **{"rollout_id": "wrong", **bad})

    with pytest.raises(InvalidRecord, match=reason) as refused:
        store.add([*kept[:5], wrong, *kept[5:]])

    assert [*refused.value.reasons] == [wrong.id]
    assert str(refused.value).startswith(f"{wrong.id}: ")
    assert refused.value.new == 7
    assert [*store.generations()] == kept
    # The rolled back key of the refused one's rollout is not used for another text.
    later = [generation(9, rollout_id="second"), generation(10, rollout_id="wrong")]
    store.add(later)
    assert [*store.generations()] == [*kept, *later]
    assert store.add(kept) == 0


def test_add_of_many_invalid_generations_names_a_few(store: Store) -> None:
    kept = generation(1)

    with pytest.raises(InvalidRecord, match=r"^0: .*; 1: .*; 2: .*; and 297 more$") as refused:
        store.add([*(generation(2, id=str(number)) for number in range(300)), kept])

    assert len(refused.value.reasons) == 300
    assert [*store.generations()] == [kept]


def test_numbers_beyond_32_bits_round_trip(store: Store) -> None:
    large = 2**31
    kept = generation(1, cached_tokens=large, choices=[Choice(index=2 * large), Choice(index=4 * large)])
    loss = Loss(count=large, reason="queue full", first_at=START, last_at=START, host="host", pid=2 * large)

    store.add([kept])
    store.add_losses([loss])

    assert [*store.generations()] == [kept]
    assert [*store.losses()] == [loss]


def test_texts_that_databases_cannot_distinguish_become_one(store: Store) -> None:
    store.add([generation(1, rollout_id="a\ud800", session_id="a?")])

    [found] = store.generations()
    assert (found.rollout_id, found.session_id) == ("a?", "a?")


def test_add_losses_twice_stores_once(store: Store) -> None:
    losses = [
        Loss(count=number, reason="queue full", first_at=START, last_at=START + number, host="host", pid=7)
        for number in range(1, 4)
    ]

    store.add_losses(losses[:2])
    store.add_losses(losses)

    assert [*store.losses()] == losses
