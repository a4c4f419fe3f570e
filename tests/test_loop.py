"""The whole loop, as `make loop` runs it: a queue, two runners, an agent with a tool, and what is learnt from."""

from __future__ import annotations

from copy import deepcopy

import pytest

from examples.loop import CALLS, ROLLOUTS, RUNNERS, Outcome, run, servers
from tests.common.reference import tokenizer
from tests.common.vllm import RemoteOpenAIServer


@pytest.fixture(scope="module")
def loop() -> tuple[RemoteOpenAIServer, list[Outcome]]:
    """The vLLM, which has been stopped, and what became of each run."""
    with servers() as (store, vllm):
        return vllm, run(store, vllm, ROLLOUTS, RUNNERS)


@pytest.fixture(scope="module")
def outcomes(loop: tuple[RemoteOpenAIServer, list[Outcome]]) -> list[Outcome]:
    return loop[1]


def test_every_rollout_is_run_once_and_succeeds(outcomes: list[Outcome]) -> None:
    assert len(outcomes) == len({each.run.rollout_id for each in outcomes}) == ROLLOUTS
    for each in outcomes:
        latest = each.rollout["attempt"]
        assert (each.rollout["status"], latest["status"]) == ("succeeded", "succeeded")
        assert (latest["attempt_id"], latest["worker_id"]) == (each.run.attempt_id, each.run.worker_id)
        assert latest["sequence_id"] == 1


def test_every_id_is_the_one_that_vllm_itself_returned_in_the_order_of_the_calls(outcomes: list[Outcome]) -> None:
    for each in outcomes:
        kept = [
            (triplet["response_id"], triplet["prompt_token_ids"], triplet["response_token_ids"])
            for triplet in each.triplets
        ]
        assert len(kept) == CALLS
        assert all(prompt and response for _, prompt, response in kept)
        assert kept == [(call.response_id, call.prompt_token_ids, call.response_token_ids) for call in each.run.calls]
        assert each.is_exact


def test_a_triplet_says_whose_it_is(loop: tuple[RemoteOpenAIServer, list[Outcome]]) -> None:
    vllm, outcomes = loop
    for each in outcomes:
        for triplet in each.triplets:
            assert (triplet["rollout_id"], triplet["attempt_id"]) == (each.run.rollout_id, each.run.attempt_id)
            assert (triplet["model"], triplet["status"]) == (vllm.model, "finished")


def test_the_last_call_has_the_reward(outcomes: list[Outcome]) -> None:
    for each in outcomes:
        assert [triplet["reward"] for triplet in each.triplets] == [None, each.run.reward]


def test_both_prompts_have_the_question_and_the_second_what_the_tool_said(outcomes: list[Outcome]) -> None:
    for each in outcomes:
        first, second = (tokenizer().decode(triplet["prompt_token_ids"]) for triplet in each.triplets)
        question, said = f"user\n{each.run.task['question']}", f"tool\n{each.run.result}"
        assert question in first
        assert question in second
        assert said not in first
        assert said in second


def test_one_other_id_is_noticed(outcomes: list[Outcome]) -> None:
    other = deepcopy(outcomes[0])
    other.triplets[1]["response_token_ids"][-1] += 1

    assert not other.is_exact
