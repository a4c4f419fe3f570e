"""Stores to look at: the rollouts of an agent with a calculator, as its runners, its tracer and vLLM leave them.

Each rollout is what its number and its moment make it. To have one, with a thousand of them, beside a page:
`python -m tests.common.rollouts agl-store.db 1000`.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any
from unittest import mock

from sqlalchemy import insert

from agentlightning.generation import Choice, Generation, Loss
from agentlightning.rollout_records import RolloutConfig, RolloutStatus
from agentlightning.sender import Sender, Vocabulary
from agentlightning.store import generations, open_database, senders, spans, tables
from agentlightning.store.attributes import ANNOTATION, RESPONSE, reward_attributes

__all__ = ["LONG", "MODEL", "VOCABULARY", "Rollout", "end_time", "fill", "long_generation", "tokens"]

MODEL = "Qwen/Qwen3-0.6B"
LONG = "a rollout of one long answer"
"""The rollout of `long_generation`."""

SECOND = 10**9
SECONDS_APART = 2
SECONDS_LATE = 5
SECONDS_TO_TRY_AGAIN = 3
# Those at the end of the queue are still under way, the last one first.
UNDER_WAY: Sequence[RolloutStatus] = ("queuing", "queuing", "preparing", "running", "running", "requeuing")
ENDED: Sequence[RolloutStatus] = ("succeeded", "succeeded", "failed", "succeeded", "cancelled", "succeeded")

SYSTEM = "You are a careful assistant. Use the calculator."
TOOL_CALL = '<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{}"}}}}\n</tool_call>'
CHECKS = "Let me check that.\n"
QUESTION, ANSWER = "What is {} times {}?", "{} times {} is {}. \N{GRINNING FACE}"
WORDS = "once upon a time there was a model that went on and on and nobody told it to stop so it said"

START, END = "<|im_start|>", "<|im_end|>"
_PIECES = re.compile(r"<\|im_\w+\|>| ?[A-Za-z_]+|\d| ?(?:(?!<\|im_)[^\sA-Za-z_\d])+|\s")


@dataclass(frozen=True)
class Rollout:
    """One of them.

    Attributes:
        start_time: seconds since the epoch.
    """

    number: int
    status: RolloutStatus
    start_time: float

    @cached_property
    def rollout_id(self) -> str:
        return f"ro-{self._id(0)}"

    @property
    def factors(self) -> tuple[int, int]:
        return 11 + self.number % 89, 11 + self.number // 89 % 89

    @property
    def question(self) -> str:
        return QUESTION.format(*self.factors)

    @property
    def attempt_statuses(self) -> Sequence[str]:
        return {
            "queuing": (),
            "cancelled": (),
            "preparing": ("preparing",),
            "running": ("running",),
            "requeuing": ("unresponsive",),
            "succeeded": ("succeeded",),
            "failed": ("timeout", "failed"),
        }[self.status]

    @property
    def answers(self) -> Sequence[str]:
        """Answers of the model in a complete attempt, call by call."""
        one, other = self.factors
        product = one * other if self.status == "succeeded" else one + other
        asks = TOOL_CALL.format(f"{one} * {other}")
        checks = [CHECKS + TOOL_CALL.format(f"{other} * {one}")] if self.number % 3 == 0 else []
        return asks, *checks, ANSWER.format(one, other, product)

    @property
    def reward(self) -> float | None:
        return {"succeeded": 1.0, "failed": 0.0}.get(self.status)

    @property
    def calls(self) -> int:
        """Number of calls of all attempts."""
        return sum(len(_answered(self, status)) for status in self.attempt_statuses)

    def attempt_id(self, sequence_id: int) -> str:
        return f"at-{self._id(sequence_id)}"

    def generation_id(self, sequence_id: int, place: int) -> str:
        """Return that of a call of an attempt, of which the first has place 0."""
        return self._id(100 * sequence_id + place + 1)

    def _id(self, what: int) -> str:
        """A UUIDv7."""
        return str(uuid.UUID(int=int(self.start_time * 1000) << 80 | (0x7000 | what) << 64 | 1 << 63 | self.number))


def fill(url: str, count: int, until: float | None = None) -> list[Rollout]:
    """Put so many rollouts into a store, with all that they leave there; returns them, in the order of their start.

    Args:
        url: of a database.
        until: when the last one has started, in seconds since the epoch; now if not given.
    """
    last = time.time() if until is None else until
    made = [
        Rollout(number, _status(number, count), last - (count - 1 - number) * SECONDS_APART) for number in range(count)
    ]
    sender = _sender("gpu-7", made[0].start_time if made else last)
    with closing(open_database(url)) as database, database.writing() as connection:
        with mock.patch("time.time_ns", return_value=sender.started_at):
            senders.register(connection, sender)
        if made:
            connection.execute(insert(tables.rollouts), [_row(each) for each in made])
        if attempts := [row for key, each in enumerate(made, 1) for row in _attempt_rows(key, each)]:
            connection.execute(insert(tables.attempts), attempts)
        calls = sorted((call for each in made for call in _calls(each)), key=lambda call: call.finished_at)
        for _, some in groupby(calls, lambda call: call.finished_at // (SECONDS_LATE * SECOND)):
            of_these = list(some)
            # As a server would have written them, when the last of them had finished.
            with mock.patch("time.time_ns", return_value=of_these[-1].finished_at + SECOND // 5):
                generations.add(connection, of_these, sender.id)
        spans.add(connection, [span for each in made for span in _spans(each)])
        generations.add_losses(connection, [_loss(sender, int(last * SECOND))])
    return made


def long_generation(url: str, ids: int) -> Generation:
    """Put a generation of so many ids into a store, which is a rollout of its own that was never queued."""
    draw = random.Random(ids)
    words = tokens(f" {WORDS}")
    token_ids = [draw.choice(words) for _ in range(ids - 1)] + tokens(END)
    now = time.time_ns()
    made = Generation(
        id=str(uuid.UUID(int=7 << 76 | 1 << 63 | ids)),
        request_id=f"chatcmpl-{ids}",
        response_id=f"chatcmpl-{ids}",
        endpoint="/v1/chat/completions",
        model=MODEL,
        rollout_id=LONG,
        started_at=now - 100 * SECOND,
        first_token_at=now - 99 * SECOND,
        finished_at=now,
        status="finished",
        prompt_token_ids=array("i", tokens(_turn("user", "Tell me a story.") + f"{START}assistant\n")),
        prompt_text=_turn("user", "Tell me a story.") + f"{START}assistant\n",
        sampling_params='{"max_tokens": 40000, "temperature": 1.0}',
        logprobs_mode="raw_logprobs",
        choices=[
            Choice(
                token_ids=array("i", token_ids),
                logprobs=array("f", [-draw.expovariate(2) for _ in token_ids]),
                text="".join(VOCABULARY.tokens[each] or "" for each in token_ids[:-1]).replace("\u0120", " "),
                finish_reason="stop",
            )
        ],
    )
    with closing(open_database(url)) as database, database.writing() as connection:
        sender = _sender("gpu-8", now / SECOND)
        senders.register(connection, sender)
        generations.add(connection, [made], sender.id)
    return made


def conversation(url: str, calls: int) -> str:
    """Put one conversation of so many calls into a store; returns the id of its rollout, which was never queued."""
    rollout_id = f"conversation-{calls}"
    prompt = _turn("system", SYSTEM) + _turn("user", f"Count to {calls}.")
    made: list[Generation] = []
    for number in range(calls):
        prompt += f"{START}assistant\n"
        answer = TOOL_CALL.format(f"{number} + 1")
        made.append(_spoken(rollout_id, number, prompt, tokens(prompt), answer))
        prompt += f"{answer}{END}\n{_turn('tool', f'{number + 1} is what the calculator says. {WORDS}')}"
    _put(url, made)
    return rollout_id


def long_prompts(url: str, calls: int, characters: int) -> str:
    """Put so many calls with long prompts that begin differently into a store; returns the id of their rollout."""
    rollout_id = f"prompts-{calls}"
    filler = f"{WORDS} " * (characters // len(WORDS))
    for number in range(calls):
        prompt = _turn("system", f"It is minute {number}. {filler}"[:characters]) + f"{START}assistant\n"
        # The ids of one prompt, of which the first differs: to make those of each would take minutes.
        ids = [number, *([300] * (characters // 4))]
        _put(url, [_spoken(rollout_id, number, prompt, ids, "Yes.")])
    return rollout_id


def _spoken(rollout_id: str, number: int, prompt: str, prompt_token_ids: list[int], answer: str) -> Generation:
    finished_at = time.time_ns() - 3600 * SECOND + number * SECOND
    response_id = f"{rollout_id}-{number}"
    token_ids = tokens(answer + END)
    return Generation(
        request_id=response_id,
        response_id=response_id,
        endpoint="/v1/chat/completions",
        model=MODEL,
        rollout_id=rollout_id,
        attempt_id="at-1",
        started_at=finished_at - SECOND // 2,
        finished_at=finished_at,
        status="finished",
        prompt_token_ids=array("i", prompt_token_ids),
        prompt_text=prompt,
        choices=[Choice(token_ids=array("i", token_ids), text=answer, logprobs=array("f", [-0.5] * len(token_ids)))],
    )


def _put(url: str, made: list[Generation]) -> None:
    with closing(open_database(url)) as database, database.writing() as connection:
        sender = _sender("gpu-9", time.time())
        senders.register(connection, sender)
        generations.add(connection, made, sender.id)


def tokens(text: str) -> list[int]:
    """The ids of a text, as the tokenizer of the model has them: of what it has no word for, those of its bytes."""
    found: list[int] = []
    for piece in _PIECES.findall(text):
        known = _IDS.get(piece)
        if known is not None:
            found.append(known)
        else:
            found += piece.encode()
    return found


def _turn(role: str, text: str) -> str:
    return f"{START}{role}\n{text}{END}\n"


def _byte_characters() -> list[str]:
    """Map each byte to its character in a byte-level tokenizer: invisible bytes and blanks have others."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


