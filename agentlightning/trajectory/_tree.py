"""The tree of an attempt's calls: which prompt continues the prompt and answer of which call."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from agentlightning.common_prefix import ID_BYTES, common_ids
from agentlightning.trajectory._calls import Call, sampling_of

__all__ = ["Node", "Prompt", "link"]


@dataclass(slots=True, eq=False)
class Node:
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
    prompt: Prompt = field(init=False)
    children: list[Prompt] = field(default_factory=list["Prompt"])

    @property
    def order(self) -> tuple[int, str, int]:
        return self.call.finished_at, self.call.generation_id, self.call.index


@dataclass(slots=True, eq=False)
class Prompt:
    """Calls with the same prompt, which name the same agent, or none.

    Attributes:
        agent_id: the agent that they name, or else one before them in their row.
        parent: the call that it continues.
        shared: number of ids of it that are its parent's prompt and answer; less than all of them if it is realigned.
        broken: a call whose prompt it begins with, but whose answer it only begins to repeat.
        agrees: number of its ids that agree with that call.
    """

    nodes: list[Node]
    agent_id: str | None = None
    parent: Node | None = None
    shared: int = 0
    broken: Node | None = None
    agrees: int = 0
    is_ambiguous: bool = False
    is_retried: bool = False
    is_realigned: bool = False

    def shares_row(self, other: Prompt) -> bool:
        """Tell whether calls of both may be in one row: they do not name two agents."""
        return self.agent_id is None or other.agent_id is None or self.agent_id == other.agent_id

    def resolve(self) -> list[Node]:
        """Choose between retries; returns the nodes of those that are not kept."""
        calls: defaultdict[str, list[Node]] = defaultdict(list)
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


def _certainty(node: Node) -> tuple[Any, ...]:
    """Sort retries: the last finished comes last, and an answer that its client never saw comes before all others."""
    return node.call.status == "finished", *node.order


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
    contexts: list[Node] = field(default_factory=list[Node])
    prompts: list[Prompt] = field(default_factory=list[Prompt])

    def context_of(self, prompt: Prompt) -> _Prefix | None:
        """Return the longest prefix up to this one that is prompt and answer of a call which a prompt may continue."""
        found: _Prefix | None = self
        while found and not any(prompt.shares_row(node.prompt) for node in found.contexts):
            found = found.below
        return found


def link(nodes: Iterable[Node], limit: int) -> list[Prompt]:
    """Group calls by their prompts, and find the parent of each prompt.

    In the order of their bytes, the prefixes of a sequence stand before it. A stack holds all of them: those that are
    longer than what a sequence and the one before it have in common are taken off.

    Args:
        limit: most ids by which an answer may differ at its end, for its prompt to be realigned.
    """
    in_order = sorted(nodes, key=lambda node: node.ids)
    agree = [-1, *(common_ids(one.ids, other.ids) for one, other in pairwise(in_order))]
    prompts = _prompts(in_order, agree)
    # Each prefix stands at the first sequence that begins with it, the shorter first; of equal ones, answers first.
    items: list[tuple[int, int, bool, Node | Prompt]] = []
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
        if isinstance(item, Node):
            prefix.contexts.append(item)
        else:
            _place(item, prefix, limit)
            prefix.prompts.append(item)
            prefix.reach = max(prefix.reach, *(node.stop for node in item.nodes))
    return [*prompts.values()]


def _prompts(in_order: Sequence[Node], agree: Sequence[int]) -> dict[tuple[int, int, str | None], Prompt]:
    """Group calls by prompt and agent: by the position of the first sequence that begins with it, its length and name.

    Args:
        agree: for each sequence, how many ids it has in common with the one before.
    """
    found: dict[tuple[int, int, str | None], Prompt] = {}
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
        node.prompt = found.setdefault((first, node.start, agent), Prompt([], agent))
        node.prompt.nodes.append(node)
    return found


def _place(prompt: Prompt, prefix: _Prefix, limit: int) -> None:
    """Decide which call a prompt continues.

    Args:
        prefix: the prompt's own, with those below it.
    """
    exact = prefix.context_of(prompt)
    best = exact.length if exact else 0
    found: list[Node] = []
    other = prefix.shorter
    ids = prompt.nodes[0].ids[: prefix.length * ID_BYTES]
    while other is not None and other.reach > best:
        nodes = _nodes_beside(prompt, other)
        if not nodes:
            other = other.shorter
            continue
        # They are in the order of their bytes, so those that agree furthest stand together where the prompt would.
        at = bisect_left(nodes, ids, key=_ids_of)
        agrees = max(common_ids(node.ids, ids, other.length) for node in nodes[max(at - 1, 0) : at + 1])
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


def _nodes_beside(prompt: Prompt, prefix: _Prefix) -> list[Node]:
    """Return the calls of a prefix's prompts that may be in a row with a prompt, in the order of their bytes."""
    found = [each.nodes for each in prefix.prompts if prompt.shares_row(each)]
    return found[0] if len(found) == 1 else sorted(chain.from_iterable(found), key=_ids_of)


def _ids_of(node: Node) -> bytes:
    return node.ids


def _adopt(prompt: Prompt, candidates: Sequence[Node], shared: int) -> bool:
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


def _same_call(one: Node, other: Node) -> bool:
    return (one.call.call_id or one.call.generation_id) == (other.call.call_id or other.call.generation_id)


def _differ(one: Node, other: Node, shared: int) -> bool:
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
