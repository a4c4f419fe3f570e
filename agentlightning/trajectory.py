"""Trajectories, which trainers take: the calls of an attempt, merged into rows of ids with a mask.

Pure functions over calls: no store, no HTTP, no tensors. `docs/trajectories.md` explains them with a picture.

The merging rests on one fact: an answer that was sampled in the context of another call's prompt and answer has these
as the beginning of its own prompt, id by id. So a row is the prompt and the answer of its last call, and every earlier
call of the row is a range of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, get_args

from agentlightning.generation import RoutedExperts, Status

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "DRIFTS",
    "FLAGS",
    "SAMPLING",
    "Answer",
    "AttemptCalls",
    "Call",
    "Drift",
    "Flag",
    "LeftOut",
    "MergeOptions",
    "Merged",
    "Parent",
    "Reason",
    "Trajectory",
    "check_options",
    "group_of",
    "merge",
    "sampling_of",
    "was_sampled_with",
]

Drift = Literal["fork", "realign", "trajectory", "transition"]
"""Treatment of a prompt that breaks the context that it should extend; see `MergeOptions`."""
DRIFTS: tuple[Drift, ...] = get_args(Drift)
Flag = Literal[
    "aborted",
    "truncated",
    "retried",
    "ambiguous",
    "mixed_weights",
    "mixed_sampling",
    "missing_call",
    "drifted",
    "cut",
    "bad_reward",
]
"""Why a row is to be looked at twice; see `Trajectory`."""
FLAGS: tuple[Flag, ...] = get_args(Flag)
Reason = Literal["without_ids", "empty_answer", "retried", "too_long"]
"""Why a call is in no row: see `LeftOut`."""

ID_BYTES = 4
DRIFT_LIMIT = 8
# Fields of vLLM's SamplingParams, which a recorded call leaves out where they have these defaults.
SAMPLING: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
}


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A choice of a generation, as `merge` takes it. An unknown field is None.

    Attributes:
        generation_id, index: the generation, and the position of the choice in it. Together they are unique.
        call_id: the HTTP call; generations that share it are no retries of one another. None: the generation's own.
        finished_at: nanoseconds since the epoch, by the clock of vLLM's host.
        agent_id, parent_agent_id, purpose, retry: as in a `Generation`.
        prompt_token_ids, response_token_ids: the ids that went into the model, and those that it sampled; `array('i')`.
        logprobs: one for each of `response_token_ids`; `array('f')`.
        reward: the call's own.
        weight_versions: `(version, start, end)`, as in a `Choice`.
        routed_experts: those of the ids of prompt and answer, as far as vLLM returns them.
        sampling_params: JSON, as in a `Generation`.
    """

    generation_id: str
    index: int = 0
    call_id: str | None = None
    finished_at: int = 0
    status: Status = "finished"
    finish_reason: str | None = None
    model: str | None = None
    agent_id: str | None = None
    parent_agent_id: str | None = None
    purpose: str | None = None
    retry: int | None = None
    prompt_token_ids: array[int] | None = None
    response_token_ids: array[int] | None = None
    logprobs: array[float] | None = None
    reward: float | None = None
    weight_versions: Sequence[tuple[str, int, int]] | None = None
    routed_experts: RoutedExperts | None = None
    logprobs_mode: str | None = None
    sampling_params: str | None = None