_BYTES = _byte_characters()
_TEXTS = (
    SYSTEM,
    TOOL_CALL.format("1 * 2"),
    CHECKS,
    QUESTION,
    ANSWER,
    f" {WORDS} Tell me a story.",
    "system",
    "user",
    "assistant",
    "tool",
)
_WORDS = sorted(
    {piece for text in _TEXTS for piece in _PIECES.findall(text) if piece.isascii()} - {*map(chr, range(128))}
)
_SPECIAL = [START, END]
# The first 256 are the bytes.
_IDS = {piece: 256 + place for place, piece in enumerate([*_WORDS, *_SPECIAL])}
_AS_KEPT = ["".join(_BYTES[byte] for byte in piece.encode()) for piece in _WORDS]
VOCABULARY = Vocabulary([*_BYTES, *_AS_KEPT, *_SPECIAL], frozenset(_IDS[each] for each in _SPECIAL))
"""Texts of the ids."""


def _sender(host: str, at: float) -> Sender:
    return Sender(
        id=str(uuid.uuid5(uuid.NAMESPACE_DNS, host)),
        host=host,
        pid=4711,
        started_at=int(at * SECOND) - 60 * SECOND,
        version="0.1.0",
        vllm="0.32.0",
        model=MODEL,
        vocabulary=VOCABULARY,
    )


