"""Tests of merging: calls become rows, exactly, in any order, and whatever the calls are."""

from __future__ import annotations

import json
import math
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, strategies

from agentlightning.common_prefix import common_ids
from agentlightning.generation import RoutedExperts, SamplingMask
from agentlightning.trajectory import (
    SAMPLING,
    AttemptCalls,
    Call,
    LeftOut,
    Merged,
    Parent,
    Trajectory,
    _tree,
    group_of,
    merge,
)
from tests.common.unhurried import UNHURRIED

pytestmark = pytest.mark.tier("check")

EXACT: list[Any] = ["fork", "trajectory", "transition"]


def call(name: str, prompt: str, answer: str | None, **fields: Any) -> Call:
    """Make a call from texts, of which each character is an id. Calls finish in the order of their names."""
    usual: dict[str, Any] = {
        "finished_at": ord(name[0]),
        "finish_reason": "stop",
        "logprobs": None if answer is None else array("f", [-ord(each) / 256 for each in answer]),
    }
    return Call(
        generation_id=name,
        prompt_token_ids=array("i", map(ord, prompt)),
        response_token_ids=None if answer is None else array("i", map(ord, answer)),
        **usual | fields,
    )


def merged(*calls: Call, **options: Any) -> Merged:
    return merge(AttemptCalls(calls=calls, rollout_id="r", attempt_id="a", reward=1.0), **options)


def shown(rows: Iterable[Trajectory]) -> list[tuple[str, str]]:
    """Show rows as their ids, with each trained one in upper case below them."""
    return [
        ("".join(map(chr, row.token_ids)), "".join("^" if each else "." for each in row.response_mask)) for row in rows
    ]


def rows_of(*calls: Call, **options: Any) -> list[tuple[str, str]]:
    return shown(merged(*calls, **options).rows)


LINE = (call("a", "pq", "AB"), call("b", "pqABt", "CD"), call("c", "pqABtCDu", "EF"))


def test_a_conversation_is_one_row() -> None:
    (row,) = merged(*LINE).rows

    assert shown([row]) == [
        ("pqABtCDuEF", "..^^.^^.^^"),
    ]
    assert (row.index, row.count, row.parent, row.prompt_length) == (0, 1, None, 2)
    assert [(each.generation_id, each.start, each.end) for each in row.spans] == [
        ("a", 2, 4),
        ("b", 5, 7),
        ("c", 8, 10),
    ]
    assert row.flags == []
    assert row.logprobs is not None
    expected = [0, 0, -65 / 256, -66 / 256, 0, -67 / 256, -68 / 256, 0, -69 / 256, -70 / 256]
    assert row.logprobs.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps", "rows"),
    [
        # rLLM's tests of its conversion for Tinker: one step, two and three that extend each other, two that do not,
        # and two that do before one that does not. SkyRL's prefix-aware merging has the same rule.
        ([("pqr", "AB")], [("pqrAB", "...^^")]),
        ([("pq", "AB"), ("pqABr", "CD")], [("pqABrCD", "..^^.^^")]),
        ([("pq", "AB"), ("pqABr", "CD"), ("pqABrCDs", "EF")], [("pqABrCDsEF", "..^^.^^.^^")]),
        ([("pqr", "AB"), ("xyz", "CD")], [("pqrAB", "...^^"), ("xyzCD", "...^^")]),
        ([("pq", "AB"), ("pqABr", "CD"), ("xyz", "EF")], [("pqABrCD", "..^^.^^"), ("xyzEF", "...^^")]),
    ],
)
def test_what_trainers_merge_is_merged_alike(steps: list[tuple[str, str]], rows: list[tuple[str, str]]) -> None:
    assert rows_of(*(call(chr(ord("a") + number), *step) for number, step in enumerate(steps))) == rows


def test_sub_agents_are_rows_of_their_own() -> None:
    one, other = call("d", "xsub", "GH"), call("e", "ysub", "IJ")
    more = call("f", "ysubIJv", "KL")

    assert rows_of(*LINE, one, other, more) == [
        ("pqABtCDuEF", "..^^.^^.^^"),
        ("xsubGH", "....^^"),
        ("ysubIJvKL", "....^^.^^"),
    ]


def test_an_answer_that_two_rows_share_is_trained_in_the_first() -> None:
    rows = merged(*LINE, call("d", "pqABz", "GH")).rows

    assert shown(rows) == [
        ("pqABtCDuEF", "..^^.^^.^^"),
        ("pqABzGH", ".....^^"),
    ]
    assert rows[1].parent == Parent(0, 4)
    assert rows[1].prompt_length == 2
    assert [(each.generation_id, each.is_trained) for each in rows[1].spans] == [("a", False), ("d", True)]
    assert rows[1].logprobs is not None
    assert rows[1].logprobs.tolist()[:5] == [0] * 5


def test_each_choice_is_a_branch() -> None:
    first, second = call("a", "pq", "AB"), call("a", "pq", "CD", index=1)
    rows = merged(first, second, call("b", "pqCDt", "EF")).rows

    assert shown(rows) == [
        ("pqAB", "..^^"),
        ("pqCDtEF", "..^^.^^"),
    ]
    assert rows[1].parent == Parent(0, 2)


