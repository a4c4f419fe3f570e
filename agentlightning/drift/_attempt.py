"""The drift of one attempt: which call goes on from which, where it breaks, and what that costs."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from agentlightning.common_prefix import ID_BYTES, common_ids
from agentlightning.drift._alignment import align
from agentlightning.drift._causes import MEANT
from agentlightning.drift._classification import (
    SHORT_TURN,
    Difference,
    classify,
    continues,
)
from agentlightning.drift._other_names import mismatches, session_mismatch
from agentlightning.drift._records import AttemptDrift, Break, CallDetails, Token
from agentlightning.drift._turns import turn_names, turn_start
from agentlightning.drift._unfit import count_unfit
from agentlightning.token_text import TokenTexts
from agentlightning.trajectory import AttemptCalls, Call, Trajectory, merge

__all__ = ["analyse"]

# Calls that begin alike and are looked at for the latest of them.
MOST_ALIKE = 64

Texts = Callable[[bytes | None], TokenTexts | None]
"""The texts of the vocabulary with a digest; None for an unknown one."""


def analyse(
    attempt: AttemptCalls, details: Mapping[str, CallDetails], texts_of: Texts, model: str | None = None
) -> AttemptDrift:
    """Find the breaks of an attempt. Calls of two models, or of two agents, never continue each other.

    Args:
        details: by the ids of generations.
        model: only calls of this model.
    """
    if model is not None:
        attempt = AttemptCalls(
            calls=[each for each in attempt.calls if each.model == model],
            rollout_id=attempt.rollout_id,
            attempt_id=attempt.attempt_id,
            missing=attempt.missing,
        )
    found = AttemptDrift(rollout_id=attempt.rollout_id, attempt_id=attempt.attempt_id)
    merged = merge(attempt)
    gone = {(each.generation_id, each.index) for each in merged.left_out}
    by_caller: defaultdict[tuple[str | None, str | None], list[Call]] = defaultdict(list)
    places = _places(attempt.calls, merged.rows)
    in_order = sorted(attempt.calls, key=lambda call: (*places[call.generation_id], call.generation_id, call.index))
    latest: dict[str | None, Call] = {}
    beside: dict[tuple[str | None, str | None], Call | None] = {}
    for call in in_order:
        if call.prompt_token_ids is not None:
            caller = call.model, call.agent_id
            beside.setdefault(caller, latest.get(call.model))
            by_caller[caller].append(call)
            latest[call.model] = call
    for caller, calls in by_caller.items():
        _Caller(found, calls, beside[caller], details, texts_of, gone).analyse()
    found.rows_before = sum(bool(each.response_token_ids) for each in attempt.calls)
    found.rows_after = len(merged.rows)
    found.unfit = {name: count for name, count in count_unfit(attempt.calls, merged.rows).items() if count}
    return found


def _places(calls: Sequence[Call], rows: Sequence[Trajectory]) -> dict[str, tuple[int, int]]:
    """Order calls by when they finished, but none before one that it continues: hosts have clocks of their own."""
    found = {call.generation_id: (call.finished_at, 0) for call in calls}
    for row in rows:
        before = 0
        for depth, span in enumerate(row.spans):
            found[span.generation_id] = max(found[span.generation_id], (before, depth))
            before, _ = found[span.generation_id]
    return found


@dataclass(slots=True, eq=False)
class _Context:
    """A prompt with an answer, as later prompts should begin with it.

    Attributes:
        ids: both, as bytes.
        start, stop: number of ids of the prompt, and of both.
        parent: the context that it continues, up to `shared` ids.
        conversation: number of its conversation.
        is_row: whether it begins a row on purpose, as a compaction does, though it has a parent.
    """

    call: Call
    ids: bytes
    start: int
    stop: int
    order: int
    parent: _Context | None
    shared: int
    conversation: int
    is_row: bool = False


def _ids_of(context: _Context) -> bytes:
    return context.ids


class _Caller:
    """The calls of one model by one agent, in the order in which they finished.

    Args:
        beside: the call by another agent before them; None for the first agent.
    """

    def __init__(
        self,
        found: AttemptDrift,
        calls: Sequence[Call],
        beside: Call | None,
        details: Mapping[str, CallDetails],
        texts_of: Texts,
        gone: set[tuple[str, int]],
    ) -> None:
        self._found, self._details, self._texts_of, self._gone = found, details, texts_of, gone
        self._calls, self._beside = calls, beside
        self._sorted: list[_Context] = []
        # By their hashes: prompts may be long.
        self._by_prompt: dict[int, _Context] = {}
        self._by_turn: dict[bytes, _Context] = {}
        self._all: list[_Context] = []
        self._broken: set[int] = set()
        self._conversations = 0

    def analyse(self) -> None:
        for calls in _generations(self._calls):
            self._add(calls)
        self._found.conversations += self._conversations
        self._found.broken += len(self._broken)
        self._count_sampled()

    def _add(self, choices: Sequence[Call]) -> None:
        """Add a generation, of which all choices have the same prompt."""
        call = choices[0]
        assert call.prompt_token_ids is not None
        prompt = call.prompt_token_ids.tobytes()
        self._found.calls += 1
        self._found.without_vocabulary += self._texts(call) is None
        parent, shared, is_row = self._continued(call, prompt)
        self._found.parents[call.generation_id] = None if parent is None else parent.call.generation_id
        if parent is None:
            self._conversations += 1
        conversation = self._conversations if parent is None else parent.conversation
        for each in choices:
            answer = each.response_token_ids if each.response_token_ids is not None else array("i")
            start = len(prompt) // ID_BYTES
            context = _Context(
                each,
                prompt + answer.tobytes(),
                start,
                start + len(answer),
                len(self._all),
                parent,
                shared,
                conversation,
                is_row,
            )
            insort(self._sorted, context, key=_ids_of)
            self._all.append(context)
            self._by_prompt[hash(prompt)] = context
            for turn in self._turns(call, context.ids, shared):
                self._by_turn[turn] = context

    def _continued(self, call: Call, prompt: bytes) -> tuple[_Context | None, int, bool]:
        """Find the context that a prompt continues, how much of it, and whether it begins a row; count its break."""
        same = self._by_prompt.get(hash(prompt))
        if same is not None and same.ids[: same.start * ID_BYTES] == prompt:
            if same.call.call_id is None or same.call.call_id != call.call_id:
                # Samples of one prompt, each asked for in a call of its own, look the same.
                is_certain = bool(call.retry) or same.call.status != "finished"
                self._note(call, same, Difference("retry", is_certain, same.start))
            return (same.parent, same.shared, same.is_row) if same.parent else (same, same.start, True)
        near, length = self._nearest(prompt)
        exact, limit = near, length
        while exact is not None and exact.stop > limit:
            limit = min(limit, exact.shared)
            exact = exact.parent
        is_broken = near is not None and exact is not near and near.stop > near.start and length >= near.start
        if exact is not None and near is not None and exact is not near and not is_broken:
            # It leaves the other call within its prompt: another branch, unless it goes on behind the change.
            texts = self._texts(call)
            is_broken = texts is not None and continues(_array(near.ids), near.start, _array(prompt), texts)
        if exact is not None and not is_broken:
            self._count_cached(call, exact.stop)
            return exact, exact.stop, False
        # A header that changes makes a prompt agree with another conversation just as far.
        turned = None if is_broken else self._with_a_turn_of(call, prompt)
        candidates = [each for each in dict.fromkeys((turned, near)) if each is not None]
        apart: tuple[_Context, Difference] | None = None
        for each in candidates:
            difference = classify(
                _array(each.ids), each.start, _array(prompt), self._texts(call), self._texts(each.call)
            )
            if difference.cause != "sub_agent":
                return self._broken_from(call, each, prompt, difference)
            apart = apart or (each, difference)
        if apart is not None and apart[1].is_certain:
            # Others only begin alike, as questions about one task do.
            self._note(call, *apart, _array(prompt))
        if self._beside is not None and not self._all:
            self._note_agent(call, self._beside, prompt)
        return None, 0, False

    def _note_agent(self, call: Call, beside: Call, prompt: bytes) -> None:
        """Count the first call of an agent that says that it is another one."""
        assert beside.prompt_token_ids is not None
        ids = beside.prompt_token_ids.tobytes()
        start = len(ids) // ID_BYTES
        context = _Context(beside, ids, start, start, 0, None, 0, 0)
        self._note(call, context, Difference("sub_agent", True, common_ids(ids, prompt)), _array(prompt))

    def _broken_from(
        self, call: Call, near: _Context, prompt: bytes, difference: Difference
    ) -> tuple[_Context, int, bool]:
        self._note(call, near, difference, _array(prompt))
        is_meant = difference.cause in MEANT
        if not is_meant:
            self._broken.add(near.conversation)
            self._count_cached(call, near.stop)
        return near, difference.position, is_meant

    def _note(self, call: Call, near: _Context, found: Difference, ids: array[int] | None = None) -> None:
        texts, texts_before = self._texts(call), self._texts(near.call)
        before, prompt = _array(near.ids), _array(near.ids)[: near.start] if ids is None else ids
        is_retry = found.cause == "retry"
        sides: tuple[list[Token], list[Token]] = (
            ([], []) if is_retry else align(before, prompt, found.position, texts, texts_before)
        )
        self._found.breaks.append(
            Break(
                generation_id=call.generation_id,
                before_id=near.call.generation_id,
                cause=found.cause,
                is_certain=found.is_certain,
                also=[*found.also],
                position=found.position,
                message=found.message,
                role=found.role,
                lost=0 if found.cause in MEANT else sum(end - start for _, start, end in _sampled_behind(near, found)),
                finished_at=call.finished_at,
                model=call.model,
                agent_id=call.agent_id,
                before=sides[0],
                after=sides[1],
                mismatches=[] if found.cause in MEANT else mismatches(before, prompt, found.position, texts),
                session_mismatch=None if found.cause in MEANT else session_mismatch(found),
            )
        )

    def _nearest(self, prompt: bytes) -> tuple[_Context | None, int]:
        """Find the earlier context that agrees with a prompt furthest, of several the latest, and how far it does."""
        at = bisect_left(self._sorted, prompt, key=_ids_of)
        beside = [each for each in (at - 1, at) if 0 <= each < len(self._sorted)]
        if not beside:
            return None, 0
        lengths = {each: common_ids(self._sorted[each].ids, prompt) for each in beside}
        best = max(lengths.values())
        shared = prompt[: best * ID_BYTES]
        alike: list[_Context] = []
        for step, first in ((-1, at - 1), (1, at)):
            place = first
            while 0 <= place < len(self._sorted) and abs(place - first) < MOST_ALIKE:
                if not self._sorted[place].ids.startswith(shared):
                    break
                alike.append(self._sorted[place])
                place += step
        return max(alike, key=lambda context: context.order), best

    def _with_a_turn_of(self, call: Call, prompt: bytes) -> _Context | None:
        """Find the latest context with a turn of this prompt, the last one that any has, but for the first turn."""
        for turn in reversed(self._turns(call, prompt)[:-1]):
            if len(turn) > SHORT_TURN * ID_BYTES and (context := self._by_turn.get(turn)) is not None:
                return context
        return None

    def _turns(self, call: Call, ids: bytes, shared: int = 0) -> list[bytes]:
        """Return the turns behind what is shared with an earlier call, without the first of all, which many share."""
        if (texts := self._texts(call)) is None:
            return []
        whole = memoryview(ids).cast("i")
        start = turn_start(whole, shared, texts)
        return turn_names(whole[start:], texts)[0 if start else 1 :]

    def _texts(self, call: Call) -> TokenTexts | None:
        details = self._details.get(call.generation_id)
        texts = None if details is None else self._texts_of(details.vocabulary)
        return texts if texts is not None and texts.are_known else None

    def _count_cached(self, call: Call, could: int) -> None:
        details = self._details.get(call.generation_id)
        if details is not None and details.cached_tokens is not None:
            self._found.cached = (self._found.cached or 0) + min(details.cached_tokens, could)
            self._found.cacheable += could

    def _count_sampled(self) -> None:
        """Count the rows that there would be without breaks, and the sampled ids that these have, and the others."""
        kept: Counter[int] = Counter()
        continued: set[int] = set()
        # Children come before their parents so.
        for each in reversed(self._all):
            if id(each) not in continued:
                if (each.call.generation_id, each.call.index) in self._gone:
                    continue
                self._found.rows_unbroken += 1
                for context, start, end in _sampled(each, each.stop):
                    kept[id(context)] = max(kept[id(context)], end - start)
            if each.parent is not None and not each.is_row:
                continued.add(id(each.parent))
        total = sum(each.stop - each.start for each in self._all)
        self._found.kept += kept.total()
        self._found.lost += total - kept.total()


def _generations(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Group the choices of each generation."""
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(call.generation_id, []).append(call)
    yield from found.values()


def _sampled(leaf: _Context, limit: int) -> Iterator[tuple[_Context, int, int]]:
    """Yield the answers up to a position of a context, each with where it begins and ends there."""
    context: _Context | None = leaf
    while context is not None:
        if min(context.stop, limit) > context.start:
            yield context, context.start, min(context.stop, limit)
        limit = min(limit, context.shared)
        context = context.parent


def _sampled_behind(near: _Context, found: Difference) -> Iterator[tuple[_Context, int, int]]:
    """Yield the parts of answers that stand behind the first difference."""
    for context, start, end in _sampled(near, near.stop):
        if end > found.position:
            yield context, max(start, found.position), end


def _array(ids: bytes) -> array[int]:
    return array("i", ids)
