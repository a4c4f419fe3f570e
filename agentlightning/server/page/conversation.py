"""The conversation of a rollout: its calls in order, each with the part of its prompt that is new."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from agentlightning.generation import Generation
from agentlightning.server.page.agents import guess_agents, guess_purpose
from agentlightning.store import generations, triplets
from agentlightning.store.triplets import GenerationPosition

__all__ = ["CALLS_SHOWN", "Answer", "Call", "Conversation", "conversation_of", "unassigned_calls"]

CALLS_SHOWN = 200
CALLERS_SHOWN = 50
# A long first prompt, with instructions and tools, is read less often than the messages after it.
FOLDED_CHARACTERS = 1500
NANOSECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers to a prompt; `text` is None if no text is kept."""

    index: int
    text: str | None
    token_ids: int
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Call:
    """A generation, as the conversation shows it.

    Attributes:
        span_id: the span that names it.
        started, finished: seconds since the epoch.
        is_continued: whether the prompt repeats earlier text, which `new_text` leaves out.
        new_text: the new part of the prompt; None if no text is kept.
        reward: the reward of the generation, whichever of its answers it is for.
        guessed_agent: the number of the agent that it seems to be of; None where it names one, or all are alike.
        guessed_purpose: what it seems to be for; None where it says that, or nothing shows it.
    """

    id: str
    attempt_id: str | None
    span_id: str | None
    endpoint: str | None
    model: str | None
    status: str
    started: float
    finished: float
    prompt_ids: int
    is_continued: bool
    new_text: str | None
    reward: float | None
    answers: Sequence[Answer]
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

    @property
    def is_folded(self) -> bool:
        return len(self.new_text or "") > FOLDED_CHARACTERS


@dataclass(frozen=True, slots=True)
class Conversation:
    """The calls of a rollout, in the order of its triplets.

    Attributes:
        calls: the first of all calls.
        matching: the first of those that match the filters.
        count, left_out: number of all calls, and of those that match but are not among `matching`.
        callers: values by which its calls can be told apart, by field.
    """

    calls: Sequence[Call]
    matching: Sequence[Call]
    count: int
    left_out: int
    callers: Mapping[str, Sequence[Any]]


def conversation_of(connection: Connection, rollout_id: str, filters: Mapping[str, Any] | None = None) -> Conversation:
    """Return the conversation of a rollout.

    Args:
        filters: what the calls to show say of their callers, by field.
    """
    wanted = filters or {}
    places = triplets.positions_of(connection, rollout_id)
    calls = _calls(connection, places[:CALLS_SHOWN])
    fitting = [each for each in places if wanted.items() <= each.caller.items()]
    matching = _calls(connection, fitting[:CALLS_SHOWN]) if wanted else calls
    left_out = max(len(fitting) - CALLS_SHOWN, 0)
    return Conversation(calls, matching, len(places), left_out, _callers([each.caller for each in places], wanted))


def _callers(callers: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> dict[str, list[Any]]:
    """List the first values of each field, and the one that is wanted; none where no call was tried again."""
    values = {field: {each[field] for each in callers} - {None} for field in callers[0]} if callers else {}
    return {
        field: sorted({*sorted(known)[:CALLERS_SHOWN], *([wanted[field]] if field in wanted else [])})
        for field, known in values.items()
        if known - {0} or field in wanted
    }


def _calls(connection: Connection, places: Sequence[GenerationPosition]) -> list[Call]:
    found: list[Call] = []
    prompts: list[str | None] = []
    # Texts of each attempt so far: the calls of two agents may alternate.
    texts: defaultdict[str | None, list[str]] = defaultdict(list)
    for place in places:
        generation = generations.find(connection, place.generation_id)
        if generation is not None:
            so_far = texts[place.attempt_id]
            before = _repeated_part(generation.prompt_text, so_far)
            found.append(_call(generation, place.attempt_id, place.span_id, before, place.reward))
            prompts.append(generation.prompt_text)
            so_far += _texts_of(generation)
    return _with_guesses(found, prompts)


def unassigned_calls(connection: Connection) -> list[Call]:
    """Return the last calls without a rollout, the latest first."""
    found = generations.latest(connection, {"rollout_id": None}, CALLS_SHOWN)
    return [_call(each, each.attempt_id, None, "", None) for each in found]


def _with_guesses(calls: Sequence[Call], prompts: Sequence[str | None]) -> list[Call]:
    nameless = [position for position, call in enumerate(calls) if call.agent_id is None]
    guesses = dict(zip(nameless, guess_agents([prompts[each] for each in nameless]), strict=True))
    return [replace(call, guessed_agent=guesses.get(position)) for position, call in enumerate(calls)]


def _call(
    generation: Generation, attempt_id: str | None, span_id: str | None, before: str, reward: float | None
) -> Call:
    prompt = generation.prompt_text
    return Call(
        id=generation.id,
        attempt_id=attempt_id,
        span_id=span_id,
        endpoint=generation.endpoint,
        model=generation.model,
        status=generation.status,
        started=(generation.started_at or generation.finished_at) / NANOSECONDS,
        finished=generation.finished_at / NANOSECONDS,
        prompt_ids=len(generation.prompt_token_ids or ()),
        is_continued=bool(before),
        new_text=None if prompt is None else prompt[len(before) :],
        reward=reward,
        answers=[
            Answer(each.index, each.text, len(each.token_ids or ()), each.finish_reason) for each in generation.choices
        ],
        agent_id=generation.agent_id,
        parent_agent_id=generation.parent_agent_id,
        purpose=generation.purpose,
        retry=generation.retry,
        guessed_purpose=None if generation.purpose else guess_purpose(prompt),
    )


def _texts_of(generation: Generation) -> Iterator[str]:
    """Yield the texts that a later prompt may begin with: this prompt, then this prompt with each answer.

    A chat template may leave the reasoning out of an earlier answer.
    """
    if generation.prompt_text:
        yield generation.prompt_text
        for each in generation.choices:
            yield generation.prompt_text + (each.text or "")


def _repeated_part(prompt: str | None, so_far: Sequence[str]) -> str:
    """Return the latest text that the prompt begins with; empty if there is none."""
    return "" if prompt is None else next((text for text in reversed(so_far) if prompt.startswith(text)), "")