def test_prompts_of_one_batch_are_no_retries() -> None:
    rows = merged(call("a", "pq", "AB", call_id="batch"), call("b", "pq", "CD", call_id="batch")).rows

    assert shown(rows) == [("pqAB", "..^^"), ("pqCD", "..^^")]
    assert [row.flags for row in rows] == [[], []]


def test_of_retries_the_continued_one_is_kept() -> None:
    hung_up = call("z", "pqABt", "CX", status="aborted", reward=0.5)
    found = merged(*LINE, hung_up)

    assert shown(found.rows) == [("pqABtCDuEF", "..^^.^^.^^")]
    assert found.rows[0].flags == []
    assert found.rows[0].left_out == found.left_out == [LeftOut("z", 0, "retried", 0.5)]


def test_of_retries_of_which_none_was_continued_the_last_finished_is_kept_and_flagged() -> None:
    found = merged(call("a", "pq", "AB"), call("b", "pq", "CD"), call("c", "pq", "E", status="aborted"))

    assert shown(found.rows) == [("pqCD", "..^^")]
    assert found.rows[0].flags == ["retried"]
    assert [each.generation_id for each in found.left_out] == ["a", "c"]


def test_two_continued_retries_are_both_kept() -> None:
    one = call("a", "pq", "AB"), call("c", "pqABt", "EF")
    other = call("b", "pq", "CD"), call("d", "pqCDt", "GH")

    found = merged(*one, *other)

    assert shown(found.rows) == [("pqABtEF", "..^^.^^"), ("pqCDtGH", "..^^.^^")]
    assert [row.flags for row in found.rows] == [[], []]


def test_a_tie_is_ambiguous_and_not_guessed() -> None:
    rows = merged(call("a", "pq", "AB"), call("b", "pqA", "B"), call("c", "pqABt", "CD")).rows

    assert shown(rows) == [
        ("pqAB", "..^^"),
        ("pqAB", "...^"),
        ("pqABtCD", ".....^^"),
    ]
    assert "ambiguous" in rows[2].flags
    assert [each.generation_id for each in rows[2].spans] == ["c"]


def test_a_tie_of_equal_retries_is_ambiguous_only_if_it_makes_a_difference() -> None:
    calls = call("a", "pq", "AB"), call("b", "pq", "AB"), call("c", "pqABt", "CD")
    rewarded = call("a", "pq", "AB", reward=1.0), *calls[1:]

    assert shown(merged(*calls).rows) == [("pqABtCD", "..^^.^^")]
    assert merged(*calls).rows[0].flags == []
    assert ["ambiguous" in row.flags for row in merged(*rewarded).rows] == [False, True]


def test_an_edited_history_forks_where_it_differs() -> None:
    rows = merged(*LINE, call("d", "pqABtCXu", "GH")).rows

    assert shown(rows) == [
        ("pqABtCDuEF", "..^^.^^.^^"),
        ("pqABtCXuGH", "........^^"),
    ]
    assert rows[1].flags == ["drifted"]
    assert rows[1].parent == Parent(0, 6)


def test_a_drifted_end_is_overwritten_and_masked_when_realigned() -> None:
    drifted = *LINE[:2], call("d", "pqABtCXXu", "GH")

    assert rows_of(*drifted) == [("pqABtCD", "..^^.^^"), ("pqABtCXXuGH", ".........^^")]
    (row,) = merged(*drifted, drift="realign", drift_limit=1).rows
    assert shown([row]) == [("pqABtCXXuGH", "..^^.^...^^")]
    assert row.flags == ["drifted"]
    assert [(each.start, each.end) for each in row.spans] == [(2, 4), (5, 6), (9, 11)]
    assert row.logprobs is not None
    assert row.logprobs[6] == 0.0
    assert rows_of(*drifted, drift="realign", drift_limit=0) == rows_of(*drifted)


def test_a_wholly_different_answer_is_never_realigned() -> None:
    calls = call("a", "pq", "AB"), call("b", "pqXYt", "CD")

    assert rows_of(*calls, drift="realign", drift_limit=100) == [("pqAB", "..^^"), ("pqXYtCD", ".....^^")]


def test_retries_of_which_each_could_have_drifted_are_ambiguous_if_it_makes_a_difference() -> None:
    prompt = call("c", "pqABXt", "EF")

    def flags(reward: float | None) -> list[str]:
        retries = call("a", "pq", "ABC", reward=reward), call("b", "pq", "ABD")
        return [*merged(*retries, prompt, drift="realign").rows[-1].flags]

    assert flags(None) == ["drifted"]
    assert flags(1.0) == ["ambiguous", "drifted"]


