"""Run with verl: its agent loop's own padding accepts the outputs, and Agent Lightning's fields fit a `DataProto`."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from verl import DataProto  # pyright: ignore[reportMissingImports]
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker  # pyright: ignore[reportMissingImports]

from agentlightning.errors import UnusableRows
from agentlightning.trainers.verl import agent_loop_outputs, data_proto
from tests.common.reference import tokenizer
from tests.trainers.rows import PAD, conversation, forked, with_experts

PROMPT, RESPONSE = 8, 7


def padded_by_verl(outputs: list[Any]) -> DataProto:
    """Pad and join outputs as verl's worker does, without the servers that it starts."""
    worker = object.__new__(AgentLoopWorker)
    worker.tokenizer, worker.processor = tokenizer(), None
    worker.rollout_config = SimpleNamespace(prompt_length=PROMPT, response_length=RESPONSE)
    worker.reward_loop_worker_handles, worker.distillation_enabled = None, False
    worker.mm_processor_kwargs = None

    async def each() -> list[Any]:
        return [await worker._agent_loop_postprocess(output, False, raw_prompt=[]) for output in outputs]

    return worker._postprocess(asyncio.run(each()))


def main() -> None:
    rows = [conversation(), *forked(reward=0.5)]
    ours = data_proto(rows, tokenizer().pad_token_id, PROMPT, RESPONSE)
    theirs = padded_by_verl(agent_loop_outputs(rows, PROMPT, RESPONSE))

    names = ("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask")
    for name in names:
        assert torch.equal(ours.batch[name], theirs.batch[name]), name
    assert torch.equal(ours.batch["rollout_log_probs"], theirs.batch["rollout_log_probs"])
    assert torch.equal(ours.batch["token_level_scores"], theirs.batch["rm_scores"])
    assert not ours.batch["is_drop_mask"].any()
    row = conversation()
    masked = replace(row, response_mask=array("b", bytes(len(row.token_ids))), reward=0.0)
    both = data_proto([row, masked], PAD, PROMPT, RESPONSE)
    assert both.batch["is_drop_mask"].tolist() == [False, True]
    assert both.batch["token_level_scores"].sum(1).tolist() == [1.0, 0.0]
    assert ours.non_tensor_batch["rollout_id_list"].tolist() == ["ro", "ro", "ro"]
    assert ours.non_tensor_batch["turn_index_list"].tolist() == [0, 0, 1]
    assert len({*ours.non_tensor_batch["data_id_list"]}) == 1
    assert theirs.non_tensor_batch["__num_turns__"].tolist() == [4, 2, 2]
    assert theirs.non_tensor_batch["min_global_steps"].tolist() == [3, 3, 3]

    assert agent_loop_outputs([conversation(logprobs=None)])[0].response_logprobs is None
    for adapter in (agent_loop_outputs, lambda rows: data_proto(rows, PAD, PROMPT, RESPONSE)):
        with pytest.raises(
            UnusableRows, match=r"rollout 'two' has no logprobs, but other rows have: .*AGL_LOGPROBS=on"
        ):
            adapter([conversation("one"), conversation("two", logprobs=None)])

    for adapter in (agent_loop_outputs, lambda rows, *limits: data_proto(rows, PAD, *limits)):
        with pytest.raises(UnusableRows, match="prompt of row 0 of rollout 'ro' has 3 ids, more than the 2"):
            adapter([conversation()], 2, RESPONSE)
        with pytest.raises(UnusableRows, match="response of row 0 of rollout 'ro' has 6 ids, more than the 5"):
            adapter([conversation()], PROMPT, 5)

    with pytest.raises(UnusableRows, match="row 0 of rollout 'ro' belongs to no task"):
        data_proto([replace(conversation(), group=None)], PAD, PROMPT, RESPONSE)

    # Routed experts stand at the positions of their ids, behind the padding.
    row = with_experts()
    experts = padded_by_verl(agent_loop_outputs([row])).batch["routed_experts"][0]
    assert row.routed_experts is not None
    start = PROMPT - row.prompt_length
    known = np.array(row.routed_experts.tolist())[:-1]
    assert (experts[start : start + len(known)].numpy() == known).all()
    assert experts[:start].sum() == experts[start + len(known) :].sum() == 0

    # The newer trainer reads an output as a dictionary.
    [output] = agent_loop_outputs([row])
    read = output.as_dict()
    assert read["rm_scores"].tolist() == [0, 0, 0, 0, 0, 1.0]
    assert read["routed_experts"].shape[0] == len(row.token_ids)
    assert PAD not in read["prompts"].tolist()


if __name__ == "__main__":
    main()
