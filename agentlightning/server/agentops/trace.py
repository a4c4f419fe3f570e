"""The spans of a trace, with model calls as vLLM recorded them, or else as their spans describe them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Connection

from agentlightning.generation import Generation
from agentlightning.store import generations, sessions
from agentlightning.store.attributes import has_failed

__all__ = ["ModelCall", "TraceSpan", "spans_of_trace", "token_totals"]

PROMPT, COMPLETION = "gen_ai.prompt", "gen_ai.completion"
# If one answer took several generations (a tool loop), the last has the whole prompt.
GENERATIONS_PER_ANSWER = 100

_decode = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A model call.

    Attributes:
        prompt_ids, response_ids: number of tokens; None if unknown.
        is_recorded: whether vLLM recorded the call; otherwise its values come from the span.
    """

    response_id: str | None
    is_recorded: bool
    prompt_ids: int | None
    response_ids: int | None
    prompt: str | None
    response: str | None


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """A span, and the model call that it describes, if any; `row` has its columns, `body` everything else."""

    row: Any
    body: Mapping[str, Any]
    call: ModelCall | None

    @property
    def attributes(self) -> Mapping[str, Any]:
        return self.body["attributes"]

    @property
    def seconds(self) -> float | None:
        """The duration; None if unknown."""
        if self.row.start_time is None or self.row.end_time is None:
            return None
        return self.row.end_time - self.row.start_time

    @property
    def state(self) -> str:
        """Its outcome, `failed` or `succeeded`, by its attributes or its status; empty if neither tells."""
        failed = has_failed(self.attributes, self.body["status"]["status_code"])
        return "" if failed is None else "failed" if failed else "succeeded"


def spans_of_trace(connection: Connection, trace_id: str) -> list[TraceSpan]:
    """Return the spans of a trace, by start."""
    found = []
    for row in sessions.spans_of(connection, trace_id):
        body = _decode(row.body)
        found.append(TraceSpan(row, body, _call(connection, row, body["attributes"])))
    return found


def _call(connection: Connection, row: Any, attributes: Mapping[str, Any]) -> ModelCall | None:
    if row.response_id is not None:
        recorded, _ = generations.page(connection, {"response_id": row.response_id}, None, GENERATIONS_PER_ANSWER)
        # If several calls have had this id, there is no telling which one the span means.
        if recorded and len({each.call_id or each.id for each in recorded}) == 1:
            return _recorded(row.response_id, recorded[-1], attributes)
    elif not any(name.startswith(PROMPT) for name in attributes):
        return None
    return ModelCall(
        row.response_id,
        False,
        _number(attributes, "gen_ai.usage.prompt_tokens", "gen_ai.usage.input_tokens"),
        _number(attributes, "gen_ai.usage.completion_tokens", "gen_ai.usage.output_tokens"),
        _text(attributes, PROMPT),
        _text(attributes, COMPLETION),
    )


def _recorded(response_id: str, generation: Generation, attributes: Mapping[str, Any]) -> ModelCall:
    prompt = generation.prompt_token_ids
    texts = [choice.text for choice in generation.choices if choice.text is not None]
    return ModelCall(
        response_id,
        True,
        None if prompt is None else len(prompt),
        sum(len(choice.token_ids or ()) for choice in generation.choices),
        _text(attributes, PROMPT) if generation.prompt_text is None else generation.prompt_text,
        "\n".join(texts) if texts else _text(attributes, COMPLETION),
    )


def _number(attributes: Mapping[str, Any], *names: str) -> int | None:
    # In Python a bool is an int, but not a number of tokens.
    return next((value for name in names if type(value := attributes.get(name)) is int and value >= 0), None)


def _text(attributes: Mapping[str, Any], prefix: str) -> str | None:
    """Join the messages under `PREFIX.0.content` and so on."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,9}})\.(role|content)")
    messages: dict[int, dict[str, Any]] = {}
    for name, value in attributes.items():
        if match := pattern.fullmatch(name):
            messages.setdefault(int(match[1]), {})[match[2]] = value
    lines = [_line(messages[number]) for number in sorted(messages)]
    return "\n".join(lines) or None


def _line(message: Mapping[str, Any]) -> str:
    role, content = message.get("role"), message.get("content", "")
    return f"{content}" if role is None else f"{role}: {content}"


def token_totals(found: Sequence[TraceSpan]) -> tuple[int, int]:
    """Return the number of prompt and response tokens, counting a call that several spans describe once."""
    calls = {each.call.response_id or each.row.key: each.call for each in found if each.call is not None}
    return sum(call.prompt_ids or 0 for call in calls.values()), sum(call.response_ids or 0 for call in calls.values())
