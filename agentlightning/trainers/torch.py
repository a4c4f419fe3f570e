"""Trajectories as tensors, and how far the trainer's logprobs are from those of the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from agentlightning.errors import LogprobsDiffer
from agentlightning.generation import SamplingMask
from agentlightning.trainers._rows import check_rows, have_logprobs, logprobs_of, reward_of
from agentlightning.trajectory import Trajectory

__all__ = ["Batch", "Gap", "check_gap", "collate", "logprob_gap"]

POSITIONS_AT_ONCE = 1024


class Batch(TypedDict):
    """Rows of one shape: prompts are padded on the left, responses on the right. Each is a tensor, a line a row.

    Attributes:
        input_ids: prompts and responses; int64. `prompts` and `responses` are views of it.
        attention_mask: 1 for each id that is no padding; int64.
        position_ids: position in the row; 0 for padding on the left, the last position for that on the right; int64.
        response_mask: of the response, 1 for each id that is trained; int64.
        logprobs: of the response, 0.0 where the mask is 0; float32. None if no row has any.
        rewards: of the response, the reward at its last id, else 0.0; float32.
    """

    input_ids: Any
    prompts: Any
    responses: Any
    attention_mask: Any
    position_ids: Any
    response_mask: Any
    logprobs: Any
    rewards: Any


def collate(
    trajectories: Sequence[Trajectory],
    pad_id: int,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
) -> Batch:
    """Pad trajectories to one shape: of PyTorch's tensors where it is installed, otherwise of numpy's arrays.

    Args:
        pad_id: the tokenizer's `pad_token_id`.
        max_prompt_length: ids to the left of the first sampled one; None for those of the longest prompt.
        max_response_length: ids from there on; None for those of the longest response.

    Raises:
        UnusableRows: a row is longer, has no reward, is of another model, or has no logprobs as others do; see
            `check_rows` and `have_logprobs`.
    """
    check_rows(trajectories, max_prompt_length=max_prompt_length, max_response_length=max_response_length)
    before = max_prompt_length or max(row.prompt_length for row in trajectories)
    after = max_response_length or max(len(row.token_ids) - row.prompt_length for row in trajectories)
    count, width = len(trajectories), before + after
    input_ids = np.full((count, width), pad_id, np.int64)
    attention_mask, position_ids = np.zeros((2, count, width), np.int64)
    response_mask = np.zeros((count, after), np.int64)
    rewards = np.zeros((count, after), np.float32)
    logprobs = np.zeros((count, after), np.float32) if have_logprobs(trajectories) else None
    for line, row in enumerate(trajectories):
        length, prompt = len(row.token_ids), row.prompt_length
        start, response = before - prompt, length - prompt
        end = start + length
        input_ids[line, start:end] = np.frombuffer(row.token_ids, np.int32)
        attention_mask[line, start:end] = 1
        position_ids[line, start:end] = np.arange(length)
        position_ids[line, end:] = length - 1
        response_mask[line, :response] = np.frombuffer(row.response_mask, np.int8)[prompt:]
        rewards[line, response - 1] = reward_of(row)
        if logprobs is not None and row.logprobs is not None:
            logprobs[line, :response] = np.frombuffer(row.logprobs, np.float32)[prompt:]
    ids, mask, positions, trained, at_the_end = map(
        _tensor, (input_ids, attention_mask, position_ids, response_mask, rewards)
    )
    return Batch(
        input_ids=ids,
        prompts=ids[:, :before],
        responses=ids[:, before:],
        attention_mask=mask,
        position_ids=positions,
        response_mask=trained,
        logprobs=None if logprobs is None else _tensor(logprobs),
        rewards=at_the_end,
    )


@dataclass(frozen=True, slots=True)
class Gap:
    """Difference between the logprobs of the engine and of the trainer, over the trained ids of one weight version.

    Attributes:
        tokens: number of ids.
        mean, highest: of the absolute differences.
        effective: effective sample size of the importance weights, as a share: 1 where all weights are equal.
    """

    tokens: int
    mean: float
    highest: float
    effective: float


def logprob_gap(trajectories: Sequence[Trajectory], model: Any) -> dict[str | None, Gap]:
    """Compare the recorded logprobs with those that the trainer's model gives to the same ids.

    With the weights that the engine had, only rounding differs. Where vLLM's logprobs are processed ones, the
    temperature of each answer is applied, and only the ids of the row's sampling masks are left; penalties, and what
    was cut off without a mask, are in the difference.

    Args:
        model: a causal language model of transformers, or another module that returns `logits` for `input_ids`. It is
            evaluated without dropout, and keeps its mode.

    Returns:
        A gap for each weight version; None for ids whose version is unknown.

    Raises:
        UnusableRows: a row has no logprobs, or infinite ones.
    """
    import torch

    found: dict[str | None, list[Any]] = defaultdict(list)
    for row in trajectories:
        recorded = np.frombuffer(logprobs_of(row), np.float32)
        trained = 1 + np.flatnonzero(np.frombuffer(row.response_mask, np.int8)[1:])
        with torch.no_grad(), _evaluating(model):
            difference = _logprobs(row, trained, model) - recorded[trained]
        versions = np.full(len(row.token_ids), -1)
        names: list[str | None] = [name for name, _, _ in row.weight_versions or ()]
        for number, (_, start, end) in enumerate(row.weight_versions or ()):
            versions[start:end] = number
        for number, name in enumerate([*names, None]):
            found[name].append(difference[versions[trained] == (number if name is not None else -1)])
    gaps = {name: np.concatenate(each) for name, each in found.items()}
    return {name: _gap(each) for name, each in gaps.items() if len(each)}


def check_gap(gaps: Mapping[str | None, Gap], bound: float) -> None:
    """Refuse to go on where a mean difference is above the bound.

    Raises:
        LogprobsDiffer: the message names what may be the cause.
    """
    for version, gap in gaps.items():
        if not gap.mean <= bound:
            raise LogprobsDiffer(
                f"the logprobs of engine and trainer differ by {gap.mean:.3g} (mean) and {gap.highest:.3g} (highest) "
                f"over {gap.tokens} ids of weights {version!r}, more than {bound:g}",
                "the engine may not have the trainer's weights (were they reloaded, with a head of their own? vLLM's "
                "CPU build keeps tied embeddings); its prefix cache may hold older weights (reset it); dtype or "
                "kernels may differ; a grammar or top-p may have limited the ids (see logprobs_mode)",
            )


def _logprobs(row: Trajectory, positions: Any, model: Any) -> Any:
    """Return the logprobs that the model gives to the ids at these positions, in the order of the positions.

    In parts: in float32 and for all ids at once, they take several times the memory of the model's own logits.
    """
    import torch

    ids = torch.from_numpy(np.frombuffer(row.token_ids, np.int32).astype(np.int64)).to(model.device)
    temperatures = torch.from_numpy(_temperatures(row)).to(model.device)
    masks = row.sampling_mask if (row.logprobs_mode or "").startswith("processed") else None
    all_logits = model(input_ids=ids[None]).logits[0]
    found = [torch.zeros(0)]
    for part in torch.from_numpy(positions).to(model.device).split(POSITIONS_AT_ONCE):
        logits = all_logits[part - 1].float() / temperatures[part, None]
        if masks is not None:
            left, counts = _left_at(masks, part.cpu().numpy())
            lines = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(model.device)
            # An id without any was chosen from all.
            is_left = torch.from_numpy(counts == 0).to(model.device)[:, None].repeat(1, logits.shape[1])
            is_left[lines, torch.from_numpy(left).to(model.device)] = True
            logits = logits.masked_fill(~is_left, -torch.inf)
        found.append((logits.gather(1, ids[part, None])[:, 0] - logits.logsumexp(1)).cpu())
    return torch.cat(found).numpy()


def _left_at(masks: SamplingMask, positions: Any) -> tuple[Any, Any]:
    """Return the ids that those at these positions were chosen from, one position after the other, and their counts."""
    offsets = np.frombuffer(masks.offsets, np.uint32).astype(np.int64)
    starts, counts = offsets[positions], np.diff(offsets)[positions]
    places = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    return np.frombuffer(masks.ids, np.int32)[places].astype(np.int64), counts


@contextmanager
def _evaluating(model: Any) -> Generator[None]:
    """Switch off dropout, and restore the mode of each module: some of a model may be frozen in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _gap(difference: Any) -> Gap:
    weights = np.exp(difference.astype(np.float64))
    effective = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
    size = np.abs(difference)
    return Gap(len(size), float(size.mean()), float(size.max()), effective)


def _temperatures(row: Trajectory) -> Any:
    found = np.ones(len(row.token_ids), np.float32)
    for answer in row.spans:
        if (answer.logprobs_mode or "").startswith("processed") and answer.sampling:
            # At 0 vLLM samples greedily, and reports what it would at 1.
            found[answer.start : answer.end] = answer.sampling["temperature"] or 1.0
    return found


def _tensor(values: Any) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        return values
    return torch.from_numpy(values)