def _loss(sender: Sender, at: int) -> Loss:
    return Loss(
        count=3, reason="the queue was full", first_at=at - SECOND, last_at=at, host=sender.host, pid=sender.pid
    )


def _status(number: int, count: int) -> RolloutStatus:
    behind = count - 1 - number
    return UNDER_WAY[behind] if behind < len(UNDER_WAY) else ENDED[number % len(ENDED)]


def _row(rollout: Rollout) -> dict[str, Any]:
    is_queued = rollout.status in ("queuing", "requeuing")
    return {
        "rollout_id": rollout.rollout_id,
        "input": json.dumps({"question": rollout.question}),
        "start_time": rollout.start_time,
        "end_time": end_time(rollout) if rollout.status in ENDED else None,
        "mode": "train",
        "status": rollout.status,
        "config": json.dumps(RolloutConfig(max_attempts=2, retry_condition=("timeout", "unresponsive")).as_dict()),
        "metadata": json.dumps({"split": rollout.number % 4}),
        "queued_at": int(rollout.start_time * SECOND) if is_queued else None,
        "attempts": len(rollout.attempt_statuses),
    }


def _attempt_rows(key: int, rollout: Rollout) -> Iterator[dict[str, Any]]:
    for sequence_id, status in enumerate(rollout.attempt_statuses, 1):
        has_ended = status in ("succeeded", "failed")
        yield {
            "rollout_key": key,
            "sequence_id": sequence_id,
            "attempt_id": rollout.attempt_id(sequence_id),
            "start_time": _start_time(rollout, sequence_id),
            "end_time": end_time(rollout) if has_ended else None,
            "status": status,
            "worker_id": f"runner-{rollout.number % 4}",
            "last_heartbeat_time": None if status == "preparing" else _start_time(rollout, sequence_id) + 1,
        }


