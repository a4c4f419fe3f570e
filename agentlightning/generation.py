"""Generations, each with what one request to the engine consumed and produced, and reports of lost ones."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from itertools import accumulate, chain, pairwise
from math import inf
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

__all__ = [
    "STATUSES",
    "VERSION",
    "VIAS",
    "Choice",
    "Generation",
    "Loss",
    "RecordField",
    "RoutedExperts",
    "SamplingMask",
    "SharedText",
    "Status",
    "TopLogprobs",
    "Uuid",
    "Via",
    "field_types",
    "named",
    "new_id",
    "record_fields",
    "unnamed",
    "with_arrays",
    "with_lists",
]

Status = Literal["finished", "aborted", "error"]
"""The end of a generation: by itself, because no client was waiting any more, or because the engine failed."""
STATUSES: tuple[Status, ...] = get_args(Status)
Via = Literal["http", "router", "process", "grpc", "engine"]
"""The way that a request came: over HTTP, over HTTP through a router, from a program in vLLM's own process, over gRPC,
or to an engine core from a frontend that is not instrumented."""
VIAS: tuple[Via, ...] = get_args(Via)
Uuid = Annotated[str, "UUID"]
"""A UUID as `new_id` writes one."""
SharedText = Annotated[str, "shared"]
"""A text that many records have, so that stores keep it once."""


def new_id(at: int | None = None) -> str:
    """Create a UUIDv7 (RFC 9562).

    Ids of later times are greater, also as text, down to a quarter of a microsecond.

    Args:
        at: nanoseconds since the epoch; None for now.
    """
    milliseconds, rest = divmod(time.time_ns() if at is None else at, 1_000_000)
    random = int.from_bytes(os.urandom(8), "big") >> 2
    digits = f"{(milliseconds << 16 | 0x7000 | rest * 4096 // 1_000_000) << 64 | 1 << 63 | random:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@dataclass(slots=True, frozen=True)
class RoutedExperts:
    """The experts of a mixture-of-experts model that ids were routed to.

    Attributes:
        shape: number of ids, of layers, and of experts per id and layer.
        ids: the experts, in that order; `array('h')`, as long as the product of the shape.
    """

    shape: tuple[int, int, int]
    ids: array[int]

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[Sequence[int]]]) -> RoutedExperts:
        """Restore them from `tolist`."""
        shape = (len(lists), len(lists[0]), len(lists[0][0])) if lists else (0, 0, 0)
        return cls(shape, array("h", [each for of_id in lists for layer in of_id for each in layer]))

    def tolist(self) -> list[list[list[int]]]:
        """Return nested lists: for each id and layer its experts."""
        count, layers, experts = self.shape
        flat = self.ids.tolist()
        rows = [flat[start : start + experts] for start in range(0, count * layers * experts, experts)]
        return [rows[start : start + layers] for start in range(0, count * layers, layers)]


@dataclass(slots=True, frozen=True)
class SamplingMask:
    """The ids that top-p, top-k and min-p left to choose from, for each sampled id.

    Attributes:
        offsets: where those of each sampled id begin in `ids`, and where the last ones end; `array('I')`.
        ids: `array('i')`.
    """

    offsets: array[int]
    ids: array[int]

    @classmethod
    def of_counts(cls, counts: Iterable[int], ids: array[int]) -> SamplingMask:
        """Make it of the number of ids at each position."""
        return cls(array("I", accumulate(counts, initial=0)), ids)

    @classmethod
    def of_lists(cls, lists: Iterable[Sequence[int]]) -> SamplingMask:
        """Restore it from `tolist`."""
        lists = list(lists)
        return cls.of_counts(map(len, lists), array("i", chain.from_iterable(lists)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tolist(self) -> list[list[int]]:
        """Return a list for each sampled id."""
        ids, ends = self.ids.tolist(), self.offsets.tolist()
        return [ids[start:end] for start, end in pairwise(ends)]


@dataclass(slots=True, frozen=True)
class TopLogprobs:
    """The logprobs that a client asked for, for each id of a prompt or an answer: of this id, then of others.

    Attributes:
        offsets: where those of each id begin in `ids` and `logprobs`, and where the last ones end; `array('I')`. The
            first id of a prompt has none.
        ids: `array('i')`.
        logprobs: one for each of `ids`; `array('f')`.
    """

    offsets: array[int]
    ids: array[int]
    logprobs: array[float]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tolist(self) -> list[list[dict[str, Any]]]:
        """Return a list for each id, of `{"id": ..., "logprob": ...}`."""
        pairs = [{"id": each, "logprob": value} for each, value in zip(self.ids, self.logprobs, strict=True)]
        return [pairs[start:end] for start, end in pairwise(self.offsets)]


@dataclass(slots=True, kw_only=True)
class Choice:
    """An answer to a prompt. An unknown field is None.

    Attributes:
        index: position among the choices.
        token_ids: the ids that the engine sampled, stop tokens included; `array('i')`.
        logprobs: one for each of those ids; `array('f')`.
        text: the text that the client was sent for them.
        finish_reason: vLLM's word for why it ended: `stop`, `length`, `abort`, ...
        stop_reason: the stop string or token id that ended it.
        weight_versions: `(version, start, end)`: the weights that the ids from `start` up to `end` were sampled with.
        routed_experts: those of the ids of prompt and answer, as far as vLLM returns them; only if vLLM was started
            with `--enable-return-routed-experts`.
        sampling_mask: the ids that each of those was chosen from; only if vLLM was started with
            `--return-sampling-mask`.
        top_logprobs: the alternatives to each of those ids; only if the client asked for them.
    """

    index: int = 0
    token_ids: array[int] | None = None
    logprobs: array[float] | None = None
    text: str | None = None
    finish_reason: SharedText | None = None
    stop_reason: int | str | None = None
    weight_versions: list[tuple[str, int, int]] | None = None
    routed_experts: RoutedExperts | None = None
    sampling_mask: SamplingMask | None = None
    top_logprobs: TopLogprobs | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with lists in the place of arrays."""
        return with_lists(self)


