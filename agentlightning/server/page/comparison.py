"""Two rollouts, or two attempts, side by side: what differs between their facts, prompts and answers is marked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, zip_longest
from typing import Any, NamedTuple

from markupsafe import Markup
from pydantic import BaseModel
from sqlalchemy import Connection

from agentlightning.drift import differing
from agentlightning.server.page.conversation import Answer, Call, calls_of_attempt
from agentlightning.server.page.messages import Message
from agentlightning.server.page.rollout import AttemptRow, attempt_rows
from agentlightning.server.schemas import Id
from agentlightning.store import neighbours, rollouts, transcript
from agentlightning.store.summaries import task_of

__all__ = ["ComparisonQuery", "comparison_values", "marked"]

CANDIDATES_SHOWN = 100
_WORDS = re.compile(r"\w+|\s+|[^\w\s]")


class ComparisonQuery(BaseModel):
    """The query parameters of the page: one rollout, and the other if it is chosen."""

    id: Id
    attempt: Id | None = None
    other: Id | None = None
    other_attempt: Id | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two.

    Attributes:
        attempts: those that are compared: one, or all of the rollout.
    """

    rollout_id: str
    attempt_id: str | None
    task: str | None
    status: str | None
    attempts: Sequence[AttemptRow]
    calls: Sequence[Call]

    @property
    def name(self) -> str:
        """Name it in a few words."""
        if self.attempt_id is None:
            return self.rollout_id
        number = self.attempts[0].number
        return f"Attempt {self.attempt_id if number is None else number}"

    def facts(self) -> dict[str, str]:
        """Return its facts by their names, in words."""
        rewards = [each.reward for each in self.attempts if each.reward is not None]
        names = {each.worker for each in self.attempts if each.worker}
        versions = {version for call in self.calls for version in call.versions}
        models = {call.model for call in self.calls if call.model}
        return {
            "Status": self.status or "recorded only",
            "Reward": f"{rewards[-1]:.6g}" if rewards else "\N{EN DASH}",
            "Calls": f"{sum(each.calls for each in self.attempts):,}",
            "Prompt tokens": f"{sum(each.prompt_tokens for each in self.attempts):,}",
            "Output tokens": f"{sum(each.output_tokens for each in self.attempts):,}",
            "Worker": ", ".join(sorted(names)) or "\N{EN DASH}",
            "Model": ", ".join(sorted(models)) or "\N{EN DASH}",
            "Weights": ", ".join(sorted(versions)) or "\N{EN DASH}",
        }


class Fact(NamedTuple):
    """A fact of both."""

    name: str
    one: str
    other: str


class Half(NamedTuple):
    """A call of one side, with the texts of its new messages and of its answers; None where it has no such call.

    Attributes:
        differs: whether anything of it that is shown is not in the call beside it.
        is_whole: whether all of both is shown.
    """

    call: Call
    texts: Sequence[tuple[str, Markup]]
    differs: bool
    is_whole: bool


def comparison_values(connection: Connection, query: ComparisonQuery) -> dict[str, Any] | None:
    """Return the values for the template of the page; None if nothing is known of one of the two."""
    one = _side(connection, query.id, query.attempt)
    if one is None:
        return None
    values: dict[str, Any] = {"one": one, "other": None, "query": query}
    if query.other is None:
        row = rollouts.find(connection, query.id)
        found = [] if row is None else neighbours.of_same_task(connection, row, CANDIDATES_SHOWN)
        return {**values, "candidates": found}
    other = _side(connection, query.other, query.other_attempt)
    if other is None:
        return None
    facts = [Fact(name, value, other.facts()[name]) for name, value in one.facts().items()]
    return {**values, "other": other, "facts": facts, "calls": [*_beside(one.calls, other.calls)]}