@dataclass(slots=True, kw_only=True)
class AttemptCalls:
    """The calls of one attempt, and what is known of it. An unknown field is None.

    Attributes:
        calls: in any order.
        reward: the final reward.
        missing: number of calls that are known to be missing.
        input, metadata: those of the rollout.
    """

    calls: Sequence[Call]
    rollout_id: str | None = None
    attempt_id: str | None = None
    reward: float | None = None
    missing: int = 0
    input: Any = None
    metadata: Mapping[str, Any] | None = None


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
        model: the name that the client asked for. Calls of two models are never in one row.
        agent_id: the agent of its calls. Calls of two agents are never in one row, nor is one that names no agent in
            the row of one that does.
        parent_agent_id, purpose: those of all calls; None where they differ, or one is unknown.
        weight_versions: `(version, start, end)`: the weights that these positions were sampled with.
        routed_experts: those of the first ids, as far as they are known without a gap.
        logprobs_mode, temperature: those of all trained answers; None where they differ, or one is unknown.
        flags: why it is to be looked at twice, in the order of `FLAGS`: an answer ended early because its client hung
            up or the engine failed (`aborted`), or because of a limit of the engine (`truncated`); several calls had
            the same prompt, and none was continued (`retried`); several calls could be the one that was continued, so
            none was chosen (`ambiguous`); weights or sampling parameters changed in it (`mixed_weights`,
            `mixed_sampling`); a call of the attempt has no ids here (`missing_call`); a prompt differs from an answer
            that it repeats (`drifted`); ids were cut off by a limit of the caller (`cut`); a reward is infinite or not
            a number, and therefore None (`bad_reward`).
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
    logprobs_mode: str | None
    temperature: float | None
    flags: list[Flag]
    left_out: list[LeftOut]
    input: Any
    metadata: dict[str, Any] | None
    group: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with lists in the place of arrays, and dictionaries in that of tuples."""
        found: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        for name in ("token_ids", "response_mask", "logprobs", "routed_experts"):
            if found[name] is not None:
                found[name] = found[name].tolist()
        for name in ("spans", "left_out"):
            found[name] = [asdict(each) for each in found[name]]
        found["parent"] = None if self.parent is None else asdict(self.parent)
        found["rewards"] = [dict(zip(_REWARD, each, strict=True)) for each in self.rewards]
        if self.weight_versions is not None:
            found["weight_versions"] = [dict(zip(_VERSION, each, strict=True)) for each in self.weight_versions]
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Trajectory:
        """Restore a trajectory from the JSON object of `as_dict`, in which a logprob of null is negative infinity.

        Raises:
            KeyError, TypeError, ValueError: the object is not a trajectory.
        """
        values = {name: found[name] for name in cls.__slots__}
        values["token_ids"] = array("i", values["token_ids"])
        values["response_mask"] = array("b", values["response_mask"])
        if values["logprobs"] is not None:
            values["logprobs"] = array("f", [-math.inf if each is None else each for each in values["logprobs"]])
        values["spans"] = [Answer(**each) for each in values["spans"]]
        values["left_out"] = [LeftOut(**each) for each in values["left_out"]]
        values["parent"] = None if values["parent"] is None else Parent(**values["parent"])
        values["rewards"] = [tuple(each[name] for name in _REWARD) for each in values["rewards"]]
        if values["weight_versions"] is not None:
            values["weight_versions"] = [tuple(each[name] for name in _VERSION) for each in values["weight_versions"]]
        if (experts := values["routed_experts"]) is not None:
            shape = (len(experts), len(experts[0]), len(experts[0][0])) if experts else (0, 0, 0)
            flat = array("h", [each for of_id in experts for layer in of_id for each in layer])
            values["routed_experts"] = RoutedExperts(shape, flat)
        return cls(**values)


_REWARD = ("position", "reward")
_VERSION = ("version", "start", "end")


class MergeOptions(TypedDict, total=False):
    """How calls become rows, and which rows are kept. Filters choose rows before it is decided which row trains an
    answer that several share, so that no answer is lost with a row that is left out.

    Attributes:
        drift: what becomes of a prompt that breaks the context that it should extend. `fork`, the default, or
            `trajectory`: it begins a row of its own. `realign`: where only the end of the last answer differs, the row
            goes on, with that end overwritten from the prompt, and masked. `transition`: each call is a row.
        drift_limit: most ids that `realign` overwrites; 8 by default.
        status: rows whose calls all have this status.
        model: rows of this model.
        agent_id: rows of this agent; None for rows whose calls all name none.
        parent_agent_id, purpose, retry: rows whose calls all say this of their callers; None where they say nothing.
        min_reward: rows whose reward is at least this.
        weight_version: rows of which every sampled id is known to be of this version.
        max_staleness: with `weight_version`, which must be an integer: versions up to so many smaller count, too.
        complete: rows without the flags `aborted`, `truncated`, `cut` and `missing_call`.
        max_length: most ids of a row; what is behind is cut off.
        max_prompt_length: rows with a longer prompt are left out, since nothing of them was sampled in less context.
        max_response_length: most ids from `prompt_length` on; what is behind is cut off.
    """

    drift: Drift
    drift_limit: int
    status: Status
    model: str
    agent_id: str | None
    parent_agent_id: str | None
    purpose: str | None
    retry: int | None
    min_reward: float
    weight_version: str
    max_staleness: int
    complete: bool
    max_length: int
    max_prompt_length: int
    max_response_length: int


class Merged(NamedTuple):
    """The rows of an attempt, and the calls that are in none of them."""

    rows: list[Trajectory]
    left_out: list[LeftOut]


def group_of(input: Any, metadata: Mapping[str, Any] | None) -> str | None:  # noqa: A002 -- the LightningStore's name
    """Return what groups the rollouts of one task, as GRPO needs it.

    That is the text or number `group` of the metadata, or else a digest of the input: rollouts with an equal input have
    the same. None for a rollout without input.
    """
    named = (metadata or {}).get("group")
    if isinstance(named, (str, int)) and not isinstance(named, bool):
        return str(named)
    if input is None:
        return None
    canonical = json.dumps(input, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode(errors="replace")).hexdigest()[:32]


def merge(attempt: AttemptCalls, **options: Unpack[MergeOptions]) -> Merged:
    """Merge the calls of an attempt into rows. The result does not depend on the order of the calls.

    - A call's parent is the call whose prompt and answer are the longest exact prefix of its prompt. If several calls
      are that, and choosing another one would make other rows, none is chosen, and the row is `ambiguous`.
    - Calls with the same prompt are retries: those that were continued are kept. If none was, the last one that ended
      by itself is kept, or else the last, and the row is `retried`.
    - Calls of two models, or of two agents, are never in one row. A call that names no agent may be in a row of any.
    - Each path from a root to a leaf is a row, ordered by when calls finished: first the whole tree of the first root.
      Each choice is a branch. An answer that several rows share is trained in the first one that has all of it.

    Raises:
        ValueError: an option has a value that makes no sense; the message is a sentence.
    """
    check_options(options)
    left_out: list[LeftOut] = []
    nodes = _nodes(attempt.calls, left_out)
    limit = options.get("drift_limit", DRIFT_LIMIT) if options.get("drift") == "realign" else 0
    by_model: defaultdict[str | None, list[_Node]] = defaultdict(list)
    for node in nodes:
        by_model[node.call.model].append(node)
    roots: list[_Node] = []
    for some in by_model.values():
        prompts = _link(some, limit)
        for prompt in prompts:
            left_out += [_left_out(node.call, "retried") for node in prompt.resolve()]
        roots += [node for prompt in prompts if prompt.parent is None for node in prompt.nodes]
    paths = _paths(roots, each_call=options.get("drift") == "transition")
    maker = _Maker(attempt, paths, bool(attempt.missing) or any(each.reason == "without_ids" for each in left_out))
    rows = maker.rows(options, left_out)
    left_out.sort(key=lambda each: (each.generation_id, each.index))
    for node in nodes:
        # Nodes and prompts refer to each other, so they are freed late; the ids are most of their memory.
        node.ids = b""
    return Merged(rows, left_out)


def check_options(options: MergeOptions) -> None:
    """Check the values of options.

    Raises:
        ValueError: one makes no sense; the message is a sentence.
    """
    drift: Any = options.get("drift", "fork")
    if drift not in DRIFTS:
        raise ValueError(f"drift: {drift!r} is not one of {', '.join(DRIFTS)}")
    for name in ("drift_limit", "max_length", "max_prompt_length", "max_response_length", "max_staleness"):
        if (value := options.get(name)) is not None and value < 0:
            raise ValueError(f"{name}: must not be negative, as {value} is")
    if options.get("max_staleness") is not None:
        version = options.get("weight_version")
        if version is None or _integer(version) is None:
            raise ValueError("max_staleness: needs a weight_version that is an integer, to count from")


def was_sampled_with(
    versions: Iterable[tuple[str, int, int]] | None, count: int, wanted: str, max_staleness: int | None = None
) -> bool:
    """Tell whether the first ids of an answer are all known to be sampled with a version of the weights.

    Args:
        versions: `(version, start, end)`, as in a `Choice`.
        count: number of ids.
        max_staleness: integer versions that are up to so many smaller count, too.
    """
    known = 0
    for start, end, version in sorted((start, end, version) for version, start, end in versions or ()):
        if start > known or known >= count:
            break
        if version != wanted:
            behind = _integer(version)
            if max_staleness is None or behind is None or not 0 <= (_integer(wanted) or 0) - behind <= max_staleness:
                return False
        known = max(known, end)
    return known >= count


@dataclass(slots=True, eq=False)
class _Node:
    """A call with an answer, in the tree.

    Attributes:
        ids: its prompt and answer, as bytes, which compare and slice at the speed of memory.
        start, stop: number of ids of the prompt, and of both.
        children: the prompts that continue it.
    """

    call: Call
    ids: bytes
    start: int
    stop: int
    prompt: _Prompt = field(init=False)
    children: list[_Prompt] = field(default_factory=list["_Prompt"])

    @property
    def order(self) -> tuple[int, str, int]:
        return self.call.finished_at, self.call.generation_id, self.call.index


@dataclass(slots=True, eq=False)
class _Prompt:
    """Calls with the same prompt, which name the same agent, or none.

    Attributes:
        agent_id: the agent that they name, or else one before them in their row.
        parent: the call that it continues.
        shared: number of ids of it that are its parent's prompt and answer; less than all of them if it is realigned.
        broken: a call whose prompt it begins with, but whose answer it only begins to repeat.
        agrees: number of its ids that agree with that call.
    """

    nodes: list[_Node]
    agent_id: str | None = None
    parent: _Node | None = None
    shared: int = 0
    broken: _Node | None = None
    agrees: int = 0
    is_ambiguous: bool = False
    is_retried: bool = False
    is_realigned: bool = False

    def shares_row(self, other: _Prompt) -> bool:
        """Tell whether calls of both may be in one row: they do not name two agents."""
        return self.agent_id is None or other.agent_id is None or self.agent_id == other.agent_id

    def resolve(self) -> list[_Node]:
        """Choose between retries; returns the nodes of those that are not kept."""
        calls: defaultdict[str, list[_Node]] = defaultdict(list)
        for node in self.nodes:
            calls[node.call.call_id or node.call.generation_id].append(node)
        if len(calls) == 1:
            return []
        continued = [some for some in calls.values() if any(node.children for node in some)]
        self.is_retried = not continued
        kept = continued or [max(calls.values(), key=lambda some: max(map(_certainty, some)))]
        stays = {id(node) for some in kept for node in some}
        gone = [node for node in self.nodes if id(node) not in stays]
        self.nodes = [node for node in self.nodes if id(node) in stays]
        return gone


def _certainty(node: _Node) -> tuple[Any, ...]:
    """Sort retries: the last finished comes last, and an answer that its client never saw comes before all others."""
    return node.call.status == "finished", *node.order


def _nodes(calls: Iterable[Call], left_out: list[LeftOut]) -> list[_Node]:
    found: list[_Node] = []
    for call in calls:
        if call.prompt_token_ids is None or call.response_token_ids is None:
            left_out.append(_left_out(call, "without_ids"))
        elif not call.response_token_ids:
            left_out.append(_left_out(call, "empty_answer"))
        else:
            prompt, answer = call.prompt_token_ids, call.response_token_ids
            found.append(_Node(call, b"".join((prompt, answer)), len(prompt), len(prompt) + len(answer)))
    found.sort(key=lambda node: node.order)
    return found


def _left_out(call: Call, reason: Reason) -> LeftOut:
    return LeftOut(call.generation_id, call.index, reason, _finite(call.reward))


@dataclass(slots=True, eq=False)
class _Prefix:
    """A prefix of the sequence that is looked at: a prompt, or prompt and answer, or both.

    Attributes:
        length: number of ids.
        below: the longest prefix below this one that is prompt and answer of a call.
        shorter: the longest prefix below this one that is a prompt.
        reach: length of the longest prompt and answer among the calls of all prompts up to this one.
        contexts: calls of which it is prompt and answer.
        prompts: it is the prompt of these, one for each agent.
    """

    length: int
    below: _Prefix | None
    shorter: _Prefix | None
    reach: int
    contexts: list[_Node] = field(default_factory=list[_Node])
    prompts: list[_Prompt] = field(default_factory=list[_Prompt])

    def context_of(self, prompt: _Prompt) -> _Prefix | None:
        """Return the longest prefix up to this one that is prompt and answer of a call which a prompt may continue."""
        found: _Prefix | None = self
        while found and not any(prompt.shares_row(node.prompt) for node in found.contexts):
            found = found.below
        return found


def _link(nodes: Iterable[_Node], limit: int) -> list[_Prompt]:
    """Group calls by their prompts, and find the parent of each prompt.

    In the order of their bytes, the prefixes of a sequence stand before it. A stack holds all of them: those that are
    longer than what a sequence and the one before it have in common are taken off.

    Args:
        limit: most ids by which an answer may differ at its end, for its prompt to be realigned.
    """
    in_order = sorted(nodes, key=lambda node: node.ids)
    agree = [-1, *(_common(*pair, 0) for pair in pairwise(in_order))]
    prompts = _prompts(in_order, agree)
    # Each prefix stands at the first sequence that begins with it, the shorter first; of equal ones, answers first.
    items: list[tuple[int, int, bool, _Node | _Prompt]] = []
    items += [(first, length, True, prompt) for (first, length, _), prompt in prompts.items()]
    first = 0
    for position, node in enumerate(in_order):
        if agree[position] != node.stop:
            first = position
        items.append((first, node.stop, False, node))
    items.sort(key=lambda item: item[:3])
    stack: list[_Prefix] = []
    looked_at = -1
    for first, length, _, item in items:
        while looked_at != first and stack and stack[-1].length > agree[first]:
            stack.pop()
        looked_at = first
        if not stack or stack[-1].length < length:
            below = stack[-1] if stack else _Prefix(-1, None, None, 0)
            context = below if below.contexts else below.below
            stack.append(_Prefix(length, context, below if below.prompts else below.shorter, below.reach))
        prefix = stack[-1]
        if isinstance(item, _Node):
            prefix.contexts.append(item)
        else:
            _place(item, prefix, limit)
            prefix.prompts.append(item)
            prefix.reach = max(prefix.reach, *(node.stop for node in item.nodes))
    return [*prompts.values()]


def _prompts(in_order: Sequence[_Node], agree: Sequence[int]) -> dict[tuple[int, int, str | None], _Prompt]:
    """Group calls by prompt and agent: by the position of the first sequence that begins with it, its length and name.

    Args:
        agree: for each sequence, how many ids it has in common with the one before.
    """
    found: dict[tuple[int, int, str | None], _Prompt] = {}
    # The positions up to this one behind which all sequences agree further, and how far those there do.
    positions, common = list[int](), list[int]()
    for position, node in enumerate(in_order):
        while common and common[-1] >= agree[position]:
            common.pop()
            positions.pop()
        common.append(agree[position])
        positions.append(position)
        first = positions[bisect_left(common, node.start) - 1]
        agent = node.call.agent_id
        node.prompt = found.setdefault((first, node.start, agent), _Prompt([], agent))
        node.prompt.nodes.append(node)
    return found


def _place(prompt: _Prompt, prefix: _Prefix, limit: int) -> None:
    """Decide which call a prompt continues.

    Args:
        prefix: the prompt's own, with those below it.
    """
    exact = prefix.context_of(prompt)
    best = exact.length if exact else 0
    found: list[_Node] = []
    other = prefix.shorter
    ids = prompt.nodes[0].ids[: prefix.length * ID_BYTES]
    while other is not None and other.reach > best:
        nodes = _nodes_beside(prompt, other)
        if not nodes:
            other = other.shorter
            continue
        # They are in the order of their bytes, so those that agree furthest stand together where the prompt would.
        at = bisect_left(nodes, ids, key=_ids_of)
        agrees = max(
            min(_common(node, prompt.nodes[0], other.length), prefix.length) for node in nodes[max(at - 1, 0) : at + 1]
        )
        if agrees > best or (agrees == best and found):
            shared = ids[: agrees * ID_BYTES]
            first = bisect_left(nodes, shared, key=_ids_of)
            last = first + 1
            # All of them are only needed to realign.
            while limit and last < len(nodes) and nodes[last].ids.startswith(shared):
                last += 1
            found = (found if agrees == best else []) + nodes[first:last]
            best = agrees
        other = other.shorter
    if found:
        prompt.broken, prompt.agrees = found[0], best
        ends = [node for node in found if node.start < prompt.agrees and node.stop - prompt.agrees <= limit]
        if ends:
            prompt.is_realigned = _adopt(prompt, ends, prompt.agrees)
            return
    if exact:
        contexts = [node for node in exact.contexts if prompt.shares_row(node.prompt)]
        _adopt(prompt, contexts, exact.length)


def _nodes_beside(prompt: _Prompt, prefix: _Prefix) -> list[_Node]:
    """Return the calls of a prefix's prompts that may be in a row with a prompt, in the order of their bytes."""
    found = [each.nodes for each in prefix.prompts if prompt.shares_row(each)]
    return found[0] if len(found) == 1 else sorted(chain.from_iterable(found), key=_ids_of)


