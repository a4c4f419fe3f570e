"""Rows, as trainers take them: ids with a mask, the answers in them, and the calls that are in no row."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from agentlightning.generation import (
    VERSION,
    RoutedExperts,
    SamplingMask,
    Status,
    named,
    unnamed,
    with_arrays,
    with_lists,
)

__all__ = ["FLAGS", "Answer", "Flag", "LeftOut", "Merged", "Parent", "Reason", "Trajectory"]

Flag = Literal[
    "aborted",
    "truncated",
    "retried",
    "ambiguous",
    "mixed_weights",
    "mixed_sampling",
    "no_mask",
    "missing_call",
    "drifted",
    "cut",
    "bad_reward",
]
"""A reason to look twice at a row; see `Trajectory`."""
FLAGS: tuple[Flag, ...] = get_args(Flag)
Reason = Literal["without_ids", "empty_answer", "retried", "too_long"]
"""A reason why a call is in no row; see `LeftOut`."""


@dataclass(slots=True)
class Answer:
    """An answer in a trajectory. An unknown field is None.

    Attributes:
        generation_id, index: the generation, and the position of the choice in it.
        start, end: positions in `token_ids` of its first id, and behind its last one. Where the row was realigned or
            cut, the answer is shorter here than it was.
        is_trained: whether it is trained in this row, and so has a mask of 1; otherwise it is in another row, too.
        reward: the call's own.
        logprobs_mode: the kind of its logprobs, in vLLM's words: `raw_logprobs`, ...
        sampling: the parameters that change the distribution that ids are drawn from, by vLLM's names; see `SAMPLING`.
    """

    generation_id: str
    index: int
    start: int
    end: int
    is_trained: bool
    status: Status
    finish_reason: str | None
    reward: float | None
    logprobs_mode: str | None
    sampling: dict[str, Any] | None


@dataclass(slots=True, frozen=True)
class LeftOut:
    """A call of the attempt that is in none of its rows.

    Attributes:
        reason: `without_ids` (its prompt has embeddings, or its ids were not recorded), `empty_answer` (nothing was
            sampled), `retried` (another call with the same prompt was kept), `too_long` (a limit cut all of it off).
        reward: the call's own, which is lost with it.
    """

    generation_id: str
    index: int
    reason: Reason
    reward: float | None


@dataclass(slots=True, frozen=True)
class Parent:
    """The row that a row branched from.

    Attributes:
        index: that row's `index`.
        position: where both go apart: all ids before it are those of both rows.
    """

    index: int
    position: int


@dataclass(slots=True, kw_only=True)
class Trajectory:
    """A sequence of ids with a mask, made of one call or more of an attempt. An unknown field is None.

    Attributes:
        rollout_id, attempt_id: where its calls belong.
        index, count: which row of the attempt it is, from 0, and of how many. Filters leave both unchanged.
        parent: the row that it branched from; None where it begins anew.
        token_ids: prompt, answers, and what stood between them, exactly as the engine had them; `array('i')`.
        response_mask: one for each id: 1 where the model sampled it and it is trained in this row, else 0;
            `array('b')`.
        logprobs: one for each id: the sampled logprob where the mask is 1, else 0.0; `array('f')`. None as a whole
            where any is unknown.
        prompt_length: number of ids before the first sampled one.
        spans: its answers, in order.
        reward: the attempt's final reward.
        rewards: `(position, reward)` of each trained answer that has a reward of its own; the position is that of its
            last id.
        model: the one that answered, by whatever name the client asked for it. Calls of two are never in one row.
        agent_id: the agent of its calls. Calls of two agents are never in one row, nor is one that names no agent in
            the row of one that does.
        parent_agent_id, purpose: those of all calls; None where they differ, or one is unknown.
        weight_versions: `(version, start, end)`: the weights that these positions were sampled with.
        routed_experts: those of each id, by its position: of the first call that has them, or -1.
        missing_experts: number of positions that no call gave, with the last one, which was never fed to the model.
        sampling_mask: for each trained id those that it was chosen from, for others none. None as a whole where it is
            unknown for one of them.
        logprobs_mode, temperature: those of all trained answers; None where they differ, or one is unknown.
        flags: why it is to be looked at twice, in the order of `FLAGS`: an answer ended early because its client hung
            up or the engine failed (`aborted`), or because of a limit of the engine (`truncated`); several calls had
            the same prompt, and none was continued (`retried`); several calls could be the one that was continued, so
            none was chosen (`ambiguous`); weights or sampling parameters changed in it (`mixed_weights`,
            `mixed_sampling`); its logprobs are of what top-p, top-k and min-p had left, which is unknown (`no_mask`); a
            call of the attempt has no ids here (`missing_call`); a prompt differs from an answer that it repeats
            (`drifted`); ids were cut off by a limit of the caller (`cut`); a reward is infinite or not a number, and
            therefore None (`bad_reward`).
        left_out: calls of the attempt that are in no row; the first of its rows that are returned has them.
        input, metadata: those of the rollout.
        group: equal for all rollouts of one task; see `group_of`.
    """

    rollout_id: str | None
    attempt_id: str | None
    index: int
    count: int
    parent: Parent | None
    token_ids: array[int]
    response_mask: array[int]
    logprobs: array[float] | None
    prompt_length: int
    spans: list[Answer]
    reward: float | None
    rewards: list[tuple[int, float]]
    model: str | None
    agent_id: str | None
    parent_agent_id: str | None
    purpose: str | None
    weight_versions: list[tuple[str, int, int]] | None
    routed_experts: RoutedExperts | None
    missing_experts: int | None
    sampling_mask: SamplingMask | None
    logprobs_mode: str | None
    temperature: float | None
    flags: list[Flag]
    left_out: list[LeftOut]
    input: Any
    metadata: dict[str, Any] | None
    group: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with lists in the place of arrays, and dictionaries in that of tuples."""
        found = with_lists(self)
        for name in ("spans", "left_out"):
            found[name] = [asdict(each) for each in found[name]]
        found["parent"] = None if self.parent is None else asdict(self.parent)
        found["rewards"] = named(_REWARD, self.rewards)
        if self.weight_versions is not None:
            found["weight_versions"] = named(VERSION, self.weight_versions)
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Trajectory:
        """Restore a trajectory from the JSON object of `as_dict`, in which a logprob of null is negative infinity.

        Raises:
            KeyError, TypeError, ValueError: the object is not a trajectory.
        """
        values = with_arrays(cls, found)
        values["response_mask"] = array("b", values["response_mask"])
        values["spans"] = [Answer(**each) for each in values["spans"]]
        values["left_out"] = [LeftOut(**each) for each in values["left_out"]]
        values["parent"] = None if values["parent"] is None else Parent(**values["parent"])
        values["rewards"] = unnamed(_REWARD, values["rewards"])
        if values["weight_versions"] is not None:
            values["weight_versions"] = unnamed(VERSION, values["weight_versions"])
        return cls(**values)


_REWARD = ("position", "reward")


class Merged(NamedTuple):
    """The rows of an attempt, and the calls that are in none of them."""

    rows: list[Trajectory]
    left_out: list[LeftOut]