def _start_time(rollout: Rollout, sequence_id: int) -> float:
    return rollout.start_time + 0.25 + SECONDS_TO_TRY_AGAIN * (sequence_id - 1)


def end_time(rollout: Rollout) -> float:
    """Return when a rollout has ended, in seconds since the epoch."""
    attempts = len(rollout.attempt_statuses)
    if not attempts:
        return rollout.start_time + 0.5
    return _start_time(rollout, attempts) + 0.5 + len(rollout.answers) * (1 + rollout.number % 5 / 4)


def _moments(rollout: Rollout, sequence_id: int, place: int) -> tuple[float, float]:
    """Return when a call of an attempt has started and finished."""
    each = 1 + rollout.number % 5 / 4
    started = _start_time(rollout, sequence_id) + 0.25 + place * each
    return started, started + 0.75 * each


def _answered(rollout: Rollout, attempt_status: str) -> Sequence[str]:
    """Answers of the model in an attempt."""
    how_many = {"preparing": 0, "running": 1, "unresponsive": 1, "timeout": 1}.get(attempt_status)
    return rollout.answers[:how_many]


def _calls(rollout: Rollout) -> Iterator[Generation]:
    for sequence_id, status in enumerate(rollout.attempt_statuses, 1):
        prompt = _turn("system", SYSTEM) + _turn("user", rollout.question)
        for place, answer in enumerate(_answered(rollout, status)):
            prompt += f"{START}assistant\n"
            yield _call(rollout, sequence_id, place, prompt, answer, is_whole=status != "timeout")
            one, other = rollout.factors
            prompt += f"{answer}{END}\n{_turn('tool', str(one * other))}"