def _ids_of(node: _Node) -> bytes:
    return node.ids


def _adopt(prompt: _Prompt, candidates: Sequence[_Node], shared: int) -> bool:
    """Make one of the calls the parent of a prompt, unless it matters which."""
    kept = max(candidates, key=_certainty)
    if any(_differ(kept, node, shared) for node in candidates):
        prompt.is_ambiguous = True
        return False
    # Of equal choices of one call, the first.
    kept = min((node for node in candidates if _same_call(kept, node)), key=lambda node: node.order)
    prompt.parent, prompt.shared = kept, shared
    prompt.agent_id = prompt.agent_id or kept.prompt.agent_id
    kept.children.append(prompt)
    return True


def _same_call(one: _Node, other: _Node) -> bool:
    return (one.call.call_id or one.call.generation_id) == (other.call.call_id or other.call.generation_id)


def _differ(one: _Node, other: _Node, shared: int) -> bool:
    """Tell whether it makes a difference to rows which of two calls is continued."""
    if one is other or _same_call(one, other):
        # Choices with the same ids: each of them is a row, whichever goes on.
        return one.ids != other.ids
    return (
        one.prompt is not other.prompt
        or one.stop != other.stop
        or one.call.reward != other.call.reward
        or one.call.weight_versions != other.call.weight_versions
        or one.call.logprobs_mode != other.call.logprobs_mode
        or sampling_of(one.call.sampling_params) != sampling_of(other.call.sampling_params)
    )