def test_choices_of_one_call_of_which_each_could_have_drifted_are_ambiguous() -> None:
    choices = call("a", "p", "ABC"), call("a", "p", "ABXX", index=1)

    rows = merged(*choices, call("b", "pABt", "D"), drift="realign").rows

    assert shown(rows) == [("pABC", ".^^^"), ("pABXX", ".^^^^"), ("pABtD", "....^")]
    assert rows[2].flags == ["ambiguous", "drifted"]


def test_a_row_branches_where_a_realigned_row_leaves_it() -> None:
    first, short = call("a", "p", "ABCDEFGHIJ"), call("b", "pABCDEFGHt", "X")
    row, other = merged(first, short, call("c", "pABCDEFGHIu", "Y"), drift="realign").rows

    assert shown([row, other]) == [("pABCDEFGHtX", "..........^"), ("pABCDEFGHIuY", ".^^^^^^^^^.^")]
    assert other.parent == Parent(0, 9)
    assert row.token_ids[:9] == other.token_ids[:9]


def test_an_answer_that_is_whole_in_another_row_is_trained_there() -> None:
    calls = call("a", "pq", "AB"), call("b", "pqAXt", "CD"), call("c", "pqABt", "EF")

    assert rows_of(*calls, drift="realign") == [("pqAXtCD", ".....^^"), ("pqABtEF", "..^^.^^")]


def test_each_call_is_a_row_of_transition() -> None:
    assert rows_of(*LINE, drift="transition") == [
        ("pqAB", "..^^"),
        ("pqABtCD", ".....^^"),
        ("pqABtCDuEF", "........^^"),
    ]


def test_calls_of_two_models_are_never_in_one_row() -> None:
    other = call("b", "pqABt", "CD", model="judge")
    rows = merged(LINE[0], other, LINE[2]).rows

    assert shown(rows) == [("pqABtCDuEF", "..^^....^^"), ("pqABtCD", ".....^^")]
    assert [row.model for row in rows] == [None, "judge"]
    assert rows_of(LINE[0], other, LINE[2], model="judge") == [("pqABtCD", ".....^^")]


def test_calls_of_two_agents_are_never_in_one_row() -> None:
    child = {"agent_id": "child", "parent_agent_id": "main", "purpose": "sub-agent"}
    calls = (
        call("a", "pq", "AB", agent_id="main", purpose="main"),
        call("b", "pqABt", "CD", **child),
        call("c", "pqABtCDu", "EF", agent_id="main", purpose="compaction"),
        call("d", "pqABtCDv", "GH", **child, retry=1),
    )
    rows = merged(*calls).rows

    assert shown(rows) == [
        ("pqABtCDuEF", "..^^....^^"),
        ("pqABtCDvGH", ".....^^.^^"),
    ]
    assert [(row.agent_id, row.parent_agent_id, row.purpose) for row in rows] == [
        ("main", None, None),
        ("child", "main", "sub-agent"),
    ]
    for filters in ({"agent_id": "child"}, {"parent_agent_id": "main"}, {"purpose": "sub-agent"}):
        assert shown(merged(*calls, **filters).rows) == shown(rows[1:2])
    assert merged(*calls, retry=1).rows == []
    assert shown(merged(*calls, retry=1, drift="transition").rows) == [("pqABtCDvGH", "........^^")]


def test_call_without_an_agent_continues_any_and_is_continued_by_any() -> None:
    main, child = {"agent_id": "main"}, {"agent_id": "child"}
    calls = (
        call("a", "pq", "AB"),
        call("b", "pqABt", "CD", **main),
        call("c", "pqABtCDu", "EF"),
        call("d", "pqABtCDuEFv", "GH", **main),
        # Not after the row of another agent, though the call before it names none.
        call("e", "pqABtCDuEFv", "IJ", **child),
    )
    rows = merged(*calls).rows

    assert [(*row, agent) for row, agent in zip(shown(rows), (row.agent_id for row in rows), strict=True)] == [
        ("pqABtCDuEFvGH", "..^^.^^.^^.^^", "main"),
        ("pqABtCDuEFvIJ", "...........^^", "child"),
    ]
    assert shown(merged(*calls, agent_id="main").rows) == shown(rows[:1])
    assert [row.agent_id for row in merged(*calls, drift="transition").rows].count(None) == 2


def test_flags_say_how_answers_ended() -> None:
    cut_off = call("b", "pqABt", "CD", finish_reason="length")
    hung_up = call("c", "pqABtCDu", "EF", status="aborted", finish_reason="abort")

    (row,) = merged(LINE[0], cut_off, hung_up).rows

    assert row.flags == ["aborted", "truncated"]
    assert [each.finish_reason for each in row.spans] == ["stop", "length", "abort"]


