"""What was said in a rollout: its calls in order, each with what its prompt has that the call before it had not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from agentlightning.generation import Generation
from agentlightning.store import generations, triplets

__all__ = ["Answer", "Call", "of_rollout", "without_rollout"]

CALLS_SHOWN = 200
# A first prompt, with instructions and tools, is looked at less often than what is said after it.
FOLDED_CHARACTERS = 1500
NANOSECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers to a prompt; `text` is None where none is kept."""

    index: int
    text: str | None
    token_ids: int
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Call:
    """A generation, as the conversation has it.

    Attributes:
        span_id: of the span that names it.
        started, finished: seconds since the epoch.
        is_continued: whether the prompt begins with what was said before, and `said` is the rest of it.
        said: None where no text is kept.
        reward: of the generation, whichever of its answers it is for.
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
    said: str | None
    reward: float | None
    answers: Sequence[Answer]

    @property
    def is_folded(self) -> bool:
        return len(self.said or "") > FOLDED_CHARACTERS


def of_rollout(connection: Connection, rollout_id: str) -> tuple[list[Call], int]:
    """The calls of a rollout, in the order of its triplets; and how many more there are than are shown."""
    places = triplets.positions_of(connection, rollout_id)
    found: list[Call] = []
    # What was said so far in each attempt: one agent's calls may come between those of another.
    said: defaultdict[str | None, list[str]] = defaultdict(list)
    for place in places[:CALLS_SHOWN]:
        generation = generations.find(connection, place.generation_id)
        if generation is not None:
            so_far = said[place.attempt_id]
            before = _beginning(generation.prompt_text, so_far)
            found.append(_call(generation, place.attempt_id, place.span_id, before, place.reward))
            so_far += _texts_of(generation)
    return found, max(len(places) - CALLS_SHOWN, 0)


def without_rollout(connection: Connection) -> list[Call]:
    """The last calls that belong to no rollout, the last one first."""
    found = generations.latest(connection, {"rollout_id": None}, CALLS_SHOWN)
    return [_call(each, each.attempt_id, None, "", None) for each in found]


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
        said=None if prompt is None else prompt[len(before) :],
        reward=reward,
        answers=[
            Answer(each.index, each.text, len(each.token_ids or ()), each.finish_reason) for each in generation.choices
        ],
    )


def _texts_of(generation: Generation) -> Iterator[str]:
    """What a later prompt may begin with: this one, and, last, this one with its answer.

    A chat template may leave out of an answer, once it is said, what was thought before it.
    """
    if generation.prompt_text:
        yield generation.prompt_text
        for each in generation.choices:
            yield generation.prompt_text + (each.text or "")


def _beginning(prompt: str | None, so_far: Sequence[str]) -> str:
    """The last of what was said so far that the prompt begins with; empty where it begins with none of it."""
    return "" if prompt is None else next((text for text in reversed(so_far) if prompt.startswith(text)), "")
