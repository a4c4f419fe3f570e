"""The cost of making a batch of tensors: `collate`, beside a loop that makes a tensor of each list, as trainers do."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from agentlightning.trainers.torch import collate
from agentlightning.trajectory import AttemptCalls, Call, Trajectory, merge
from benchmarks.environments import interleaved
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say

ROWS, QUICK_ROWS = 512, 64
PROMPT, RESPONSE = 16_000, 16_000
ROUNDS, QUICK_ROUNDS = 6, 3
PAD = 0
LOOP, OURS = "a loop of torch.tensor", "collate"


def measure(quick: bool) -> Part:
    """Both, in another order each time."""
    say("collate")
    rows = trajectories(QUICK_ROWS if quick else ROWS)
    ways: dict[str, Callable[[Sequence[Trajectory]], Any]] = {LOOP: by_loop, OURS: lambda rows: collate(rows, PAD)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    busy = BusyMeter()
    with busy.running():
        check_equal(rows[:2])
        for name in interleaved(list(ways), QUICK_ROUNDS if quick else ROUNDS, "collating, timed"):
            started = time.thread_time()
            ways[name](rows)
            speeds[name].append(len(rows) / (time.thread_time() - started))
    found = [
        Row.of(name, values, speeds[LOOP], Target(5, at_least=True) if name == OURS else None)
        for name, values in speeds.items()
    ]
    about = f"{len(rows)} rows of {PROMPT + RESPONSE:,} ids; processor time, of one thread."
    return Part("Batches of tensors", "", [Section("collating", "rows a second", about, found)], busy.share_of_others())


def trajectories(count: int) -> list[Trajectory]:
    """Make rows of one call each, with logprobs."""
    call = Call(
        generation_id="1",
        finished_at=1,
        finish_reason="stop",
        model="m",
        prompt_token_ids=array("i", range(PROMPT)),
        response_token_ids=array("i", range(RESPONSE)),
        logprobs=array("f", [-0.5]) * RESPONSE,
    )
    [row] = merge(AttemptCalls(calls=[call], rollout_id="ro", reward=1.0)).rows
    return [replace(row) for _ in range(count)]


def by_loop(rows: Sequence[Trajectory]) -> dict[str, torch.Tensor]:
    """Make the same batch as `collate`: of each row a tensor, padded to the longest."""
    before = max(row.prompt_length for row in rows)
    after = max(len(row.token_ids) - row.prompt_length for row in rows)
    found: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("input_ids", "attention_mask", "position_ids", "response_mask", "logprobs", "rewards")
    }
    for row in rows:
        start, length = row.prompt_length, len(row.token_ids)
        around = (before - start, after - (length - start))
        behind = (0, around[1])
        ids = torch.tensor(row.token_ids.tolist())
        logprobs = [] if row.logprobs is None else row.logprobs[start:].tolist()
        rewards = torch.zeros(length - start)
        rewards[-1] = row.reward or 0.0
        attended = pad(torch.ones_like(ids), around)
        found["input_ids"].append(pad(ids, around, value=PAD))
        found["attention_mask"].append(attended)
        found["position_ids"].append((attended.cumsum(0) - 1).clamp(min=0))
        found["response_mask"].append(pad(torch.tensor(row.response_mask[start:].tolist()), behind))
        found["logprobs"].append(pad(torch.tensor(logprobs), behind))
        found["rewards"].append(pad(rewards, behind))
    return {name: torch.stack(each) for name, each in found.items()}


def check_equal(rows: Sequence[Trajectory]) -> None:
    """Fail unless both make the same batch."""
    batch: Any = collate(rows, PAD)
    for name, tensor in by_loop(rows).items():
        assert torch.equal(batch[name], tensor), name