def _common(one: _Node, other: _Node, low: int) -> int:
    """Count the ids by which two sequences begin equally, of which `low` are known to be equal."""
    if other.ids.startswith(one.ids):
        return one.stop
    high = min(one.stop, other.stop)
    while low < high:
        middle = (low + high + 1) // 2
        if one.ids.startswith(other.ids[low * ID_BYTES : middle * ID_BYTES], low * ID_BYTES):
            low = middle
        else:
            high = middle - 1
    return low


Path = list[tuple[_Node, int]]
"""The calls of a row, each with the position where its answer ends there."""


def _paths(roots: Iterable[_Node], each_call: bool) -> list[Path]:
    """List the paths to all leaves, or to all calls alone, in order."""
    found: list[Path] = []
    path: Path = []
    waiting = [(node, 0) for node in _last_first(roots)]
    while waiting:
        node, depth = waiting.pop()
        if depth:
            path[depth - 1] = path[depth - 1][0], node.prompt.shared
        path[depth:] = [(node, node.stop)]
        if each_call:
            found.append([(node, node.stop)])
        elif not node.children:
            found.append(path[:])
        waiting += [(each, depth + 1) for each in _last_first(n for child in node.children for n in child.nodes)]
    return found


def _last_first(nodes: Iterable[_Node]) -> list[_Node]:
    return sorted(nodes, key=lambda node: node.order, reverse=True)