def _side(connection: Connection, rollout_id: str, attempt_id: str | None) -> Side | None:
    row = rollouts.find(connection, rollout_id)
    outline = transcript.outline_of(connection, rollout_id)
    if row is None and not outline.positions:
        return None
    attempts = attempt_rows(connection, row, outline)
    chosen = [each for each in attempts if attempt_id is None or each.attempt_id == attempt_id]
    if attempt_id is not None and not chosen:
        return None
    status = None if row is None else row.status
    return Side(
        rollout_id,
        attempt_id,
        None if row is None else task_of(row.input),
        status if attempt_id is None else chosen[0].status,
        chosen,
        calls_of_attempt(connection, outline, attempt_id),
    )


def _beside(ones: Sequence[Call], others: Sequence[Call]) -> Iterator[tuple[Half | None, Half | None]]:
    """Yield the calls of both in order, each with the call at the same place on the other side."""
    for one, other in zip_longest(ones, others):
        texts = [[] if each is None else [*_texts_of(each)] for each in (one, other)]
        marks: tuple[list[tuple[str, Markup]], list[tuple[str, Markup]]] = [], []
        differs = [False, False]
        for left, right in zip_longest(*texts):
            pair = marked(left[1] if left else "", right[1] if right else "")
            is_alike = left == right
            for side, text in enumerate((left, right)):
                if text is not None:
                    marks[side].append((text[0], pair[side]))
                    differs[side] |= not is_alike
        is_whole = all(each is None or _is_whole(each) for each in (one, other))
        yield (
            None if one is None else Half(one, marks[0], differs[0], is_whole),
            None if other is None else Half(other, marks[1], differs[1], is_whole),
        )


def _is_whole(call: Call) -> bool:
    shown = [call.new, *(each.shown for each in call.answers)]
    return all(each is not None and not each.characters_left_out and not each.messages_left_out for each in shown)


def _texts_of(call: Call) -> Iterator[tuple[str, str]]:
    """Yield the texts of a call, each with what it is."""
    if call.new is not None:
        for message in call.new.messages:
            yield from _parts_of(message, message.role or "text")
    for answer in call.answers:
        yield from _answer_of(answer)


def _answer_of(answer: Answer) -> Iterator[tuple[str, str]]:
    if answer.shown is None:
        yield "answer", f"{answer.token_ids} tokens, whose text is not recorded"
    else:
        for message in answer.shown.messages:
            yield from _parts_of(message, "answer")


def _parts_of(message: Message, name: str) -> Iterator[tuple[str, str]]:
    for part in message.parts:
        what = {"reasoning": "reasoning", "call": f"calls {part.name or 'a tool'}", "result": "tool result"}
        yield what.get(part.kind, name), part.text


def marked(one: str, other: str) -> tuple[Markup, Markup]:
    """Mark the words that two texts do not have in common."""
    if one == other:
        return Markup.escape(one), Markup.escape(other)
    words = [_WORDS.findall(each) for each in (one, other)]
    first, last = _common(*words)
    middles = [each[first : len(each) - last] for each in words]
    one_differs, other_differs = differing(*middles)
    # As many words of both are the same: what follows these is new, which `differing` does not mark.
    same = accumulate(not each for each in other_differs)
    most = one_differs.count(False)
    other_differs = [each or count > most for each, count in zip(other_differs, same, strict=True)]
    return _html(words[0], first, one_differs), _html(words[1], first, other_differs)


def _html(words: Sequence[str], first: int, differ: Sequence[bool]) -> Markup:
    """Mark those of the words from `first` on that differ."""
    last = first + len(differ)
    middle = zip(differ, words[first:last], strict=True)
    marks = [
        Markup("<mark>{}</mark>").format(text) if is_other else Markup.escape(text)
        for is_other, some in groupby(middle, lambda each: each[0])
        for text in ["".join(word for _, word in some)]
    ]
    ends = (Markup.escape("".join(some)) for some in (words[:first], words[last:]))
    return Markup("".join(marks)).join(ends)


def _common(one: Sequence[str], other: Sequence[str]) -> tuple[int, int]:
    """Count the words with which both begin, and those with which they end."""
    most = min(len(one), len(other))
    first = next((at for at in range(most) if one[at] != other[at]), most)
    rest = most - first
    last = next((at for at in range(rest) if one[-1 - at] != other[-1 - at]), rest)
    return first, last