def test_weights_sampling_and_experts_are_merged_by_position() -> None:
    def known(name: str, prompt: str, answer: str, version: str, temperature: float) -> Call:
        count = len(prompt) + len(answer) - 1
        experts = RoutedExperts((count, 1, 2), array("h", [ord(name)] * count * 2))
        return call(
            name,
            prompt,
            answer,
            weight_versions=[(version, 0, len(answer))],
            routed_experts=experts,
            logprobs_mode="raw_logprobs",
            sampling_params=json.dumps({"temperature": temperature, "n": 1}),
        )

    (row,) = merged(known("a", "pq", "AB", "7", 0.5), known("b", "pqABt", "CD", "8", 1.0)).rows

    assert row.weight_versions == [("7", 2, 4), ("8", 5, 7)]
    assert row.flags == ["mixed_weights", "mixed_sampling"]
    assert row.logprobs_mode == "raw_logprobs"
    assert row.temperature is None
    assert [each.sampling["temperature"] for each in row.spans if each.sampling] == [0.5, 1.0]
    assert row.routed_experts is not None
    assert row.routed_experts.shape == (7, 1, 2)
    assert row.routed_experts.ids.tolist() == [ord("a")] * 6 + [ord("b")] * 6 + [-1] * 2
    assert row.missing_experts == 1


def test_experts_are_kept_from_the_calls_that_have_them() -> None:
    of_b = RoutedExperts((6, 1, 1), array("h", range(6)))
    known = call("b", "pqABt", "CD", routed_experts=of_b)
    later = replace(known, routed_experts=RoutedExperts((4, 1, 1), array("h", range(2, 6))))
    later.sampling_params = '{"routed_experts_prompt_start":2}'
    other = call("c", "pqABtCDu", "EF", routed_experts=RoutedExperts((9, 2, 1), array("h", range(18))))

    def experts(*calls: Call) -> tuple[list[int] | None, int | None]:
        (row,) = merged(*calls).rows
        found = row.routed_experts
        return None if found is None else found.ids.tolist(), row.missing_experts

    assert experts(LINE[0], known) == ([*range(6), -1], 1)
    assert experts(LINE[0], later) == ([-1, -1, *range(2, 6), -1], 3)
    assert experts(LINE[0], known, LINE[2]) == ([*range(6), -1, -1, -1, -1], 4)
    assert experts(*LINE) == (None, None)
    assert experts(LINE[0], known, other) == (None, None)


def test_experts_of_a_row_that_is_cut_are_those_of_its_calls_up_to_there() -> None:
    def known(name: str, ids: str) -> Call:
        experts = RoutedExperts(
            (len(ids) - 1, 1, 1), array("h", range(1000 * ord(name), 1000 * ord(name) + len(ids) - 1))
        )
        return call(name, ids[:-10], ids[-10:], routed_experts=experts)

    def experts(*ids: str, **options: Any) -> tuple[list[int], int | None]:
        (row,) = merged(*(known(chr(number), each) for number, each in enumerate(ids, 1)), **options).rows
        assert row.routed_experts is not None
        return row.routed_experts.ids.tolist(), row.missing_experts

    first = "abcdefghijABCDEFGHIJ"

    # The second call's prompt repeats eight ids of the answer: from there on, the row's ids are its own.
    drifted = experts(first, first[:18] + "xyklmnopqrKLMNOPQRST", drift="realign", max_length=22)
    assert drifted == ([*range(1000, 1018), *range(2018, 2022)], 0)
    # What is cut off begins in the second call's prompt, whose experts that call has given.
    assert experts(first, first + "klmnopqrstKLMNOPQRST", max_length=25) == (
        [*range(1000, 1019), *range(2019, 2025)],
        0,
    )


def test_masks_are_put_together_by_position_or_the_row_is_flagged() -> None:
    def masked(name: str, prompt: str, answer: str, mask: list[list[int]] | None, **params: float) -> Call:
        return call(
            name,
            prompt,
            answer,
            sampling_mask=None if mask is None else SamplingMask.of_lists(mask),
            logprobs_mode="processed_logprobs",
            sampling_params=json.dumps(params),
        )

    first = masked("a", "pq", "AB", [[65, 1], [66]], top_p=0.9)

    (row,) = merged(first, masked("b", "pqABt", "CD", [[67], [68, 2, 3]], top_p=0.9)).rows
    assert row.sampling_mask is not None
    assert row.sampling_mask.tolist() == [[], [], [65, 1], [66], [], [67], [68, 2, 3]]
    assert row.flags == []
    assert Trajectory.from_dict(json.loads(json.dumps(row.as_dict()))) == row

    (row,) = merged(first, masked("b", "pqABt", "CD", None, top_p=0.9)).rows
    assert (row.sampling_mask, row.flags) == (None, ["no_mask"])

    # Nothing was cut off, so that there is nothing to know.
    (row,) = merged(masked("a", "pq", "AB", None, temperature=0.7)).rows
    assert (row.sampling_mask, row.flags) == (None, [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"temperature": 0.1}, {"temperature": 1.5}),
        ({"logit_bias": {"5": 2.0}}, {}),
        ({"allowed_token_ids": [1, 2]}, {"allowed_token_ids": [1]}),
        ({"min_tokens": 2}, {}),
        ({"bad_words": ["no"]}, {}),
    ],
)
def test_a_tie_of_retries_with_other_sampling_is_ambiguous(one: dict[str, Any], other: dict[str, Any]) -> None:
    def flags(*params: dict[str, Any]) -> list[list[str]]:
        retries = [
            call(name, "p", "A", sampling_params=json.dumps(each)) for name, each in zip("ab", params, strict=True)
        ]
        return [[*row.flags] for row in merged(*retries, call("c", "pAt", "B", sampling_params=json.dumps(one))).rows]

    assert "ambiguous" in flags(one, other)[-1]
    assert flags(one, one) == [[]]