class _Maker:
    """Make the rows of an attempt from its paths."""

    def __init__(self, attempt: AttemptCalls, paths: Sequence[Path], is_missing: bool) -> None:
        self._attempt = attempt
        self._paths = paths
        self._is_missing = is_missing
        self._group = group_of(attempt.input, attempt.metadata)
        self._first: dict[int, int] = {}
        self._first_of_prompt: dict[int, int] = {}
        for index, path in enumerate(paths):
            for node, _ in path:
                self._first.setdefault(id(node), index)
                self._first_of_prompt.setdefault(id(node.prompt), index)

    def rows(self, options: MergeOptions, left_out: list[LeftOut]) -> list[Trajectory]:
        """Make the rows that the options let through; calls that are cut off as a whole are added to `left_out`."""
        chosen = [index for index, path in enumerate(self._paths) if self._is_wanted(path, options)]
        lengths = {index: _length(self._paths[index], options) for index in chosen}
        trained = self._trained(chosen, lengths)
        found: list[Trajectory] = []
        for index in chosen:
            here = {id(node) for node, _ in self._paths[index] if trained.get(id(node)) == index}
            if here:
                found.append(self._row(index, lengths[index], here))
        cut = {id(node): node for index in chosen for node, _ in self._paths[index] if id(node) not in trained}
        left_out += [_left_out(node.call, "too_long") for node in cut.values()]
        if found:
            # Given to each row, they would be as many copies as there are rows.
            found[0].left_out = left_out
        return found

    def _is_wanted(self, path: Path, options: MergeOptions) -> bool:
        reward, status = _finite(self._attempt.reward), options.get("status")
        if "min_reward" in options and (reward is None or reward < options["min_reward"]):
            return False
        if "model" in options and path[0][0].call.model != options["model"]:
            return False
        if status is not None and any(node.call.status != status for node, _ in path):
            return False
        if "agent_id" in options and _agent_of(path) != options["agent_id"]:
            return False
        for name in ("parent_agent_id", "purpose", "retry"):
            # None is a value of these filters.
            wanted = options.get(name, ...)
            if wanted is not ... and any(getattr(node.call, name) != wanted for node, _ in path):
                return False
        if options.get("complete") and (
            self._is_missing
            or _length(path, options) < path[-1][1]
            or any(node.call.status != "finished" or node.call.finish_reason == "length" for node, _ in path)
        ):
            return False
        version = options.get("weight_version")
        staleness = options.get("max_staleness")
        return version is None or all(
            was_sampled_with(node.call.weight_versions, end - node.start, version, staleness) for node, end in path
        )

    def _trained(self, chosen: Iterable[int], lengths: Mapping[int, int]) -> dict[int, int]:
        """Return the row that trains each call: the first one that has all of its answer, or else the most of it."""
        most: dict[int, tuple[int, int]] = {}
        for index in chosen:
            for node, end in self._paths[index]:
                end = min(end, lengths[index])
                if end > node.start and (id(node) not in most or end > most[id(node)][0]):
                    most[id(node)] = end, index
        return {node: index for node, (_, index) in most.items()}

    def _row(self, index: int, length: int, trained: set[int]) -> Trajectory:
        path = self._paths[index]
        last = path[-1][0]
        ids = array("i", last.ids)
        flags: set[Flag] = {"missing_call"} if self._is_missing else set()
        if length < len(ids):
            flags.add("cut")
            del ids[length:]
        inside = [(node, min(end, length)) for node, end in path if node.start < length]
        mask, logprobs = array("b", bytes(len(ids))), array("f", bytes(ID_BYTES * len(ids)))
        has_logprobs = True
        spans: list[Answer] = []
        for node, end in inside:
            call, start = node.call, node.start
            flags.update(_flags_of(node))
            spans.append(_answer(node, end, id(node) in trained))
            if id(node) in trained:
                mask[start:end] = array("b", b"\1" * (end - start))
                has_logprobs &= call.logprobs is not None and len(call.logprobs) == node.stop - start
                if call.logprobs is not None and has_logprobs:
                    logprobs[start:end] = call.logprobs[: end - start]
        answers = [each for each in spans if each.is_trained]
        versions = _versions(inside)
        if len({version for version, _, _ in versions}) > 1:
            flags.add("mixed_weights")
        sampled = [(each.sampling, each.logprobs_mode) for each in spans]
        if any(each != sampled[0] for each in sampled):
            flags.add("mixed_sampling")
        if _finite(self._attempt.reward) != self._attempt.reward:
            flags.add("bad_reward")
        return Trajectory(
            rollout_id=self._attempt.rollout_id,
            attempt_id=self._attempt.attempt_id,
            index=index,
            count=len(self._paths),
            parent=self._parent(index),
            token_ids=ids,
            response_mask=mask,
            logprobs=logprobs if has_logprobs else None,
            prompt_length=path[0][0].start,
            spans=spans,
            reward=_finite(self._attempt.reward),
            rewards=[(each.end - 1, each.reward) for each in answers if each.reward is not None],
            model=last.call.model,
            agent_id=_agent_of(path),
            parent_agent_id=_only(node.call.parent_agent_id for node, _ in path),
            purpose=_only(node.call.purpose for node, _ in path),
            weight_versions=versions or None,
            routed_experts=_experts(inside, len(ids)),
            logprobs_mode=_only(each.logprobs_mode for each in answers),
            temperature=_only((each.sampling or {}).get("temperature") for each in answers),
            flags=[flag for flag in FLAGS if flag in flags],
            left_out=[],
            input=self._attempt.input,
            metadata=None if self._attempt.metadata is None else dict(self._attempt.metadata),
            group=self._group,
        )

    def _parent(self, index: int) -> Parent | None:
        """Find the row that a row branched from: the one with the last call before which both are the same."""
        for node, end in reversed(self._paths[index]):
            if (row := self._first[id(node)]) < index:
                return Parent(row, min(end, self._end(row, node)))
            broken = node.prompt.broken
            if broken is not None and not node.prompt.is_realigned:
                row = self._first.get(id(broken), index)
                if row != index:
                    return Parent(row, min(node.prompt.agrees, self._end(row, broken)))
            if (row := self._first_of_prompt[id(node.prompt)]) < index:
                return Parent(row, node.start)
        return None

    def _end(self, index: int, node: _Node) -> int:
        """Return where an answer ends in a row; a row that was realigned has another end than its answer had."""
        return next(end for each, end in self._paths[index] if each is node)