def _call(rollout: Rollout, sequence_id: int, place: int, prompt: str, answer: str, is_whole: bool) -> Generation:
    generation_id = rollout.generation_id(sequence_id, place)
    response_id = _response_id(generation_id)
    started, finished = _moments(rollout, sequence_id, place)
    said = answer if is_whole else answer[: len(answer) // 2]
    # The first call of some is asked for two answers, of which the agent takes the first.
    texts = [said, ANSWER.format(*rollout.factors, 0)] if rollout.number % 5 == 0 and place == 0 else [said]
    prompt_token_ids = tokens(prompt)
    return Generation(
        id=generation_id,
        request_id=f"{response_id}-0",
        response_id=response_id,
        endpoint="/v1/chat/completions",
        model=MODEL,
        rollout_id=rollout.rollout_id,
        attempt_id=rollout.attempt_id(sequence_id),
        started_at=int(started * SECOND),
        first_token_at=int((started + (finished - started) / 8) * SECOND),
        finished_at=int(finished * SECOND),
        status="finished" if is_whole else "aborted",
        prompt_token_ids=array("i", prompt_token_ids),
        prompt_text=prompt,
        sampling_params=json.dumps({"temperature": 0.7, "top_p": 0.95, "n": len(texts)}),
        logprobs_mode="raw_logprobs",
        cached_tokens=len(prompt_token_ids) // 16 * 16 if place else 0,
        choices=[_choice(index, text, is_whole, rollout.number) for index, text in enumerate(texts)],
    )


def _choice(index: int, text: str, is_whole: bool, number: int) -> Choice:
    token_ids = tokens(text + END if is_whole else text)
    draw = random.Random(number)
    return Choice(
        index=index,
        token_ids=array("i", token_ids),
        logprobs=array("f", [-draw.expovariate(4) for _ in token_ids]),
        text=text,
        finish_reason="stop" if is_whole else "abort",
        weight_versions=[(f"step-{number // 1000}", 0, len(token_ids))],
    )


def _response_id(generation_id: str) -> str:
    return f"chatcmpl-{generation_id.replace('-', '')}"


def _spans(rollout: Rollout) -> Iterator[spans.NewSpan]:
    """Build the spans of a tracer: the agent, in it the model's calls and the calculator, and the reward at the end."""
    ids = iter(range(1, 100))
    for sequence_id, status in enumerate(rollout.attempt_statuses, 1):
        if status == "preparing":
            continue
        agent = next(ids)
        for place, _ in enumerate(_answered(rollout, status)):
            started, finished = _moments(rollout, sequence_id, place)
            named = {RESPONSE: _response_id(rollout.generation_id(sequence_id, place)), "gen_ai.request.model": MODEL}
            yield _span(rollout, sequence_id, next(ids), agent, "openai.chat.completion", (started, finished), named)
            if place < len(rollout.answers) - 1 and status != "timeout":
                worked = finished + 0.01, finished + 0.02
                yield _span(rollout, sequence_id, next(ids), agent, "calculator", worked, {"tool.name": "calculator"})
        if status in ("succeeded", "failed"):
            end = end_time(rollout)
            began = _start_time(rollout, sequence_id)
            yield _span(rollout, sequence_id, agent, None, "agent", (began, end), {"question": rollout.question})
            given = reward_attributes(rollout.reward or 0.0, None)
            yield _span(rollout, sequence_id, next(ids), agent, ANNOTATION, (end, end), given)


def _span(
    rollout: Rollout,
    sequence_id: int,
    number: int,
    parent: int | None,
    name: str,
    moments: tuple[float, float],
    attributes: dict[str, Any],
) -> spans.NewSpan:
    trace_id = f"{rollout.number:024x}{sequence_id:08x}"
    span_id, parent_id = f"{number:016x}", None if parent is None else f"{parent:016x}"
    context = {"trace_id": trace_id, "span_id": span_id, "is_remote": False, "trace_state": {}}
    has_failed = rollout.status == "failed" and name == "agent"
    body = {
        "trace_id": trace_id,
        "span_id": span_id,
        "parent_id": parent_id,
        "name": name,
        "status": {
            "status_code": "ERROR" if has_failed else "OK",
            "description": "the answer is wrong" if has_failed else None,
        },
        "attributes": attributes,
        "events": [],
        "links": [],
        "start_time": moments[0],
        "end_time": moments[1],
        "context": context,
        "parent": None if parent_id is None else {**context, "span_id": parent_id},
        "resource": {"attributes": {"service.name": "agent"}, "schema_url": ""},
    }
    return spans.NewSpan(
        rollout_id=rollout.rollout_id,
        attempt_id=rollout.attempt_id(sequence_id),
        sequence_id=None,
        trace_id=trace_id,
        span_id=span_id,
        parent_id=parent_id,
        name=name,
        start_time=moments[0],
        end_time=moments[1],
        response_id=attributes.get(RESPONSE),
        reward=attributes.get("agentlightning.reward.0.value"),
        body=json.dumps(body).encode(),
    )


if __name__ == "__main__":
    fill(sys.argv[1], int(sys.argv[2]))
    long_generation(sys.argv[1], 32_768)