@dataclass(slots=True, kw_only=True)
class Generation:
    """A request to the engine, from prompt to last token. An unknown field is None.

    Attributes:
        id: a UUIDv7.
        call_id: a UUID for the HTTP call: tool loops, beam searches and batches make several generations for one call.
        request_id: the engine's name for the request.
        response_id: the `id` of the answer that the client saw.
        endpoint: path of the route, such as `/v1/chat/completions`, or the method of a program's call: `LLM.generate`.
        model: the name that the client asked for.
        served_model: the name of the model that answered in its place (`AGL_MODEL_NAMES`).
        rollout_id, attempt_id, session_id: where the generation belongs, according to the call.
        trace_id: W3C trace id, 32 hexadecimal digits.
        agent_id, parent_agent_id: which of the rollout's agents called, and the one that had started it.
        purpose: what the agent called for: `main`, `sub-agent`, `compaction`, `review`, `title`, or any other text.
        retry: how often the client's SDK had tried this call before.
        via: how the request came: `http`, `router`, `process`, `grpc` or `engine`; see `Via`.
        started_at, first_token_at, finished_at: nanoseconds since the epoch.
        status: `finished`, `aborted` or `error`.
        prompt_token_ids: the ids that went into the model; `array('i')`.
        prompt_text: the prompt as text, after the chat template.
        sampling_params: the parameters that the engine sampled with; JSON.
        requested_params: of these, the values that the client's request led to, where others were pinned
            (`AGL_SAMPLING`); JSON.
        logprobs_mode: the kind of the choices' logprobs, in vLLM's words: `raw_logprobs`, ...
        cached_tokens: number of the prompt's ids that came from the prefix cache.
        prompt_logprobs: of the prompt's ids, and of alternatives to them; only if the client asked for them.
        choices: in index order; as many as `n` asked for.
    """

    id: Uuid = field(default_factory=new_id)
    call_id: Uuid | None = None
    request_id: str
    response_id: str | None = None
    endpoint: SharedText | None = None
    model: SharedText | None = None
    rollout_id: SharedText | None = None
    attempt_id: SharedText | None = None
    session_id: SharedText | None = None
    trace_id: str | None = None
    agent_id: SharedText | None = None
    parent_agent_id: SharedText | None = None
    purpose: SharedText | None = None
    retry: int | None = None
    via: Via | None = None
    started_at: int | None = None
    first_token_at: int | None = None
    finished_at: int
    status: Status
    prompt_token_ids: array[int] | None = None
    prompt_text: str | None = None
    sampling_params: SharedText | None = None
    logprobs_mode: SharedText | None = None
    cached_tokens: int | None = None
    choices: list[Choice] = field(default_factory=list[Choice])
    served_model: SharedText | None = None
    requested_params: SharedText | None = None
    prompt_logprobs: TopLogprobs | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with lists in the place of arrays, and choices as dictionaries."""
        return with_lists(self) | {"choices": [choice.as_dict() for choice in self.choices]}


@dataclass(slots=True, kw_only=True)
class Loss:
    """A report of generations that could not be stored.

    Attributes:
        id: a UUIDv7.
        count: number of lost generations.
        reason: why they were lost, in a few words.
        first_at, last_at: when the first and the last of them were lost, in nanoseconds since the epoch.
        host, pid: the process that lost them.
    """

    id: Uuid = field(default_factory=new_id)
    count: int
    reason: str
    first_at: int
    last_at: int
    host: str
    pid: int


class RecordField(NamedTuple):
    """A field of a record.

    Attributes:
        type: without None; an array is a list, since before Python 3.12 `array[int]` is an annotation only.
        is_nullable: True where the value may be None.
    """

    name: str
    type: Any
    is_nullable: bool


def record_fields(kind: type) -> list[RecordField]:
    """Return the fields of a record, in order.

    Tables, messages, HTTP schemas and files list no fields: each maps these types to its own.
    """
    types = get_type_hints(kind, localns={"array": list}, include_extras=True)
    return [RecordField(each.name, *_without_none(types[each.name])) for each in fields(kind)]


def field_types(kind: type, replaced: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    """Return the types of a record's fields by name and in order, arrays as lists.

    Args:
        replaced: maps types to others that take their places.
    """
    others: dict[Any, Any] = {Uuid: str, SharedText: str, **(replaced or {})}
    found = [(each.name, others.get(each.type, each.type), each.is_nullable) for each in record_fields(kind)]
    return {name: of | None if is_nullable else of for name, of, is_nullable in found}


def _without_none(of: Any) -> tuple[Any, bool]:
    members = get_args(of) if get_origin(of) in (Union, UnionType) else (of,)
    known = tuple(each for each in members if each is not NoneType)
    return Union[known], len(known) < len(members)  # noqa: UP007


_ARRAYS = (array, RoutedExperts, SamplingMask, TopLogprobs)


def _logprobs_of(found: Iterable[float | None]) -> array[float]:
    # JSON has no infinity.
    return array("f", [-inf if each is None else each for each in found])


_OF_LISTS: dict[Any, Any] = {
    list[int]: partial(array, "i"),
    list[float]: _logprobs_of,
    RoutedExperts: RoutedExperts.of_lists,
    SamplingMask: SamplingMask.of_lists,
}


def with_lists(record: Any) -> dict[str, Any]:
    """Return the fields of a record with lists in the place of arrays, for JSON."""
    values = {name: getattr(record, name) for name in record.__slots__}
    return {name: value.tolist() if isinstance(value, _ARRAYS) else value for name, value in values.items()}


def with_arrays(kind: type, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record from those of `with_lists`, in which a logprob of null is negative infinity.

    Raises:
        KeyError, TypeError, ValueError: they are not those of such a record.
    """
    values = {name: (found[name], array_of) for name, array_of in _arrays_in(kind)}
    return {
        name: value if value is None or array_of is None else array_of(value)
        for name, (value, array_of) in values.items()
    }


@lru_cache(16)
def _arrays_in(kind: type) -> list[tuple[str, Any]]:
    return [(each.name, _OF_LISTS.get(each.type)) for each in record_fields(kind)]


VERSION = ("version", "start", "end")
"""Names of the parts of a weight version, where JSON has it as an object."""


def named(names: Sequence[str], tuples: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    """Turn tuples into dictionaries with these names."""
    return [dict(zip(names, each, strict=True)) for each in tuples]


def unnamed(names: Sequence[str], dictionaries: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Turn the dictionaries of `named` back into tuples."""
    return [tuple(each[name] for name in names) for each in dictionaries]