def _agent_of(path: Path) -> str | None:
    """Return the agent that calls of a row name; some of them may name none."""
    return next((node.call.agent_id for node, _ in path if node.call.agent_id is not None), None)


def _length(path: Path, options: MergeOptions) -> int:
    """Return how many ids of a row are kept."""
    start, stop = path[0][0].start, path[-1][1]
    if start > options.get("max_prompt_length", start):
        return 0
    return min(stop, options.get("max_length", stop), start + options.get("max_response_length", stop))


def _integer(version: str) -> int | None:
    return int(version) if version.isascii() and version.isdigit() else None


def _flags_of(node: _Node) -> Iterator[Flag]:
    call, prompt = node.call, node.prompt
    if call.status != "finished":
        yield "aborted"
    if call.finish_reason == "length":
        yield "truncated"
    if prompt.is_retried:
        yield "retried"
    if prompt.is_ambiguous:
        yield "ambiguous"
    if prompt.broken is not None:
        yield "drifted"
    if _finite(call.reward) != call.reward:
        yield "bad_reward"


def _answer(node: _Node, end: int, is_trained: bool) -> Answer:
    call = node.call
    sampling = sampling_of(call.sampling_params)
    return Answer(
        call.generation_id,
        call.index,
        node.start,
        end,
        is_trained,
        call.status,
        call.finish_reason,
        _finite(call.reward),
        call.logprobs_mode,
        sampling and {**sampling},
    )