def test_a_tie_of_retries_with_other_logprobs_is_ambiguous() -> None:
    retries = call("a", "p", "A", logprobs_mode="raw_logprobs"), call("b", "p", "A", logprobs_mode="processed_logprobs")

    assert "ambiguous" in merged(*retries, call("c", "pAt", "B")).rows[-1].flags


def test_sampling_parameters_that_are_lists_mix_a_row() -> None:
    banned = call("b", "pqABt", "CD", sampling_params=json.dumps({"bad_words": ["no"], "logit_bias": {"5": 1.0}}))

    (row,) = merged(call("a", "pq", "AB", sampling_params="{}"), banned).rows

    assert row.flags == ["mixed_sampling"]
    assert row.spans[1].sampling is not None
    assert (row.spans[1].sampling["bad_words"], row.spans[1].sampling["logit_bias"]) == (["no"], {"5": 1.0})


def test_an_unknown_logprob_leaves_the_row_without_logprobs() -> None:
    (row,) = merged(LINE[0], call("b", "pqABt", "CD", logprobs=None)).rows

    assert row.logprobs is None


def test_rewards_stand_at_the_last_id_of_their_answers() -> None:
    rows = merged(call("a", "pq", "AB", reward=0.25), *LINE[1:], call("d", "pqABz", "GH", reward=0.5)).rows

    assert [row.rewards for row in rows] == [[(3, 0.25)], [(6, 0.5)]]
    assert [row.reward for row in rows] == [1.0, 1.0]


def test_filters_choose_rows_before_training_is_assigned() -> None:
    hung_up = call("d", "pqABz", "GH", status="aborted")

    assert rows_of(LINE[0], hung_up, call("e", "pqABy", "IJ"), status="finished") == [("pqAByIJ", "..^^.^^")]
    assert [row.index for row in merged(*LINE, hung_up, status="aborted").rows] == []


def test_weight_versions_are_filtered_by_age() -> None:
    def of(version: str) -> Call:
        return call("a", "pq", "AB", weight_versions=[(version, 0, 2)])

    def kept(*calls: Call, **options: Any) -> int:
        return len(merged(*calls, weight_version="9", **options).rows)

    assert [kept(of("9")), kept(of("8")), kept(LINE[0])] == [1, 0, 0]
    assert [kept(of(each), max_staleness=1) for each in ("10", "9", "8", "7", "x")] == [0, 1, 1, 0, 0]
    assert kept(call("a", "pq", "AB", weight_versions=[("9", 0, 1)])) == 0
    assert kept(call("a", "pq", "AB", weight_versions=[("9", 1, 2), ("8", 0, 1)]), max_staleness=1) == 1


def test_incomplete_rows_can_be_left_out() -> None:
    assert rows_of(*LINE, complete=True) == rows_of(*LINE)
    assert rows_of(*LINE, call("d", "x", "Y", finish_reason="length"), complete=True) == rows_of(*LINE)
    assert merge(AttemptCalls(calls=LINE, missing=1), complete=True).rows == []
    assert rows_of(*LINE, complete=True, max_length=9) == []


def test_low_and_unknown_rewards_can_be_left_out() -> None:
    def kept(reward: float | None) -> int:
        return len(merge(AttemptCalls(calls=LINE, reward=reward), min_reward=0.5).rows)

    assert [kept(1.0), kept(0.5), kept(0.0), kept(None), kept(math.nan), kept(math.inf)] == [1, 1, 0, 0, 0, 0]


def test_long_rows_are_cut_and_flagged() -> None:
    found = merged(*LINE, max_length=6)

    assert shown(found.rows) == [("pqABtC", "..^^.^")]
    assert found.rows[0].flags == ["cut"]
    assert found.rows[0].left_out == [LeftOut("c", 0, "too_long", None)]
    assert rows_of(*LINE, max_response_length=3) == [("pqABt", "..^^.")]
    assert rows_of(*LINE, max_length=10, max_response_length=8, max_prompt_length=2) == rows_of(*LINE)


def test_long_prompts_are_left_out_and_named() -> None:
    found = merged(*LINE, max_prompt_length=1)

    assert found.rows == []
    assert [(each.generation_id, each.reason) for each in found.left_out] == [
        ("a", "too_long"),
        ("b", "too_long"),
        ("c", "too_long"),
    ]


def test_rows_that_are_equal_after_a_cut_are_one() -> None:
    assert rows_of(*LINE, call("d", "pqABz", "GH"), max_length=4) == [("pqAB", "..^^")]


