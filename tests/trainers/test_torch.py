"""Rows as tensors, beside a plain loop; and the logprobs of engine and trainer, compared."""

from __future__ import annotations

import math
import sys
from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from agentlightning.errors import LogprobsDiffer, UnusableRows
from agentlightning.trainers.torch import Gap, check_gap, collate, logprob_gap
from agentlightning.trajectory import Trajectory
from tests.trainers.rows import PAD, conversation, forked, with_masks

IDS = 20


def test_rows_are_padded_on_both_sides() -> None:
    batch = collate([conversation(), *forked(reward=0.5)], PAD)

    assert batch["input_ids"].tolist() == [
        [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 0, 0, 1, 2, 4, 5, 0, 0, 0, 0],
        [1, 2, 4, 6, 7, 8, 0, 0, 0, 0, 0],
    ]
    assert batch["prompts"].tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 1, 2], [1, 2, 4, 6, 7]]
    assert batch["responses"].tolist() == [[4, 5, 6, 7, 8, 9], [4, 5, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    ]
    assert batch["position_ids"].tolist() == [
        [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3],
        [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5],
    ]
    assert batch["response_mask"].tolist() == [[1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch["rewards"].tolist() == [[0, 0, 0, 0, 0, 1.0], [0, 0.5, 0, 0, 0, 0], [0.5, 0, 0, 0, 0, 0]]
    assert batch["logprobs"].tolist()[0] == pytest.approx([-0.04, -0.05, 0, -0.07, -0.08, -0.09])


def test_a_batch_is_what_a_loop_of_torch_makes() -> None:
    rows = [row for number in range(5) for row in (conversation(f"{number}"), *forked(f"{number}"))]

    batch = collate(rows, PAD, max_prompt_length=8, max_response_length=7)

    def padded(values: Any, before: int, after: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.nn.functional.pad(torch.tensor(list(values), dtype=dtype), (before, after), value=PAD)

    for line, row in enumerate(rows):
        prompt, response = row.token_ids[: row.prompt_length], row.token_ids[row.prompt_length :]
        before, after = 8 - len(prompt), 7 - len(response)
        expected = {
            "prompts": padded(prompt, before, 0, torch.int64),
            "responses": padded(response, 0, after, torch.int64),
            "response_mask": padded(row.response_mask[row.prompt_length :], 0, after, torch.int64),
            "logprobs": padded(row.logprobs[row.prompt_length :] if row.logprobs else (), 0, after, torch.float32),
        }
        for name, tensor in expected.items():
            assert torch.equal(batch[name][line], tensor), name


def test_without_torch_the_batch_is_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collate([conversation()], PAD)
    monkeypatch.setitem(sys.modules, "torch", None)

    batch = collate([conversation()], PAD)

    assert isinstance(batch["input_ids"], np.ndarray)
    assert all(batch[name].tolist() == expected[name].tolist() for name in batch)


def test_logprobs_are_those_of_all_rows_or_none() -> None:
    assert collate([conversation(logprobs=None)] * 2, PAD)["logprobs"] is None
    with pytest.raises(UnusableRows, match=r"rollout 'two' has no logprobs, but other rows have: .*AGL_LOGPROBS=on"):
        collate([conversation(), conversation("two", logprobs=None)], PAD)


def test_infinite_logprobs_are_not_passed_on() -> None:
    row = conversation()
    row.logprobs = array("f", [-math.inf] * len(row.token_ids))

    with pytest.raises(UnusableRows, match="row 0 of rollout 'ro' has infinite logprobs: leave the row out"):
        collate([row], PAD)
    with pytest.raises(UnusableRows, match="has infinite logprobs"):
        logprob_gap([row], MODEL)


class Model(torch.nn.Module):
    """A causal model that gives each id the same logits, whatever stood before it."""

    device = "cpu"

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.dropout, self.frozen = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval()

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.dropout(self.logits).expand(*input_ids.shape, -1))


def sampled_from(model: Model, temperature: float = 1.0, off: float = 0.0, **fields: Any) -> Trajectory:
    """Make a row with the logprobs that the model has at a temperature, and a difference to them."""
    logprobs = (model.logits / temperature).log_softmax(0)
    row = conversation(**fields)
    row.logprobs = array(
        "f",
        [
            float(logprobs[token_id]) + off if mask else 0.0
            for token_id, mask in zip(row.token_ids, row.response_mask, strict=True)
        ],
    )
    return row


MODEL = Model([math.sin(each) for each in range(IDS)])


def test_there_is_no_gap_where_engine_and_trainer_agree() -> None:
    gap = logprob_gap([sampled_from(MODEL)], MODEL)["3"]

    assert gap.tokens == 5
    assert gap.highest < 1e-6
    assert gap.effective == pytest.approx(1.0)


def test_dropout_is_no_gap_and_the_model_goes_on_in_its_mode() -> None:
    model = Model(MODEL.logits.tolist()).train()
    model.frozen.eval()

    assert logprob_gap([sampled_from(model)], model)["3"].highest < 1e-6
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


def test_logits_of_long_rows_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **kwargs or {})
            if func is torch.Tensor.logsumexp:
                sizes.append(tuple(args[0].shape))
            return found

    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr("agentlightning.trainers.torch.POSITIONS_AT_ONCE", 2)
    with Sizes():
        gap = logprob_gap([sampled_from(MODEL, off=0.25)], MODEL)["3"]

    assert sizes == [(2, IDS), (2, IDS), (1, IDS)]
    assert (gap.tokens, gap.mean) == (5, pytest.approx(0.25))


def test_a_gap_is_found_for_each_version_of_the_weights() -> None:
    unknown = sampled_from(MODEL, off=-0.5, weight_versions=None)
    rows = [sampled_from(MODEL), sampled_from(MODEL, off=0.25, weight_versions=[("4", 0, 1)]), unknown]

    gaps = logprob_gap(rows, MODEL)

    assert {name: (gap.tokens, pytest.approx(gap.mean, abs=1e-6)) for name, gap in gaps.items()} == {
        "3": (5, 0.0),
        # The first id of each answer; the other ones of that row are of no known version.
        "4": (2, 0.25),
        None: (8, (3 * 0.25 + 5 * 0.5) / 8),
    }
    assert gaps[None].highest == pytest.approx(0.5)
    assert gaps[None].effective < 1.0


def test_processed_logprobs_are_compared_at_the_temperature_of_the_answer() -> None:
    params = '{"temperature": 0.5}'
    row = sampled_from(MODEL, 0.5, logprobs_mode="processed_logprobs", sampling_params=params)
    raw = sampled_from(MODEL, 0.5, sampling_params=params)

    assert logprob_gap([row], MODEL)["3"].highest < 1e-6
    assert logprob_gap([raw], MODEL)["3"].highest > 0.1


def test_processed_logprobs_are_compared_among_the_ids_of_the_sampling_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentlightning.trainers.torch.POSITIONS_AT_ONCE", 2)
    row = with_masks("ro")
    assert row.sampling_mask is not None
    left = [*map(torch.tensor, row.sampling_mask.tolist())]
    chosen = [
        float(MODEL.logits[token_id] - MODEL.logits[ids].logsumexp(0)) if mask else 0.0
        for token_id, mask, ids in zip(row.token_ids, row.response_mask, left, strict=True)
    ]
    row.logprobs = array("f", chosen)

    assert logprob_gap([row], MODEL)["3"].highest < 1e-6
    assert logprob_gap([replace(row, logprobs_mode="raw_logprobs")], MODEL)["3"].highest > 0.1
    assert logprob_gap([replace(row, sampling_mask=None)], MODEL)["3"].highest > 0.1


def test_without_logprobs_there_is_no_gap_and_it_says_which_switch() -> None:
    with pytest.raises(UnusableRows, match=r"row 0 of rollout 'ro' has no logprobs: start vLLM with AGL_LOGPROBS=on"):
        logprob_gap([conversation(logprobs=None)], MODEL)


def test_a_gap_above_the_bound_names_the_causes() -> None:
    check_gap({"3": Gap(5, 0.001, 0.01, 1.0)}, 0.01)
    with pytest.raises(LogprobsDiffer, match=r"0\.2 \(mean\) and 3 \(highest\) over 5 ids of weights '4'.* reloaded"):
        check_gap({"3": Gap(5, 0.001, 0.01, 1.0), "4": Gap(5, 0.2, 3.0, 0.1)}, 0.01)
    with pytest.raises(LogprobsDiffer):
        check_gap({"4": Gap(5, math.nan, math.nan, math.nan)}, 0.01)
