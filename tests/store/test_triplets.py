"""Tests of triplets: which calls belong to a rollout, in which order, and with which rewards."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from agentlightning.generation import Choice, Generation, new_id
from agentlightning.store import Store, attributes, open_database, open_store, spans, triplets
from agentlightning.store.database import Database
from agentlightning.triplet import Triplet
from tests.common.generations import HOSTILE, SECOND, START, generation

pytestmark = pytest.mark.tier("check")

HOUR = 3600 * SECOND

# All examples share one database; each uses a new rollout.
UNHURRIED: Any = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def call(number: int, **fields: Any) -> Generation:
    """Make call N, answered as `answer-N`, of the attempt `a` of the rollout `r`."""
    usual: dict[str, Any] = {"rollout_id": "r", "attempt_id": "a", "response_id": f"answer-{number}"}
    return generation(number, **usual | fields)


def a_span(
    number: int,
    attrs: dict[str, Any],
    name: str = "openai.chat.completion",
    at: float | None = None,
    rollout_id: str = "r",
    attempt_id: str = "a",
) -> spans.NewSpan:
    """Make span N, which ended when call N did, or `at` seconds after the start."""
    moment = START / SECOND + (number if at is None else at)
    return spans.NewSpan(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=number,
        trace_id="0" * 32,
        span_id=f"span-{number}",
        parent_id=None,
        name=name,
        start_time=moment,
        end_time=moment,
        response_id=attributes.response_id(attrs),
        reward=attributes.reward(name, attrs),
        body=json.dumps({"attributes": attrs}).encode(),
    )


def of_call(number: int, answer: int | None = None, **fields: Any) -> spans.NewSpan:
    """Make the span of a call, which names its answer."""
    return a_span(number, {"gen_ai.response.id": f"answer-{number if answer is None else answer}"}, **fields)


def of_reward(number: int, value: float, attrs: dict[str, Any] | None = None, **fields: Any) -> spans.NewSpan:
    """Make the span of a reward as `emit_reward` of 0.3 does, with further attributes."""
    reward = {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": value}
    return a_span(number, reward | (attrs or {}), "agentlightning.annotation", **fields)


def linked(key: str, value: str) -> dict[str, Any]:
    """Make the attributes of a link as `make_link_attributes` of 0.3 does."""
    return {"agentlightning.link.0.key_match": key, "agentlightning.link.0.value_match": value}


def of_generation(generation_id: str) -> dict[str, Any]:
    return {"agentlightning.generation_id": generation_id}


def keep(database: Database, *new: Any) -> None:
    database.write(lambda connection: spans.add(connection, new))


def answers(found: Iterator[Triplet]) -> list[str | None]:
    return [each.response_id for each in found]


def joined(found: Iterator[Triplet]) -> list[tuple[int, str | None, float | None]]:
    """Return, for each triplet, the number of the call, the span and the reward."""
    return [((each.prompt_token_ids or [0])[0], each.span_id, each.reward) for each in found]


def rewards(found: Iterator[Triplet]) -> list[float | None]:
    return [each.reward for each in found]


def named(*numbers: int) -> list[str]:
    return [f"answer-{number}" for number in numbers]


def test_triplet_has_the_ids_of_its_call_and_the_reward(store: Store, database: Database) -> None:
    versions = [("v1", 0, 2), ("v2", 2, 5)]
    choice = Choice(token_ids=array("i", [7, 8]), logprobs=array("f", [-0.5, -1.5]), weight_versions=versions)
    caller: dict[str, Any] = {"agent_id": "child", "parent_agent_id": "main", "purpose": "review", "retry": 1}
    kept = call(1, choices=[choice], prompt_text="long", model="größe", **caller)
    store.add([kept])
    keep(database, of_call(1), of_reward(2, 0.5))

    assert [*store.triplets("r")] == [
        Triplet(
            generation_id=kept.id,
            response_id="answer-1",
            rollout_id="r",
            attempt_id="a",
            **caller,
            index=0,
            status="finished",
            finish_reason=None,
            model="größe",
            prompt_token_ids=kept.prompt_token_ids,
            response_token_ids=array("i", [7, 8]),
            logprobs=array("f", [-0.5, -1.5]),
            reward=0.5,
            span_id="span-1",
            weight_versions=versions,
        )
    ]


def test_triplets_of_an_agent_or_a_purpose_are_selected(store: Store) -> None:
    callers: list[dict[str, Any]] = [
        {},
        {"agent_id": "child", "parent_agent_id": "main", "purpose": "review"},
        {"agent_id": "child", "retry": 2},
    ]
    store.add([call(number, **caller) for number, caller in enumerate(callers, 1)])

    def found(**filters: Any) -> list[str | None]:
        return [each.response_id for each in store.triplets("r", **filters)]

    assert found(agent_id="child") == named(2, 3)
    assert found(parent_agent_id="main") == found(purpose="review", agent_id="child") == named(2)
    assert found(retry=2) == named(3)
    assert found(agent_id="another") == found(retry=0) == []


def test_none_selects_those_that_say_nothing_of_their_caller_everywhere(store: Store) -> None:
    prompts = {number: array("i", [number]) for number in (1, 2, 3)}
    callers: list[dict[str, Any]] = [{}, {"agent_id": "child", "purpose": "review"}, {"agent_id": "child", "retry": 2}]
    answer = [Choice(token_ids=array("i", [7]))]
    store.add(
        [
            call(number, choices=answer, prompt_token_ids=prompts[number], **caller)
            for number, caller in enumerate(callers, 1)
        ]
    )
    filters: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [1, 2, 3]),
        ({"agent_id": None}, [1]),
        ({"purpose": None}, [1, 3]),
        ({"agent_id": "child", "retry": None}, [2]),
    ]
    for each, numbers in filters:
        assert [found.response_id for found in store.generations(**each)] == named(*numbers)
        assert [found.response_id for found in store.triplets("r", **each)] == named(*numbers)
        rows = store.trajectories("r", **each)
        assert sorted(row.token_ids[0] for row in rows) == numbers


def test_triplet_round_trips_through_json(store: Store) -> None:
    choice = Choice(token_ids=array("i", [7]), logprobs=array("f", [-0.1]), weight_versions=[("v1", 0, 1)])
    store.add([call(1, choices=[choice]), call(2, choices=[], prompt_token_ids=None)])
    found = [*store.triplets("r")]

    assert [Triplet.from_dict(json.loads(json.dumps(each.as_dict()))) for each in found] == found


def test_calls_without_spans_are_in_the_order_in_which_they_finished(store: Store) -> None:
    numbers = list(range(50))
    random.Random(1).shuffle(numbers)
    store.add([call(number) for number in numbers])

    assert answers(store.triplets("r")) == named(*range(50))


@pytest.mark.parametrize("spans_first", [True, False])
def test_calls_with_spans_are_in_the_order_of_spans_despite_skewed_clocks(
    store: Store, database: Database, spans_first: bool
) -> None:
    # Two servers take turns to answer one agent; the clock of one is an hour behind.
    calls = [call(n, finished_at=START + n * SECOND - (HOUR if n % 2 else 0)) for n in range(50)]
    new = [of_call(n) for n in range(50)]
    random.Random(1).shuffle(new)
    if spans_first:
        keep(database, *new)
    store.add(calls)
    if not spans_first:
        keep(database, *new)

    assert answers(store.triplets("r")) == named(*range(50))


def test_spans_of_several_hosts_are_in_the_order_of_their_numbers(store: Store, database: Database) -> None:
    store.add([call(n) for n in range(4)])
    keep(database, *(of_call(n, at=n - (3600 if n % 2 else 0)) for n in range(4)))

    assert answers(store.triplets("r")) == named(0, 1, 2, 3)


def test_call_without_a_span_follows_the_last_that_finished_before_it(store: Store, database: Database) -> None:
    store.add([call(n) for n in range(7)])
    # The spans say 4, 2, 5.
    keep(database, of_call(1, answer=4), of_call(2, answer=2), of_call(3, answer=5))

    assert answers(store.triplets("r")) == named(0, 1, 4, 2, 3, 5, 6)


def test_call_whose_answer_a_span_names_belongs_to_the_rollout(store: Store, database: Database) -> None:
    store.add([call(1, rollout_id=None, attempt_id=None), call(2, rollout_id="another", attempt_id="b"), call(3)])
    keep(database, of_call(2), of_call(3, answer=1))

    found = [*store.triplets("r")]
    assert answers(iter(found)) == named(2, 1, 3)
    assert {(each.rollout_id, each.attempt_id) for each in found} == {("r", "a")}
    assert answers(store.triplets("another")) == named(2)


def test_call_named_by_several_spans_is_listed_once(store: Store, database: Database) -> None:
    store.add([call(1), call(2)])
    keep(database, of_call(5, answer=2), of_call(6, answer=1), of_call(7, answer=2))

    assert [(each.response_id, each.span_id) for each in store.triplets("r")] == [
        ("answer-2", "span-5"),
        ("answer-1", "span-6"),
    ]


def test_generations_of_one_answer_stay_together(store: Store, database: Database) -> None:
    of_one = {"response_id": "answer-1", "call_id": new_id()}
    store.add([call(1, **of_one), call(2, **of_one), call(3), call(4, **of_one)])
    keep(database, of_call(1, answer=3), of_call(2, answer=1), of_reward(3, 1.0))

    found = [*store.triplets("r")]
    assert answers(iter(found)) == named(3, 1, 1, 1)
    assert [each.prompt_token_ids[0] for each in found if each.prompt_token_ids] == [3, 1, 2, 4]
    # The reward is for the result of the tool loop.
    assert rewards(iter(found)) == [None, None, None, 1.0]


def test_generations_of_one_call_without_an_answer_stay_together(store: Store) -> None:
    of_one = {"response_id": None, "call_id": new_id()}
    store.add([call(1, **of_one), call(2), call(3, **of_one)])

    assert [number for number, _, _ in joined(store.triplets("r"))] == [2, 1, 3]


@pytest.mark.parametrize("call_id", ["its own", None])
def test_calls_that_share_a_response_id_each_have_their_span_and_reward(
    store: Store, database: Database, call_id: str | None
) -> None:
    # vLLM answers so if a client sends the same X-Request-Id with all of its calls.
    known = {} if call_id else {"call_id": None}
    store.add([call(number, response_id="same", **known) for number in (2, 1, 3)])
    for number in (1, 2, 3):
        attrs = {"gen_ai.response.id": "same"}
        keep(database, a_span(2 * number, attrs, at=number), of_reward(2 * number + 1, number / 4, at=number + 0.5))

    expected = [(1, "span-2", 0.25), (2, "span-4", 0.5), (3, "span-6", 0.75)]
    assert joined(store.triplets("r")) == joined(store.triplets("r", "a")) == expected


def test_generations_stay_together_where_calls_share_a_response_id(store: Store, database: Database) -> None:
    first, second = {"call_id": new_id(), "response_id": "same"}, {"call_id": new_id(), "response_id": "same"}
    store.add([call(1, **first), call(2, **second), call(3, **first), call(4, **second)])
    attrs = {"gen_ai.response.id": "same"}
    keep(database, a_span(1, attrs), a_span(2, attrs), of_reward(3, 1.0, linked("span_id", "span-1")))

    expected = [(1, "span-1", None), (3, "span-1", 1.0), (2, "span-2", None), (4, "span-2", None)]
    assert joined(store.triplets("r")) == expected


@pytest.mark.parametrize("how_many", [1, 3])
def test_shared_response_id_with_unequal_numbers_of_spans_and_calls_joins_none(
    store: Store, database: Database, how_many: int
) -> None:
    store.add([call(1, response_id="same"), call(2, response_id="same")])
    keep(
        database,
        *(a_span(number, {"gen_ai.response.id": "same"}, at=number) for number in range(3, 3 + how_many)),
        of_reward(6, 0.5, linked("gen_ai.response.id", "same")),
        of_reward(7, 0.5, linked("span_id", "span-3")),
    )

    assert joined(store.triplets("r")) == [(1, None, None), (2, None, None)]


def test_lost_call_of_a_shared_response_id_leaves_its_reward_to_no_other(store: Store, database: Database) -> None:
    store.add([call(1, response_id="same"), call(3, response_id="same")])
    for number in (1, 2, 3):
        attrs = {"gen_ai.response.id": "same"}
        keep(database, a_span(2 * number, attrs, at=number + 0.25), of_reward(2 * number + 1, 0.5, at=number + 0.5))

    assert joined(store.triplets("r")) == [(1, None, None), (3, None, None)]


def test_reward_linked_to_a_shared_response_id_is_left_out(store: Store, database: Database) -> None:
    store.add([call(1, response_id="same"), call(2, response_id="same")])
    attrs = {"gen_ai.response.id": "same"}
    keep(database, a_span(1, attrs), a_span(2, attrs), of_reward(3, 0.5, linked("gen_ai.response.id", "same")))

    assert joined(store.triplets("r")) == [(1, "span-1", None), (2, "span-2", None)]


def test_shared_response_id_joins_no_call_of_another_rollout(store: Store, database: Database) -> None:
    store.add([call(1, response_id="same"), call(2, response_id="same", rollout_id="another")])
    store.add([call(3, response_id="same", rollout_id=None, attempt_id=None)])
    link = linked("gen_ai.response.id", "same")
    for rollout_id in ("r", "another", "without calls"):
        keep(database, a_span(1, {"gen_ai.response.id": "same"}, rollout_id=rollout_id))
        keep(database, of_reward(2, 0.5, link, rollout_id=rollout_id))

    assert joined(store.triplets("r")) == [(1, "span-1", 0.5)]
    assert joined(store.triplets("another")) == [(2, "span-1", 0.5)]
    assert joined(store.triplets("without calls")) == []
    assert {each.rollout_id for each in store.triplets()} == {"r", "another"}


def test_shared_response_id_joins_no_span_of_another_attempt(store: Store, database: Database) -> None:
    store.add([call(1, response_id="same"), call(2, response_id="same", attempt_id="b")])
    attrs = {"gen_ai.response.id": "same"}
    keep(database, a_span(3, attrs, attempt_id="b"), a_span(4, attrs))

    assert joined(store.triplets("r")) == [(1, None, None), (2, None, None)]
    assert joined(store.triplets("r", "a")) == [(1, "span-4", None)]
    assert joined(store.triplets("r", "b")) == [(2, "span-3", None)]


def test_of_responses_omits_ids_that_several_calls_share(store: Store, database: Database) -> None:
    of_one = {"response_id": "loop", "call_id": new_id()}
    store.add([call(1), call(2, response_id="same"), call(3, response_id="same", rollout_id="another")])
    store.add([call(4, **of_one), call(5, **of_one)])
    store.add([call(number, response_id="engine core", call_id=None) for number in (6, 7)])

    with database.reading() as connection:
        found = triplets.of_responses(connection, ["answer-1", "same", "loop", "engine core", "unknown"])
    assert {name: (each.prompt_token_ids or [0])[0] for name, each in found.items()} == {"answer-1": 1, "loop": 5}


MISSING: dict[str, tuple[Sequence[Any], list[float | None]]] = {
    "after each": (
        [of_call(1), of_reward(2, 0.1), of_call(3, 2), of_reward(4, 0.2), of_call(5, 3), of_reward(6, 0.3)],
        [0.1, 0.2, 0.3],
    ),
    "linked to the answer": (
        [of_call(1), of_call(2), of_call(3), of_reward(4, 0.2, linked("gen_ai.response.id", "answer-2"))],
        [None, 0.2, None],
    ),
    "linked to the span": (
        [of_call(1), of_call(2), of_call(3), of_reward(4, 0.2, linked("span_id", "span-2"))],
        [None, 0.2, None],
    ),
    "as the outcome": (
        [of_call(1), of_call(2), of_call(3), of_reward(4, 0.2, {"agentlightning.outcome": True})],
        [None, None, 0.2],
    ),
    "before all": ([of_reward(1, 0.2, at=0), of_call(2), of_call(3, 1), of_call(4, 3)], [None, None, None]),
    "after a call without a span": (
        [of_call(2), of_reward(3, 0.2, at=2.5), of_reward(4, 0.3, at=3.5)],
        [None, 0.2, 0.3],
    ),
    "after it, by a clock an hour behind": (
        [of_call(3), of_call(4, 2, at=-3600), of_reward(5, 0.2, at=-3600)],
        [None, 0.2, None],
    ),
}


@pytest.mark.parametrize(("new", "expected"), MISSING.values(), ids=MISSING)
def test_reward_of_a_missing_call_waits_for_it(
    store: Store, database: Database, new: Sequence[Any], expected: list[float | None]
) -> None:
    store.add([call(1), call(3)])
    keep(database, *new)
    rewarded = dict(zip((1, 2, 3), expected, strict=True))

    assert {number: reward for number, _, reward in joined(store.triplets("r"))} == {1: rewarded[1], 3: rewarded[3]}
    store.add([call(2)])
    assert {number: reward for number, _, reward in joined(store.triplets("r"))} == rewarded


def test_outcome_belongs_to_the_last_stored_call(store: Store, database: Database) -> None:
    """The last call may be to a judge model that is not recorded here and not trained."""
    store.add([call(1), call(2)])
    keep(database, of_call(1), of_call(2), of_call(3, answer=9), of_reward(4, 0.2, {"agentlightning.outcome": True}))

    assert joined(store.triplets("r")) == [(1, "span-1", None), (2, "span-2", 0.2)]


def test_each_choice_is_a_triplet_with_the_reward_of_its_call(store: Store, database: Database) -> None:
    several = [Choice(index=n, token_ids=array("i", [n])) for n in range(3)]
    store.add([call(1, choices=several), call(2)])
    keep(database, of_call(1), of_reward(2, 0.25), of_call(3, answer=2))

    found = [*store.triplets("r")]
    assert [(each.response_id, each.index, each.reward) for each in found] == [
        ("answer-1", 0, 0.25),
        ("answer-1", 1, 0.25),
        ("answer-1", 2, 0.25),
        ("answer-2", 0, None),
    ]
    assert [each.response_token_ids for each in found[:3]] == [array("i", [n]) for n in range(3)]


def test_aborted_and_failed_calls_are_listed_with_their_status(store: Store) -> None:
    store.add([call(1, status="aborted"), call(2, status="error", choices=[], prompt_token_ids=None), call(3)])

    found = [*store.triplets("r")]
    assert [each.status for each in found] == ["aborted", "error", "finished"]
    assert (found[1].index, found[1].prompt_token_ids, found[1].response_token_ids) == (0, None, None)


def test_triplets_of_an_attempt_have_its_calls_and_rewards(store: Store, database: Database) -> None:
    store.add([call(1), call(2, attempt_id="b"), call(3, attempt_id=None), call(4, attempt_id="b"), call(5)])
    keep(
        database,
        of_call(1),
        of_reward(2, 0.1),
        of_call(3, answer=2, attempt_id="b"),
        of_call(4, answer=3, attempt_id="b"),
        of_reward(5, 0.9, attempt_id="b"),
    )

    assert answers(store.triplets("r")) == named(1, 2, 3, 4, 5)
    assert rewards(store.triplets("r")) == [0.1, None, None, 0.9, None]
    assert [(each.response_id, each.reward) for each in store.triplets("r", "a")] == [
        ("answer-1", 0.1),
        ("answer-5", None),
    ]
    assert [each.attempt_id for each in store.triplets("r", "b")] == ["b", "b", "b"]
    assert answers(store.triplets("r", "b")) == named(2, 3, 4)


@pytest.mark.parametrize("rollout_id", HOSTILE.values(), ids=HOSTILE)
def test_triplets_of_a_hostile_rollout_id_are_found_alone(store: Store, rollout_id: str) -> None:
    store.add([call(1, rollout_id=rollout_id), call(2)])

    assert answers(store.triplets(rollout_id)) == named(1)
    assert answers(store.triplets(rollout_id, rollout_id)) == []
    assert answers(store.triplets()) == named(1, 2)


@pytest.mark.parametrize("name", ["a\ufdd0b", *(each for each in HOSTILE.values() if "\0" not in each and each)])
def test_spans_of_a_hostile_rollout_id_are_found(store: Store, database: Database, name: str) -> None:
    name = name[:512]
    store.add([call(1, rollout_id=None, attempt_id=None)])
    keep(database, of_call(1, rollout_id=name, attempt_id=name))

    assert answers(store.triplets(name)) == answers(store.triplets(name, name)) == named(1)


@pytest.mark.parametrize("response_id", [each for each in HOSTILE.values() if 0 < len(each) <= 512], ids=repr)
def test_hostile_response_id_is_joined(store: Store, database: Database, response_id: str) -> None:
    store.add([call(1, rollout_id=None, response_id=response_id), call(2, rollout_id=None)])
    keep(database, a_span(1, {"gen_ai.response.id": response_id}))

    assert answers(store.triplets("r")) == [response_id]


@pytest.mark.parametrize("response_id", ["", "x" * 513, 7, None, ["answer-1"], {"answer-1": 1}], ids=str)
def test_invalid_response_id_joins_nothing(store: Store, database: Database, response_id: Any) -> None:
    store.add([call(1, rollout_id=None), call(2, rollout_id=None, response_id="")])
    keep(database, a_span(1, {"gen_ai.response.id": response_id}))

    assert [*store.triplets("r")] == []


def test_unknown_rollout_has_no_triplets(store: Store, database: Database) -> None:
    store.add([call(1)])
    keep(database, of_call(1, rollout_id="of an answer that is not there", answer=99))

    assert [*store.triplets("another")] == [*store.triplets("r", "another")] == []
    assert [*store.triplets("half a pair \ud800")] == [*store.triplets("r", "a NUL \0")] == []
    assert [*store.triplets("of an answer that is not there")] == []


def test_triplets_of_all_rollouts_are_in_the_order_of_arrival(store: Store, database: Database) -> None:
    store.add([call(n, rollout_id=("third", "first", "second", None)[n % 4], finished_at=n) for n in (9, 6, 5, 3, 4)])
    keep(database, of_call(1, rollout_id="joined", answer=3), of_call(2, rollout_id=None, attempt_id=None, answer=4))

    assert [(each.rollout_id, each.response_id) for each in store.triplets()] == [
        ("first", "answer-5"),
        ("first", "answer-9"),
        ("second", "answer-6"),
        ("joined", "answer-3"),
        ("third", "answer-4"),
    ]


REWARDS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "0.3": (
        "agentlightning.annotation",
        {"agentlightning.reward.0.name": "x", "agentlightning.reward.0.value": 1},
        1.0,
    ),
    "0.3, of two dimensions": (
        "agentlightning.annotation",
        {"agentlightning.reward.1.value": 3.0, "agentlightning.reward.0.value": 0.25},
        0.25,
    ),
    "0.3, by any name": ("grade", {"agentlightning.reward.0.value": -1.5}, -1.5),
    "0.2": ("agentlightning.reward", {"reward": 0.5}, 0.5),
    "0.2, as 0.3 reads it": ("agentlightning.annotation", {"reward": 0.5}, 0.5),
    "an operation of AgentOps": ("f", {"agentops.entity.output": '{"type": "reward", "value": 2.0}'}, 2.0),
    "a task of AgentOps": ("f", {"agentops.task.output": {"type": "reward", "value": 2.0}}, 2.0),
    "an operation without a reward": ("f", {"agentops.entity.output": '{"type": "reward", "value": null}'}, None),
    "an operation that returns a text": ("f", {"agentops.entity.output": '"reward"'}, None),
    "an operation that returns no JSON": ("f", {"agentops.entity.output": '{"reward"'}, None),
    "an operation that returns something deep": ("f", {"agentops.entity.output": '["reward",' + "[" * 100_000}, None),
    "a reward in an unknown format": ("grade", {"reward": 0.5}, None),
    "a text": ("agentlightning.reward", {"reward": "0.5"}, None),
    "not a number": ("agentlightning.annotation", {"agentlightning.reward.0.value": "NaN"}, None),
    "too large a number": ("agentlightning.reward", {"reward": 10**400}, None),
}


# How a reward is read is the same for both databases.
@pytest.mark.tier("all", new_store="postgresql")
@pytest.mark.parametrize(("name", "attrs", "expected"), REWARDS.values(), ids=REWARDS)
def test_reward_in_the_format_of_any_version_is_read(
    store: Store, database: Database, name: str, attrs: dict[str, Any], expected: float | None
) -> None:
    store.add([call(1)])
    keep(database, of_call(1), a_span(2, attrs, name))

    assert rewards(store.triplets("r")) == [expected]


STEPS: dict[str, tuple[Sequence[Any], list[float | None]]] = {
    "after each": ([of_call(1), of_reward(2, 0.1), of_call(3, 2), of_reward(4, 0.2)], [0.1, 0.2]),
    "at the end": ([of_call(1), of_call(3, 2), of_reward(4, 0.2)], [None, 0.2]),
    "after the first": ([of_call(1), of_reward(2, 0.1), of_call(3, 2)], [0.1, None]),
    "before all": ([of_reward(0, 0.1), of_call(1), of_call(3, 2)], [None, None]),
    "twice for one": ([of_call(1), of_call(2), of_reward(3, 0.1), of_reward(4, 0.2)], [None, 0.2]),
    "by a clock an hour behind": ([of_call(1), of_call(2), of_reward(3, 0.1, at=-3600)], [None, 0.1]),
    "by a clock an hour ahead": ([of_call(1), of_reward(2, 0.1, at=3600), of_call(3, 2)], [0.1, None]),
    "of calls without spans": ([of_reward(1, 0.1, at=1.5), of_reward(2, 0.2, at=2.5)], [0.1, 0.2]),
    "of calls without spans, by a clock behind": ([of_reward(1, 0.2, at=-3600)], [None, 0.2]),
    "as an outcome before the spans": (
        [of_reward(1, 0.2, {"agentlightning.outcome": True}), of_call(2, 1), of_call(3, 2)],
        [None, 0.2],
    ),
    "linked to an answer": (
        [of_call(1), of_call(2), of_reward(3, 0.1, linked("gen_ai.response.id", "answer-1"))],
        [0.1, None],
    ),
    "linked to a span": ([of_call(1), of_call(2), of_reward(3, 0.1, linked("span_id", "span-1"))], [0.1, None]),
    "linked to an answer that is not there": (
        [of_call(1), of_call(2), of_reward(3, 0.1, linked("gen_ai.response.id", "answer-9"))],
        [None, None],
    ),
    "linked to a span of no call": ([of_call(1), of_call(2), of_reward(3, 0.1, linked("span_id", "9"))], [None, None]),
    "linked to something else": ([of_call(1), of_call(2), of_reward(3, 0.1, linked("name", "tool"))], [None, 0.1]),
    "of another attempt": ([of_call(1), of_call(2), of_reward(3, 0.1, attempt_id="b")], [None, None]),
}


@pytest.mark.parametrize(("new", "expected"), STEPS.values(), ids=STEPS)
def test_reward_belongs_to_the_last_call_before_it(
    store: Store, database: Database, new: Sequence[Any], expected: list[float | None]
) -> None:
    store.add([call(1), call(2)])
    keep(database, *new)

    assert rewards(store.triplets("r")) == expected


def test_reward_that_names_a_generation_belongs_to_it_and_the_last_counts(store: Store, database: Database) -> None:
    first = call(1)
    store.add([first, call(2, response_id="answer-1", call_id=first.call_id), call(3)])
    keep(
        database,
        of_call(1),
        of_call(2, answer=3),
        of_reward(3, 0.1, of_generation(first.id)),
        of_reward(4, 0.3, of_generation(first.id)),
        of_reward(5, 0.5, of_generation("00000000-0000-7000-8000-000000000000")),
        of_reward(6, 0.7, of_generation("no id")),
    )

    assert rewards(store.triplets("r")) == [0.3, None, None]


def test_long_rollout_is_read_in_parts(store: Store, database: Database) -> None:
    store.add([call(number, rollout_id=None if number % 2 else "r") for number in range(1_200)])
    keep(database, *(of_call(number, answer=1_199 - number) for number in range(1_200)))

    assert answers(store.triplets("r")) == named(*range(1_199, -1, -1))


def unnumbered(span: spans.NewSpan) -> spans.NewSpan:
    """Return the span without a number, as OTLP sends it: the store numbers it when it arrives."""
    return replace(span, sequence_id=None)


def test_call_whose_span_arrives_after_the_reward_keeps_it(store: Store, database: Database) -> None:
    """A BatchSpanProcessor sends after five seconds, but the runner posts its reward immediately."""
    store.add([call(1), call(2), call(3)])
    keep(database, unnumbered(of_call(1)), unnumbered(of_call(2)))
    keep(database, of_reward(3, 1.0, at=3.5))
    before = rewards(store.triplets("r"))
    keep(database, unnumbered(of_call(4, answer=3, at=3.25)))

    assert before == rewards(store.triplets("r")) == [None, None, 1.0]


@pytest.mark.parametrize("ahead", [0, HOUR, -HOUR], ids=["the same clock", "vLLM's is ahead", "vLLM's is behind"])
def test_reward_stays_where_it_is_when_spans_arrive_later(store: Store, database: Database, ahead: int) -> None:
    """The difference of vLLM's clock and the agent's is found from the calls that have times by both."""
    calls = [
        call(n, finished_at=START + n * SECOND + ahead, started_at=START + n * SECOND - SECOND // 2 + ahead)
        for n in (1, 2, 3, 4)
    ]
    store.add(calls)
    late = [unnumbered(took(of_call(n, at=n + 0.01), 0.6)) for n in (1, 2, 3, 4)]
    keep(database, late[0], unnumbered(of_reward(9, 0.5, at=3.4)))
    seen = [rewards(store.triplets("r"))]
    for each in (late[3], late[1], late[2]):
        keep(database, each)
        seen.append(rewards(store.triplets("r")))

    assert seen == [[None, None, 0.5, None]] * 4


def took(span: spans.NewSpan, seconds: float) -> spans.NewSpan:
    """Return the span with a start that many seconds before its end."""
    assert span.end_time is not None
    return replace(span, start_time=span.end_time - seconds)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (2, 0, 1)], ids=str)
def test_calls_and_rewards_are_ordered_by_the_agents_clock_not_by_arrival(
    store: Store, database: Database, order: Sequence[int]
) -> None:
    store.add([call(1), call(2)])
    new = [unnumbered(of_call(1)), unnumbered(of_reward(2, 0.5, at=1.5)), unnumbered(of_call(3, answer=2, at=2))]
    for place in order:
        keep(database, new[place])

    assert joined(store.triplets("r")) == [(1, "span-1", 0.5), (2, "span-3", None)]


def test_senders_numbers_take_precedence_over_clocks(store: Store, database: Database) -> None:
    store.add([call(1), call(2)])
    keep(database, of_call(3, answer=2, at=-3600), of_call(1), of_reward(2, 0.5, at=-7200))

    assert joined(store.triplets("r")) == [(1, "span-1", 0.5), (2, "span-3", None)]


def test_span_without_a_number_is_placed_by_its_time(store: Store, database: Database) -> None:
    store.add([call(1), call(2), call(3)])
    keep(database, of_call(10, answer=1, at=1), of_call(11, answer=3, at=3))
    keep(database, unnumbered(of_call(12, answer=2, at=2)), unnumbered(of_reward(13, 0.5, at=2.5)))

    assert joined(store.triplets("r")) == [(1, "span-10", None), (2, "span-12", 0.5), (3, "span-11", None)]


def test_spans_without_a_time_are_in_the_order_of_arrival(store: Store, database: Database) -> None:
    store.add([call(1), call(2)])
    for each in (of_call(1, answer=2), of_reward(2, 0.5), of_call(3, answer=1)):
        keep(database, replace(each, sequence_id=None, start_time=None, end_time=None))

    assert joined(store.triplets("r")) == [(2, "span-1", 0.5), (1, "span-3", None)]


@pytest.mark.parametrize("posted_first", [True, False])
def test_posted_reward_takes_precedence_over_the_agents_own(
    store: Store, database: Database, posted_first: bool
) -> None:
    """The time of a posted reward is by the store's clock, not the agent's, so it does not tell which came first."""
    store.add([call(1)])
    new = [unnumbered(of_reward(1, 0.5, {"agentlightning.outcome": True}, at=-60)), unnumbered(of_reward(2, 0.1, at=2))]
    for each in new if posted_first else reversed(new):
        keep(database, each)

    assert rewards(store.triplets("r")) == [0.5]


@strategies.composite
def attempts_of_agents(draw: strategies.DrawFn) -> tuple[list[Generation], list[spans.NewSpan], list[float | None]]:
    """Draw the sequence of actions of one agent: its calls, the spans of some, and the rewards of some.

    Times are by the clock of its host, which vLLM's clock may differ from. The last list has the reward of each call.
    """
    skew = draw(strategies.sampled_from([0, 0, HOUR, -HOUR]))
    calls: list[Generation] = []
    new: list[spans.NewSpan] = []
    expected: list[float | None] = []
    moment = 0.0
    for number in range(1, draw(strategies.integers(1, 5)) + 1):
        began = moment + draw(strategies.floats(0.01, 5))
        started, finished = began + 0.001, began + draw(strategies.floats(0.1, 5))
        moment = finished + draw(strategies.floats(0.001, 0.05))
        times = {
            "started_at": START + int(started * SECOND) + skew,
            "finished_at": START + int(finished * SECOND) + skew,
        }
        calls.append(call(number, **times))
        # With clocks that differ, only spans tell which calls came before a reward.
        if skew or draw(strategies.booleans()):
            new.append(unnumbered(took(of_call(10 * number, answer=number, at=moment), moment - began)))
        expected.append(None)
        if draw(strategies.booleans()):
            moment += draw(strategies.floats(0.001, 1))
            expected[-1] = number / 8
            new.append(unnumbered(of_reward(10 * number + 1, number / 8, at=moment)))
    return calls, new, expected


@pytest.mark.tier("test")
@settings(max_examples=40, deadline=None, suppress_health_check=UNHURRIED)
@given(found=attempts_of_agents(), data=strategies.data())
def test_any_order_of_arrival_gives_each_call_the_reward_after_it(
    url: str, found: tuple[list[Generation], list[spans.NewSpan], list[float | None]], data: strategies.DataObject
) -> None:
    calls, new, expected = found
    # Each example uses a new rollout.
    rollout_id = new_id()
    arrivals = data.draw(strategies.permutations([*calls, *new]))
    with open_store(url) as store, closing(open_database(url)) as database:
        for each in arrivals:
            if isinstance(each, Generation):
                store.add(
                    [replace(each, id=new_id(), rollout_id=rollout_id, response_id=f"{rollout_id} {each.response_id}")]
                )
            else:
                answer = each.response_id and f"{rollout_id} {each.response_id}"
                keep(database, replace(each, rollout_id=rollout_id, response_id=answer))
        triplets_found = [*store.triplets(rollout_id)]

    assert [each.reward for each in triplets_found] == expected
    assert [each.response_id for each in triplets_found] == [
        f"{rollout_id} answer-{n}" for n in range(1, len(calls) + 1)
    ]


@pytest.mark.tier("test")
# The same statements run on PostgreSQL in the test above.
@pytest.mark.tier("all", new_store="postgresql")
@settings(max_examples=40, deadline=None, suppress_health_check=UNHURRIED)
@given(found=attempts_of_agents(), data=strategies.data())
def test_reward_once_shown_stays_where_it_is_when_spans_arrive(
    url: str, found: tuple[list[Generation], list[spans.NewSpan], list[float | None]], data: strategies.DataObject
) -> None:
    """The agent gives one reward, at the end, and all of its calls are recorded already."""
    calls, new, _ = found
    rollout_id = new_id()
    of_calls = [each for each in new if each.reward is None]
    ended = max([each.end_time or 0.0 for each in of_calls] + [calls[-1].finished_at / SECOND]) - START / SECOND
    given_last = unnumbered(of_reward(99, 1.0, at=ended + 1))
    late = data.draw(strategies.permutations([*of_calls, given_last]))
    seen: list[list[float | None]] = []
    with open_store(url) as store, closing(open_database(url)) as database:
        store.add(
            [
                replace(each, id=new_id(), rollout_id=rollout_id, response_id=f"{rollout_id} {each.response_id}")
                for each in calls
            ]
        )
        for each in late:
            answer = each.response_id and f"{rollout_id} {each.response_id}"
            keep(database, replace(each, rollout_id=rollout_id, response_id=answer))
            seen.append(rewards(store.triplets(rollout_id)))

    shown = [each for each in seen if any(each)]
    assert shown == [[None] * (len(calls) - 1) + [1.0]] * len(shown)
    assert shown