@pytest.mark.parametrize(
    ("calls", "left_out"),
    [
        ((), []),
        ((Call(generation_id="a", response_token_ids=array("i", [1])),), ["without_ids"]),
        ((call("a", "pq", None),), ["without_ids"]),
        ((call("a", "pq", ""), call("b", "pq", "")), ["empty_answer", "empty_answer"]),
        ((call("a", "", ""),), ["empty_answer"]),
    ],
    ids=["no calls", "no prompt", "no answer", "its own prefix", "nothing"],
)
def test_calls_without_sampled_ids_are_named_and_make_no_row(calls: Sequence[Call], left_out: list[str]) -> None:
    found = merged(*calls)

    assert found.rows == []
    assert [each.reason for each in found.left_out] == left_out


def test_a_call_without_ids_flags_the_other_rows() -> None:
    assert [row.flags for row in merged(*LINE, call("d", "xy", None)).rows] == [["missing_call"]]
    assert [row.flags for row in merged(*LINE, call("d", "xy", "")).rows] == [[]]
    assert [row.flags for row in merge(AttemptCalls(calls=LINE, missing=2)).rows] == [["missing_call"]]


def test_an_empty_prompt_and_a_prompt_that_repeats_an_answer_alone_are_rows() -> None:
    assert rows_of(call("a", "", "AB"), call("b", "AB", "CD")) == [("ABCD", "^^^^")]


def test_a_prompt_shorter_than_its_parents_begins_a_row() -> None:
    assert rows_of(*LINE, call("d", "pqA", "XY")) == [("pqABtCDuEF", "..^^.^^.^^"), ("pqAXY", "...^^")]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_no_numbers_are_unknown_and_flagged(reward: float) -> None:
    (of_call,) = merged(call("a", "pq", "AB", reward=reward)).rows
    (of_attempt,) = merge(AttemptCalls(calls=LINE, reward=reward)).rows

    assert (of_call.rewards, of_call.flags) == ([], ["bad_reward"])
    assert (of_attempt.reward, of_attempt.flags) == (None, ["bad_reward"])


@pytest.mark.parametrize("params", ["", "no JSON", "[]", "1", "null"])
def test_strange_sampling_parameters_are_unknown(params: str) -> None:
    (row,) = merged(call("a", "pq", "AB", sampling_params=params)).rows

    assert row.spans[0].sampling is None


@pytest.mark.parametrize("value", ["null", '"x"', "true", "[1]", "NaN", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p"])
def test_a_sampling_parameter_that_is_no_number_is_the_default(name: str, value: str) -> None:
    params = f'{{"{name}":{value}}}'
    (row,) = merged(call("a", "pq", "AB", logprobs_mode="processed_logprobs", sampling_params=params)).rows

    assert row.spans[0].sampling == SAMPLING
    assert row.flags == []


def test_both_values_that_stand_for_all_tokens_are_one() -> None:
    first = call("a", "pq", "AB", sampling_params='{"top_k":0}')
    second = call("b", "pqABt", "CD", sampling_params='{"top_k":-1}')

    (row,) = merged(first, second).rows

    assert [each.sampling for each in row.spans] == [SAMPLING, SAMPLING]
    assert row.flags == []


def test_logprobs_of_another_length_are_unknown() -> None:
    (row,) = merged(call("a", "pq", "AB", logprobs=array("f", [0.0]))).rows

    assert row.logprobs is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drift": "guess"}, "not one of fork, realign"),
        ({"max_length": -1}, "max_length: must not be negative"),
        ({"max_staleness": 1}, "needs a weight_version"),
        ({"max_staleness": 1, "weight_version": "main"}, "that is an integer"),
    ],
)
def test_senseless_options_are_refused_with_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merged(*LINE, **options)


def test_many_calls_are_merged_without_recursion_or_quadratic_work() -> None:
    prompt, calls = array("i", [1]), list[Call]()
    for number in range(3_000):
        answer = array("i", [number])
        calls.append(
            Call(generation_id=f"{number:06}", prompt_token_ids=prompt, response_token_ids=answer, finished_at=number)
        )
        prompt = prompt + answer
    retries = [
        Call(generation_id=f"r{number}", prompt_token_ids=array("i", [5, 6]), response_token_ids=array("i", [number]))
        for number in range(20_000)
    ]

    found = merge(AttemptCalls(calls=[*calls, *retries]))

    assert [len(row.token_ids) for row in found.rows] == [3_001, 3]
    assert len(found.left_out) == 19_999
    assert [len(row.left_out) for row in found.rows] == [19_999, 0]


