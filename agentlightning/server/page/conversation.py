"""The conversation of a rollout: its calls in order, each with what is new in its prompt, as messages."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection

from agentlightning.common_prefix import common_length
from agentlightning.server.page.agents import guess_agents, guess_purpose, opening_of
from agentlightning.server.page.messages import Message, Shown, answer_parts, message_start, messages_of, shown_of
from agentlightning.store import transcript
from agentlightning.store.transcript import AnswerText, CallText, Outline, Position

__all__ = [
    "CALLS_SHOWN",
    "Answer",
    "Beginning",
    "Call",
    "Conversation",
    "EarlierTexts",
    "calls_of_attempt",
    "conversation_of",
    "unassigned_calls",
]

CALLS_SHOWN = 200
CALLERS_SHOWN = 50
# Characters of a page, which its calls share; of a call, so many at least and at most.
CHARACTERS, FEWEST, MOST = 600_000, 2_000, 40_000
PROMPT_END = 40
# Of an attempt, to find what is new: several hundred long prompts that share nothing.
CHARACTERS_KEPT = 1 << 26
NANOSECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers to a prompt; `shown` is None if no text is kept."""

    index: int
    shown: Shown | None
    token_ids: int
    finish_reason: str | None


class Beginning(NamedTuple):
    """The beginning of a prompt: what an earlier call saw, and maybe said.

    Attributes:
        start: where what is new begins.
        relation: `continues` the prompt and the answer of the call, `repeats` its prompt alone, or `shares` its first
            messages; None where all is new.
        number: the call.
    """

    start: int = 0
    relation: Literal["continues", "repeats", "shares"] | None = None
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A generation, as the conversation shows it.

    Attributes:
        number: its position among all calls of the rollout, from 1.
        span_id: the span that names it.
        started, finished: seconds since the epoch.
        beginning: how its prompt begins.
        new: the messages behind that beginning; None if no text is kept.
        reward: the reward of the generation, whichever of its answers it is for.
        guessed_agent: the number of the agent that it seems to be of; None where it names one, or all are alike.
        guessed_purpose: what it seems to be for; None where it says that, or nothing shows it.
    """

    id: str
    number: int
    attempt_id: str | None
    span_id: str | None
    endpoint: str | None
    model: str | None
    status: str
    started: float
    finished: float
    prompt_ids: int
    beginning: Beginning
    new: Shown | None
    reward: float | None
    answers: Sequence[Answer]
    versions: Sequence[str]
    agent_id: str | None
    parent_agent_id: str | None
    purpose: str | None
    retry: int | None
    guessed_agent: int | None = None
    guessed_purpose: str | None = None

    @property
    def caller(self) -> list[str]:
        """Describe the caller and the purpose of the call, in a few words each."""
        guess = f"maybe agent {self.guessed_agent} (a guess: system prompts or tools differ)"
        found = {
            f"agent {self.agent_id}": self.agent_id,
            f"started by {self.parent_agent_id}": self.parent_agent_id,
            f"{self.purpose}": self.purpose,
            f"retry {self.retry}": self.retry,
            guess: self.guessed_agent,
            f"maybe for a {self.guessed_purpose} (a guess by its instructions)": self.guessed_purpose,
        }
        return [text for text, known in found.items() if known]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The calls of a rollout, in the order of its triplets.

    Attributes:
        calls: the first of all calls.
        matching: the first of those that match the filters.
        left_out: number of those that match but are not among `matching`.
        callers: values by which its calls can be told apart, by field.
        outline: all calls, without their texts.
    """

    calls: Sequence[Call]
    matching: Sequence[Call]
    left_out: int
    callers: Mapping[str, Sequence[Any]]
    outline: Outline

    @property
    def count(self) -> int:
        """Number of all calls."""
        return len(self.outline.positions)


def conversation_of(connection: Connection, rollout_id: str, filters: Mapping[str, Any] | None = None) -> Conversation:
    """Return the conversation of a rollout.

    Args:
        filters: what the calls to show say of their callers, by field.
    """
    wanted = filters or {}
    outline = transcript.outline_of(connection, rollout_id)
    numbered = [*enumerate(outline.positions, 1)]
    calls = _calls(connection, numbered[:CALLS_SHOWN])
    fitting = [each for each in numbered if wanted.items() <= each[1].caller.items()]
    matching = _calls(connection, fitting[:CALLS_SHOWN]) if wanted else calls
    left_out = max(len(fitting) - CALLS_SHOWN, 0)
    callers = _callers([each.caller for each in outline.positions], wanted)
    return Conversation(calls, matching, left_out, callers, outline)


def calls_of_attempt(connection: Connection, outline: Outline, attempt_id: str | None) -> list[Call]:
    """Return the first calls of an attempt.

    Args:
        attempt_id: None for those of all attempts.
    """
    numbered = enumerate(outline.positions, 1)
    wanted = [each for each in numbered if attempt_id is None or each[1].attempt_id == attempt_id]
    return _calls(connection, wanted[:CALLS_SHOWN])


def unassigned_calls(connection: Connection) -> list[Call]:
    """Return the last calls without a rollout, the latest first."""
    keys = transcript.latest_unassigned(connection, CALLS_SHOWN)
    limit = _limit(len(keys))
    found = enumerate(transcript.read(connection, keys), 1)
    return [_call(number, each, None, Beginning(), limit, opening_of(each.prompt)) for number, each in found]