@lru_cache(1_000)
def sampling_of(params: str | None) -> dict[str, Any] | None:
    """Return the parameters that change the distribution that ids are drawn from, by vLLM's names; see `SAMPLING`.

    Args:
        params: JSON, as in a `Generation`.
    """
    try:
        found: Any = None if params is None else json.loads(params)
        return None if found is None else {name: found.get(name, usual) for name, usual in SAMPLING.items()}
    except (AttributeError, ValueError):
        return None


def _versions(path: Iterable[tuple[_Node, int]]) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    for node, end in path:
        for version, first, last in node.call.weight_versions or ():
            start, last = node.start + first, min(node.start + last, end)
            if start >= last:
                continue
            if found and found[-1][0] == version and found[-1][2] == start:
                start = found.pop()[1]
            found.append((version, start, last))
    return found


def _experts(path: Sequence[tuple[_Node, int]], length: int) -> RoutedExperts | None:
    """Merge the experts of a row: for each position those of the first call that has them."""
    each = [(node.call.routed_experts, end) for node, end in path]
    shape = next((known.shape for known, _ in each if known is not None), None)
    if shape is None:
        return None
    _, layers, experts = shape
    width, ids = layers * experts, array("h")
    for position, (known, end) in enumerate(each):
        if known is None:
            continue
        if known.shape[1:] != (layers, experts):
            return None
        # A call has none for its last id, which was never fed to the model, where the next one has.
        end = length if position == len(each) - 1 else end
        ids.extend(known.ids[len(ids) : min(end, known.shape[0]) * width])
    return RoutedExperts((len(ids) // width if width else 0, layers, experts), ids)


def _only(values: Iterable[Any]) -> Any:
    """Return the one value that all are, or None."""
    found = {*values}
    return found.pop() if len(found) == 1 else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