def test_many_rows_of_one_prompt_are_made_without_quadratic_work(monkeypatch: pytest.MonkeyPatch) -> None:
    count, prompt = 5_000, array("i", [1])
    compared = 0

    def compare(*arguments: Any) -> int:
        nonlocal compared
        compared += 1
        return common_ids(*arguments)

    monkeypatch.setattr(_tree, "common_ids", compare)
    choices = [
        Call(generation_id="c", index=number, prompt_token_ids=prompt, response_token_ids=array("i", [number]))
        for number in range(count)
    ]
    # Each of these prompts breaks an answer of its own among equally long ones, and all of those at their first id.
    answers = [
        Call(
            generation_id="d",
            index=number,
            prompt_token_ids=array("i", [2]),
            response_token_ids=array("i", [3, number, 0]),
        )
        for number in range(count)
    ]
    drifted = [
        Call(
            generation_id=f"e{number}",
            prompt_token_ids=array("i", [2, 3, number, 1]),
            response_token_ids=array("i", [4]),
        )
        for number in range(count)
    ]

    found = merge(AttemptCalls(calls=[*choices, *answers, *drifted]))

    assert compared < 10 * count
    assert len(found.rows) == 3 * count
    assert found.left_out == []
    assert Counter(each.parent.position for each in found.rows if each.parent) == {1: 2 * (count - 1), 3: count}


def test_a_row_is_restored_from_json() -> None:
    experts = RoutedExperts((3, 1, 2), array("h", range(6)))
    infinite = call("a", "pq", "AB", logprobs=array("f", [-math.inf, -1.0]), routed_experts=experts, reward=0.5)
    attempt = AttemptCalls(calls=[infinite, call("a", "pq", "CD", index=1), call("b", "x", "")], metadata={"group": 7})
    rows = merge(attempt).rows

    for row in rows:
        found = json.loads(json.dumps(row.as_dict()).replace("-Infinity", "null"))
        assert Trajectory.from_dict(found) == row
    assert [row.group for row in rows] == ["7", "7"]


def test_rollouts_with_an_equal_input_are_one_group() -> None:
    assert group_of({"a": 1, "b": [2]}, None) == group_of({"b": [2], "a": 1}, {})
    assert group_of({"a": 1}, None) != group_of({"a": 2}, None)
    assert group_of({"a": 1}, {"group": "task 5"}) == "task 5"
    assert group_of({"a": 1}, {"group": [1]}) == group_of({"a": 1}, None)
    assert group_of(None, None) is None


# What holds for any calls. Few ids, and short sequences: prefixes, ties and retries are then common.

ids = strategies.lists(strategies.integers(0, 2), max_size=4)


@strategies.composite
def attempts(draw: strategies.DrawFn) -> list[Call]:
    """Make calls of an agent that goes on from any earlier call, repeats it, drifts from it, or begins anew."""
    calls: list[Call] = []
    for number in range(draw(strategies.integers(0, 9))):
        before = draw(strategies.sampled_from(calls)) if calls else None
        prompt = draw(ids)
        way = draw(strategies.sampled_from(["continue", "continue", "drift", "retry", "anew"]))
        if before is not None and way != "anew":
            context = [*(before.prompt_token_ids or ())]
            if way != "retry":
                context += before.response_token_ids or ()
            if way == "drift":
                del context[-draw(strategies.integers(1, 3)) :]
            prompt = context if way == "retry" else context + prompt
        for index in range(draw(strategies.sampled_from([1, 1, 1, 2]))):
            answer = array("i", draw(ids))
            calls.append(
                Call(
                    generation_id=f"g{number}",
                    index=index,
                    finished_at=draw(strategies.integers(0, 3)),
                    status=draw(strategies.sampled_from(["finished", "finished", "aborted"])),
                    model=draw(strategies.sampled_from(["m", "m", "m", "n"])) if index == 0 else calls[-1].model,
                    agent_id=draw(strategies.sampled_from([None, None, "a", "b"]))
                    if index == 0
                    else calls[-1].agent_id,
                    prompt_token_ids=array("i", prompt),
                    response_token_ids=answer,
                    logprobs=array("f", [-1.0 - number] * len(answer)),
                    reward=draw(strategies.sampled_from([None, None, 1.0])),
                )
            )
    return calls


def by_id(calls: Iterable[Call]) -> dict[tuple[str, int], Call]:
    return {(each.generation_id, each.index): each for each in calls}


def rows_and_left_out(calls: Sequence[Call], **options: Any) -> Merged:
    return merge(AttemptCalls(calls=calls), **options)


@UNHURRIED
@given(attempts(), strategies.sampled_from(EXACT))
def test_every_sampled_id_of_a_kept_call_is_trained_once(calls: list[Call], drift: Any) -> None:
    rows, left_out = rows_and_left_out(calls, drift=drift)

    trained = Counter[tuple[str, int]]()
    for row in rows:
        for span in row.spans:
            trained[span.generation_id, span.index] += sum(row.response_mask[span.start : span.end])
        assert sum(row.response_mask) == sum(span.end - span.start for span in row.spans if span.is_trained)
    gone = {(each.generation_id, each.index) for each in left_out}
    for name, each in by_id(calls).items():
        assert trained[name] == (0 if name in gone else len(each.response_token_ids or ()))
        assert (name in gone) != (name in trained)


