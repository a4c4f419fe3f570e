"""Rows that no trainer gets, since it could not take them, or would train wrongly. Each is refused with a sentence."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace

import pytest

from agentlightning.errors import UnusableRows
from agentlightning.trainers._rows import check_rows, experts_of, group_of_row, logprobs_of
from tests.trainers.rows import conversation, with_experts

pytestmark = pytest.mark.tier("check")


def test_rows_that_fit_are_taken() -> None:
    check_rows([conversation()], max_prompt_length=3, max_response_length=6, max_length=9)


def test_no_row_at_all_is_refused() -> None:
    with pytest.raises(UnusableRows, match=r"there is no row to train: look at `left_out`"):
        check_rows([])


def test_rows_of_two_models_are_refused() -> None:
    with pytest.raises(UnusableRows, match=r"several models \(m, n\): train one at a time, with the option model"):
        check_rows([conversation(), conversation(model="n")])


def test_a_row_without_a_reward_is_refused() -> None:
    with pytest.raises(UnusableRows, match=r"row 0 of rollout 'two' has no reward: reward the rollout"):
        check_rows([conversation(), conversation("two", None)])


def test_a_row_that_is_too_long_is_refused_with_the_option_that_helps() -> None:
    with pytest.raises(UnusableRows, match=r"prompt of row 0 of rollout 'ro' has 3 ids, .* 2 .*max_prompt_length=2"):
        check_rows([conversation()], max_prompt_length=2)
    with pytest.raises(UnusableRows, match=r"response .* has 6 ids, .* 5 .*max_response_length=5, which cuts"):
        check_rows([conversation()], max_response_length=5)
    with pytest.raises(UnusableRows, match=r"the whole of row 0 of rollout 'ro' has 9 ids, .* 8 .*max_length=8, which"):
        check_rows([conversation()], max_length=8)


def test_missing_logprobs_are_refused_with_the_switch_that_helps() -> None:
    with pytest.raises(UnusableRows, match="has no logprobs: start vLLM with AGL_LOGPROBS=on"):
        logprobs_of(conversation(logprobs=None))


def test_infinite_logprobs_are_refused() -> None:
    row = conversation()
    row.logprobs = array("f", [-math.inf] * len(row.token_ids))

    with pytest.raises(UnusableRows, match="has infinite logprobs: leave the row out"):
        logprobs_of(row)


def test_a_rollout_without_input_is_of_no_task() -> None:
    assert group_of_row(conversation()) == group_of_row(conversation("two"))
    with pytest.raises(
        UnusableRows, match=r"row 0 of rollout 'ro' belongs to no task.*: create the rollout with an input"
    ):
        group_of_row(replace(conversation(), group=None))


def test_experts_are_those_of_all_ids_that_were_fed_to_the_model() -> None:
    row = with_experts()
    assert row.routed_experts is not None

    found = experts_of(row)

    assert found is not None
    assert found.tolist() == row.routed_experts.tolist()[:-1]
    assert experts_of(conversation()) is None

    row.routed_experts.ids[:6] = array("h", [-1] * 6)
    with pytest.raises(UnusableRows, match="has no routed experts for 1 ids in the middle"):
        experts_of(row)
