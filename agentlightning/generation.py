"""What one model call consumed and produced, and what is known of calls that could not be kept. Knows no vLLM."""

from __future__ import annotations

import os
import time
from array import array
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

__all__ = ["STATUSES", "Choice", "Generation", "Loss", "RoutedExperts", "Status", "field_types", "new_id"]

Status = Literal["finished", "aborted", "error"]
"""How a generation ended: by itself, because nobody waited for it any more, or because the engine failed."""
STATUSES: tuple[Status, ...] = get_args(Status)


def new_id(at: int | None = None) -> str:
    """A fresh UUIDv7 (RFC 9562) of the moment `at`, in nanoseconds since the epoch; of now if not given.

    Ids of later moments are greater, also as text, down to a quarter of a microsecond.
    """
    milliseconds, rest = divmod(time.time_ns() if at is None else at, 1_000_000)
    random = int.from_bytes(os.urandom(8), "big") >> 2
    digits = f"{(milliseconds << 16 | 0x7000 | rest * 4096 // 1_000_000) << 64 | 1 << 63 | random:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@dataclass(slots=True, frozen=True)
class RoutedExperts:
    """The experts of a mixture-of-experts model that ids went through.

    Attributes:
        shape: how many ids, how many layers, and how many experts for each.
        ids: the experts, in that order; `array('h')`, as many as the shape has places.
    """

    shape: tuple[int, int, int]
    ids: array[int]

    def tolist(self) -> list[list[list[int]]]:
        """Nested: of each id each layer's."""
        count, layers, experts = self.shape
        flat = self.ids.tolist()
        rows = [flat[start : start + experts] for start in range(0, count * layers * experts, experts)]
        return [rows[start : start + layers] for start in range(0, count * layers, layers)]


@dataclass(slots=True, kw_only=True)
class Choice:
    """One of the answers to a prompt. What is unknown is None.

    Attributes:
        index: its place among the choices.
        token_ids: what the engine sampled, stop tokens included; `array('i')`.
        logprobs: of each of those ids, as many; `array('f')`.
        text: what the client was sent for them.
        finish_reason: vLLM's word for why it ended: `stop`, `length`, `abort`, ...
        stop_reason: the stop string or token id that ended it.
        weight_versions: `(version, start, end)`: the weights that the ids from `start` up to `end` were sampled with.
        routed_experts: where vLLM was told to return them (`--enable-return-routed-experts`): of the ids of prompt and
            answer, as many and as far as vLLM gives them.
    """

    index: int = 0
    token_ids: array[int] | None = None
    logprobs: array[float] | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    weight_versions: list[tuple[str, int, int]] | None = None
    routed_experts: RoutedExperts | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, ids and logprobs as lists."""
        return _as_dict(self)


@dataclass(slots=True, kw_only=True)
class Generation:
    """One request to the engine, whole. What is unknown is None.

    Attributes:
        id: UUIDv7, its own.
        call_id: a UUID, of the HTTP call: tool loops, beam searches and batches make several generations for one call.
        request_id: the engine's name for it.
        response_id: the `id` of the answer that the client saw.
        endpoint: the route's path, `/v1/chat/completions` for one.
        model: the name that the client asked for.
        rollout_id, attempt_id, session_id: whose it is, as the call said.
        trace_id: W3C's, 32 hexadecimal digits.
        started_at, first_token_at, finished_at: nanoseconds since the epoch.
        status: `finished`, `aborted` or `error`.
        prompt_token_ids: what went into the model; `array('i')`.
        prompt_text: the prompt as text, after the chat template.
        sampling_params: as the client's request made them; JSON.
        logprobs_mode: what the logprobs of the choices are of, in vLLM's words: `raw_logprobs`, ...
        cached_tokens: how many ids of the prompt came from the prefix cache.
        choices: in index order; as many as `n` asked for.
    """

    id: str = field(default_factory=new_id)
    call_id: str | None = None
    request_id: str
    response_id: str | None = None
    endpoint: str | None = None
    model: str | None = None
    rollout_id: str | None = None
    attempt_id: str | None = None
    session_id: str | None = None
    trace_id: str | None = None
    started_at: int | None = None
    first_token_at: int | None = None
    finished_at: int
    status: Status
    prompt_token_ids: array[int] | None = None
    prompt_text: str | None = None
    sampling_params: str | None = None
    logprobs_mode: str | None = None
    cached_tokens: int | None = None
    choices: list[Choice] = field(default_factory=list[Choice])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, ids and logprobs as lists, choices as dictionaries."""
        return _as_dict(self) | {"choices": [choice.as_dict() for choice in self.choices]}


@dataclass(slots=True, kw_only=True)
class Loss:
    """Generations that could not be kept.

    Attributes:
        id: UUIDv7, its own.
        count: how many.
        reason: why, in a few words.
        first_at, last_at: when the first and the last of them were lost, in nanoseconds since the epoch.
        host, pid: the process that lost them.
    """

    id: str = field(default_factory=new_id)
    count: int
    reason: str
    first_at: int
    last_at: int
    host: str
    pid: int


def _as_dict(record: Generation | Choice) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in record.__slots__}
    return {
        name: value.tolist() if isinstance(value, array | RoutedExperts) else value for name, value in values.items()
    }


def field_types(kind: type) -> dict[str, Any]:
    """Return the types of a record's fields by name and in order, arrays as lists.

    Messages, HTTP schemas and files derive their fields from it. Before Python 3.12 `array[int]` is an annotation only.
    """
    types = get_type_hints(kind, localns={"array": list})
    return {each.name: types[each.name] for each in fields(kind)}
