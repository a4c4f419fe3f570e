"""A step's rows from a real vLLM: TRL's function gets them, and the model in transformers has the same logprobs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from openai import OpenAI

import agentlightning as agl
from agentlightning.trainers.torch import check_gap, collate, logprob_gap
from agentlightning.trainers.trl import rollout_func
from tests.common.reference import tokenizer
from tests.common.tiny_model import tiny_model
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer

TOKENS, BOUND = 8, 1e-3


@pytest.fixture(scope="module")
def server(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    path = tmp_path_factory.mktemp("store") / "generations.db"
    with nursery.server(path, env={"AGL_LOGPROBS": "on"}) as server:
        yield server


def test_rows_of_a_step_are_those_that_vllm_sampled_and_the_trainers_logprobs_agree(server: RecordingServer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    answers: dict[str, list[int]] = {}
    rows: list[agl.Trajectory] = []

    def agent(rollout: agl.Rollout) -> None:
        with OpenAI(base_url=rollout.base_url(server.url), api_key="none", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": rollout.input}]
            answer: Any = client.chat.completions.create(model=server.model, messages=messages, max_tokens=TOKENS)
        answers[rollout.rollout_id] = answer.choices[0].token_ids
        rollout.reward(1.0)

    def read(rollout: agl.Rollout) -> list[agl.Trajectory]:
        found = list(rollout.trajectories())
        rows.extend(found)
        return found

    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(global_step=0),
        processing_class=tokenizer(),
        temperature=1.0,
        max_completion_length=TOKENS,
    )
    with agl.open_store(server.store) as store:
        found = rollout_func(store, agent, read=read)(["What is one?", "What is two?"], trainer)

    assert found["completion_ids"] == [answers[rollout_id] for rollout_id in found["rollout_id"]]
    assert collate(rows, tokenizer().pad_token_id)["responses"].shape[0] == len(answers) == 2
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    check_gap(logprob_gap(rows, model), BOUND)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.raises(agl.LogprobsDiffer):
        check_gap(logprob_gap(rows, model), BOUND)