class EarlierTexts:
    """The texts that the calls of an attempt saw and said so far, to find what is new in the next prompt.

    A text that another one continues is kept with it, as a mark where it ends.
    """

    def __init__(self) -> None:
        self._texts: list[_Text] = []

    def add(self, number: int, prompt: str | None, answers: Sequence[str | None]) -> Beginning:
        """Add a call; returns how its prompt begins."""
        if not prompt:
            return Beginning()
        near, shared = self._nearest(prompt)
        marks = [] if near is None else [each for each in near.marks if each.prompt <= shared]
        last = max(marks, key=lambda each: (min(each.stop, shared), each.number), default=None)
        found = self._beginning(prompt, near, shared, last)
        if near is not None and shared == len(near.text):
            self._texts.remove(near)
        for answer in answers or [None]:
            text = prompt + (answer or "")
            kept = [each for each in marks if each.stop <= shared]
            # An answer without a text is never known to be repeated.
            stop = len(text) + (answer is None)
            insort(self._texts, _Text(text, [*kept, _Mark(len(prompt), stop, number)]), key=_text_of)
        while sum(len(each.text) for each in self._texts) > CHARACTERS_KEPT and len(self._texts) > 1:
            self._texts.remove(min(self._texts, key=lambda each: each.marks[-1].number))
        return found

    def _nearest(self, prompt: str) -> tuple[_Text | None, int]:
        """Find the text that begins like a prompt furthest, and how far it does."""
        at = bisect_left(self._texts, prompt, key=_text_of)
        beside = self._texts[max(at - 1, 0) : at + 1]
        alike = [(common_length(each.text, prompt), each.marks[-1].number, each) for each in beside]
        length, _, near = max(alike, key=lambda each: each[:2], default=(0, 0, None))
        return near, length

    @staticmethod
    def _beginning(prompt: str, near: _Text | None, shared: int, last: _Mark | None) -> Beginning:
        if near is None:
            return Beginning()
        if last is not None and last.stop <= shared and last.prompt < len(prompt):
            return Beginning(last.stop, "continues", last.number)
        start = message_start(prompt, shared)
        if last is not None:
            # A template without marks that are known has no messages: the prompt ends somewhere in its text.
            return Beginning(start or shared, "repeats", last.number)
        return Beginning(start, "shares", near.marks[0].number) if start else Beginning()


class _Mark(NamedTuple):
    """The positions in a text at which the prompt of a call ends, and its answer."""

    prompt: int
    stop: int
    number: int


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    text: str
    marks: Sequence[_Mark]


def _text_of(each: _Text) -> str:
    return each.text


def _callers(callers: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> dict[str, list[Any]]:
    """List the first values of each field, and the one that is wanted; none where no call was tried again."""
    values = {field: {each[field] for each in callers} - {None} for field in callers[0]} if callers else {}
    return {
        field: sorted({*sorted(known)[:CALLERS_SHOWN], *([wanted[field]] if field in wanted else [])})
        for field, known in values.items()
        if known - {0} or field in wanted
    }


def _limit(calls: int) -> int:
    return min(max(CHARACTERS // max(calls, 1), FEWEST), MOST)


def _calls(connection: Connection, numbered: Sequence[tuple[int, Position]]) -> list[Call]:
    found: list[Call] = []
    # Not the whole prompts: these may be long.
    openings: list[str | None] = []
    # The texts of each attempt: the calls of two agents may alternate.
    earlier: defaultdict[str | None, EarlierTexts] = defaultdict(EarlierTexts)
    places = {position.key: (number, position) for number, position in numbered}
    limit = _limit(len(places))
    for each in transcript.read(connection, [*places]):
        number, position = places[each.key]
        beginning = earlier[position.attempt_id].add(number, each.prompt, [answer.text for answer in each.answers])
        openings.append(opening_of(each.prompt))
        found.append(_call(number, each, position, beginning, limit, openings[-1]))
    return _with_guesses(found, openings)


def _with_guesses(calls: Sequence[Call], openings: Sequence[str | None]) -> list[Call]:
    nameless = [position for position, call in enumerate(calls) if call.agent_id is None]
    guesses = dict(zip(nameless, guess_agents([openings[each] for each in nameless]), strict=True))
    return [replace(call, guessed_agent=guesses.get(position)) for position, call in enumerate(calls)]


def _call(
    number: int, found: CallText, position: Position | None, beginning: Beginning, limit: int, opening: str | None
) -> Call:
    prompt = found.prompt
    return Call(
        id=found.id,
        number=number,
        attempt_id=found.attempt_id if position is None else position.attempt_id,
        span_id=None if position is None else position.span_id,
        endpoint=found.endpoint,
        model=found.model,
        status=found.status,
        started=(found.started_at or found.finished_at) / NANOSECONDS,
        finished=found.finished_at / NANOSECONDS,
        prompt_ids=found.prompt_tokens,
        beginning=beginning,
        new=None if prompt is None else shown_of(messages_of(prompt[beginning.start :]), limit),
        reward=None if position is None else position.reward,
        answers=[_answer(each, (prompt or "")[-PROMPT_END:], limit // len(found.answers)) for each in found.answers],
        versions=list(dict.fromkeys(version for each in found.answers for version in each.versions)),
        **found.caller,
        guessed_purpose=None if found.caller["purpose"] else guess_purpose(opening),
    )


def _answer(found: AnswerText, prompt_end: str, limit: int) -> Answer:
    shown = None
    if found.text is not None:
        parts = answer_parts(found.text, prompt_end)
        shown = shown_of([Message("assistant", parts)] if parts else [], limit)
    return Answer(found.index, shown, found.tokens, found.finish_reason)
