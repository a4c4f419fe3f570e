"""Merging: an attempt's calls become the rows that its tree has paths for."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agentlightning.common_prefix import ID_BYTES
from agentlightning.generation import RoutedExperts, SamplingMask
from agentlightning.trajectory._calls import AttemptCalls, Call, finite, group_of, sampling_of, was_sampled_with
from agentlightning.trajectory._options import DRIFT_LIMIT, MergeOptions, check_options
from agentlightning.trajectory._positions import (
    KnownExperts,
    KnownMask,
    first_position,
    missing_experts,
    place_experts,
    place_masks,
)
from agentlightning.trajectory._row import FLAGS, Answer, Flag, LeftOut, Merged, Parent, Reason, Trajectory
from agentlightning.trajectory._tree import Node, link

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["merge"]


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
    by_model: defaultdict[str | None, list[Node]] = defaultdict(list)
    for node in nodes:
        by_model[node.call.model].append(node)
    roots: list[Node] = []
    for some in by_model.values():
        prompts = link(some, limit)
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


def _nodes(calls: Iterable[Call], left_out: list[LeftOut]) -> list[Node]:
    found: list[Node] = []
    for call in calls:
        if call.prompt_token_ids is None or call.response_token_ids is None:
            left_out.append(_left_out(call, "without_ids"))
        elif not call.response_token_ids:
            left_out.append(_left_out(call, "empty_answer"))
        else:
            prompt, answer = call.prompt_token_ids, call.response_token_ids
            found.append(Node(call, b"".join((prompt, answer)), len(prompt), len(prompt) + len(answer)))
    found.sort(key=lambda node: node.order)
    return found


def _left_out(call: Call, reason: Reason) -> LeftOut:
    return LeftOut(call.generation_id, call.index, reason, finite(call.reward))


Path = list[tuple[Node, int]]
"""The calls of a row, each with the position where its answer ends there."""


def _paths(roots: Iterable[Node], each_call: bool) -> list[Path]:
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


def _last_first(nodes: Iterable[Node]) -> list[Node]:
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
        reward, status = finite(self._attempt.reward), options.get("status")
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
        masks = _masks([each for each in inside if id(each[0]) in trained], len(ids))
        if masks is None and any(map(_needs_mask, answers)):
            flags.add("no_mask")
        experts = _experts(path, len(ids))
        if finite(self._attempt.reward) != self._attempt.reward:
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
            reward=finite(self._attempt.reward),
            rewards=[(each.end - 1, each.reward) for each in answers if each.reward is not None],
            model=last.call.model,
            agent_id=_agent_of(path),
            parent_agent_id=_only(node.call.parent_agent_id for node, _ in path),
            purpose=_only(node.call.purpose for node, _ in path),
            weight_versions=versions or None,
            routed_experts=experts,
            missing_experts=missing_experts(experts),
            sampling_mask=masks,
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

    def _end(self, index: int, node: Node) -> int:
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


def _flags_of(node: Node) -> Iterator[Flag]:
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
    if finite(call.reward) != call.reward:
        yield "bad_reward"


def _answer(node: Node, end: int, is_trained: bool) -> Answer:
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
        finite(call.reward),
        call.logprobs_mode,
        sampling and {**sampling},
    )


def _versions(path: Iterable[tuple[Node, int]]) -> list[tuple[str, int, int]]:
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


def _experts(path: Sequence[tuple[Node, int]], length: int) -> RoutedExperts | None:
    # Also of calls whose answers are cut off: their prompts are in the row. A call has none for its last id, which was
    # never fed to the model; the next one has.
    known = [
        KnownExperts(experts, first_position(node.call.sampling_params), end)
        for node, end in path
        if (experts := node.call.routed_experts) is not None
    ]
    return place_experts(known, length)


def _masks(path: Iterable[tuple[Node, int]], length: int) -> SamplingMask | None:
    """Merge the masks of trained answers; None where one has none."""
    known: list[KnownMask] = []
    for node, end in path:
        mask = node.call.sampling_mask
        if mask is None or len(mask) < end - node.start:
            return None
        known.append(KnownMask(mask, node.start, end))
    return place_masks(known, length) if known else None


def _needs_mask(answer: Answer) -> bool:
    """Tell whether the logprobs of an answer cannot be computed again without its mask."""
    if not (answer.logprobs_mode or "").startswith("processed"):
        return False
    sampling = answer.sampling
    return sampling is None or sampling["top_p"] < 1 or sampling["top_k"] > 0 or sampling["min_p"] > 0


def _only(values: Iterable[Any]) -> Any:
    """Return the one value that all are, or None."""
    found = {*values}
    return found.pop() if len(found) == 1 else None