@UNHURRIED
@given(attempts(), strategies.sampled_from([*EXACT, "realign"]), strategies.integers(0, 3))
def test_rows_have_the_ids_of_their_calls_each_trained_in_its_own_context(
    calls: list[Call], drift: Any, limit: int
) -> None:
    known = by_id(calls)
    rows = rows_and_left_out(calls, drift=drift, drift_limit=limit).rows
    by_index = {row.index: row for row in rows}
    for row in rows:
        last = known[row.spans[-1].generation_id, row.spans[-1].index]
        assert row.token_ids == (last.prompt_token_ids or array("i")) + (last.response_token_ids or array("i"))
        assert row.prompt_length == row.spans[0].start
        inside: set[int] = set()
        for span in row.spans:
            of_span = known[span.generation_id, span.index]
            answer = of_span.response_token_ids or array("i")
            assert row.token_ids[: span.start] == of_span.prompt_token_ids
            assert row.token_ids[span.start : span.end] == answer[: span.end - span.start]
            assert row.model == of_span.model
            assert of_span.agent_id in (None, row.agent_id)
            assert row.logprobs is not None
            if span.is_trained:
                inside |= {*range(span.start, span.end)}
                assert row.logprobs[span.start : span.end] == (of_span.logprobs or array("f"))[: span.end - span.start]
            if drift != "realign":
                assert span.end - span.start == len(answer)
            else:
                assert len(answer) - (span.end - span.start) <= limit
        assert {at for at, each in enumerate(row.response_mask) if each} == inside
        if row.parent is not None:
            parent = by_index[row.parent.index]
            assert parent.token_ids[: row.parent.position] == row.token_ids[: row.parent.position]
        assert row.logprobs is not None
        assert all(not row.logprobs[at] for at in {*range(len(row.token_ids))} - inside)


@UNHURRIED
@given(attempts(), strategies.randoms(), strategies.sampled_from([*EXACT, "realign"]))
def test_the_order_of_calls_changes_nothing(calls: list[Call], order: random.Random, drift: Any) -> None:
    shuffled = order.sample(calls, len(calls))

    assert rows_and_left_out(shuffled, drift=drift) == rows_and_left_out(calls, drift=drift)


@UNHURRIED
@given(attempts(), strategies.data())
def test_removing_a_leaf_changes_no_other_row(calls: list[Call], data: strategies.DataObject) -> None:
    """Only what the leaf's row alone had trained is then trained in another row that has it."""
    rows, left_out = rows_and_left_out(calls)
    # Without the leaf, another retry may be the one to keep, and a tie may be none: these rows are flagged for that.
    certain = not any(each.reason == "retried" for each in left_out)
    certain &= not any({"retried", "ambiguous"} & {*row.flags} for row in rows)
    if not rows or not certain:
        return
    gone = data.draw(strategies.sampled_from(rows))
    leaf = gone.spans[-1].generation_id, gone.spans[-1].index

    fewer = rows_and_left_out([each for each in calls if (each.generation_id, each.index) != leaf]).rows

    after = {(each.spans[-1].generation_id, each.spans[-1].index): each for each in fewer}
    freed = {(each.generation_id, each.index) for each in gone.spans if each.is_trained}
    for row in rows:
        if row is gone:
            continue
        same = after[row.spans[-1].generation_id, row.spans[-1].index]
        assert same.token_ids == row.token_ids
        for was, now in zip(row.spans, same.spans, strict=True):
            assert (was.generation_id, was.index, was.start, was.end) == (
                now.generation_id,
                now.index,
                now.start,
                now.end,
            )
            assert was.is_trained == now.is_trained or (now.generation_id, now.index) in freed


def linear(calls: Iterable[Call]) -> list[tuple[list[int], list[int]]]:
    """Merge as linear trainers do: extend the row while the prompt does, and begin a new one where it does not."""
    found: list[tuple[list[int], list[int]]] = []
    for each in calls:
        prompt, answer = [*(each.prompt_token_ids or ())], [*(each.response_token_ids or ())]
        if not found or prompt[: len(found[-1][0])] != found[-1][0]:
            found.append(([], []))
        context, mask = found[-1]
        mask += [0] * (len(prompt) - len(context)) + [1] * len(answer)
        context += prompt[len(context) :] + answer
    return found


@UNHURRIED
@given(
    strategies.lists(
        strategies.lists(strategies.tuples(ids, ids.filter(bool)), min_size=1, max_size=4), min_size=1, max_size=4
    )
)
def test_linear_conversations_are_merged_as_linear_trainers_merge_them(
    turns: list[list[tuple[list[int], Any]]],
) -> None:
    calls: list[Call] = []
    for number, conversation in enumerate(turns):
        # Each conversation begins with an id of its own, as after a compaction.
        context = array("i", [100 + number])
        for asked, answer in conversation:
            prompt = context + array("i", [9, *asked])
            calls.append(
                Call(
                    generation_id=f"{len(calls):03}",
                    finished_at=len(calls),
                    prompt_token_ids=prompt,
                    response_token_ids=array("i", answer),
                )
            )
            context = prompt + array("i", answer)

    rows = rows_and_left_out(calls).rows

    assert [([*row.token_ids], [*row.response_mask]) for row in rows] == linear(calls)
    assert [row.flags for row in rows] == [[]] * len(turns)
