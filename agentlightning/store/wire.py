"""Generations on their way to an `agl store` and back: `application/vnd.agl.generations.v1+msgpack`.

A message is MessagePack: a map of `generations`, an array; `losses`, an array; `next`, the cursor of the page after
this one; and `sender`, the id of who has recorded the generations. What there is nothing of may be left out.

Generations, choices and losses are arrays of their fields, all of them, in the order that they have here, which is that
of `agentlightning.generation`; what is unknown is nil. Ids of tokens are bytes, of little-endian int32; logprobs of
little-endian float32; routed experts of their shape, three little-endian uint32, and then int16. All else is as it is.

Whatever is to be sent otherwise gets another version, so that nobody takes one field for another.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import msgspec
from msgspec.structs import asdict

from agentlightning.generation import Choice, Generation, Loss, RoutedExperts, Status
from agentlightning.store.rows import array_of, bytes_of, experts_bytes, experts_of

__all__ = ["ERROR_HEADER", "MEDIA_TYPE", "Envelope", "Refusal", "decode", "decode_each", "encode", "without_surrogates"]

MEDIA_TYPE = "application/vnd.agl.generations.v1+msgpack"
ERROR_HEADER = "X-AGL-Error"
"""What every error of `agl store` has: `{"detail": "..."}` alone is what any FastAPI on the way answers, too."""

T = TypeVar("T")


@dataclass(slots=True)
class Envelope:
    """What a message has in it; `next` is None where no page comes after it, `sender` where it is not known."""

    generations: list[Generation] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    next: str | None = None
    sender: str | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A generation that cannot be kept, and why, in one sentence."""

    id: str
    reason: str


class _Choice(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    index: int
    token_ids: bytes | None
    logprobs: bytes | None
    text: str | None
    finish_reason: str | None
    stop_reason: int | str | None
    weight_versions: list[tuple[str, int, int]] | None
    routed_experts: bytes | None


class _Generation(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    id: str
    call_id: str | None
    request_id: str
    response_id: str | None
    endpoint: str | None
    model: str | None
    rollout_id: str | None
    attempt_id: str | None
    session_id: str | None
    trace_id: str | None
    started_at: int | None
    first_token_at: int | None
    finished_at: int
    status: Status
    prompt_token_ids: bytes | None
    prompt_text: str | None
    sampling_params: str | None
    logprobs_mode: str | None
    cached_tokens: int | None
    choices: list[_Choice]


class _Loss(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    id: str
    count: int
    reason: str
    first_at: int
    last_at: int
    host: str
    pid: int


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    generations: list[_Generation] = []
    losses: list[_Loss] = []
    next: str | None = None
    sender: str | None = None


class _Unread(msgspec.Struct, forbid_unknown_fields=True):
    """A message, each of whose generations may be anything."""

    generations: list[msgspec.Raw] = []
    losses: list[_Loss] = []
    next: str | None = None
    sender: str | None = None


_encoder = msgspec.msgpack.Encoder()
_messages = msgspec.msgpack.Decoder(_Message)
_unread = msgspec.msgpack.Decoder(_Unread)
_generations = msgspec.msgpack.Decoder(_Generation)


def encode(
    generations: Sequence[Generation],
    losses: Sequence[Loss] = (),
    cursor: str | None = None,
    sender_id: str | None = None,
) -> bytes:
    """The message. Halves of surrogate pairs, which no UTF-8 has, become question marks, as in a database.

    Args:
        cursor: of the page that comes after this one; None where there is none.
        sender_id: of who has recorded the generations; None where that is not known.

    Raises:
        ValueError: a number, or something else, that no message can hold.
    """
    try:
        message = {
            "generations": [_fields_of(generation) for generation in generations],
            "losses": [tuple(getattr(loss, name) for name in _Loss.__struct_fields__) for loss in losses],
            "next": cursor,
            "sender": sender_id,
        }
        try:
            return _encoder.encode(message)
        except UnicodeEncodeError:
            return _encoder.encode(without_surrogates(message))
    except (TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"something that cannot be sent: {error}") from error


def count(body: bytes) -> int:
    """How many generations and losses a message has, before anything is made of them; 0 where it cannot be told."""
    try:
        parts = msgspec.msgpack.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0
    return sum(_length(bytes(parts[name])) for name in ("generations", "losses") if name in parts)


def _length(array: bytes) -> int:
    """How many elements an array in MessagePack has, as its head says."""
    head = array[0]
    if 0x90 <= head <= 0x9F:
        return head & 0x0F
    return int.from_bytes(array[1 : {0xDC: 3, 0xDD: 5}.get(head, 1)], "big")


def decode(body: bytes) -> Envelope:
    """What the message has in it.

    Raises:
        ValueError: it is none, is cut off, or has something in it that is not as it has to be.
    """
    message = _read(_messages, body)
    generations = [_generation_of(found) for found in message.generations]
    return Envelope(generations, _losses_of(message.losses), message.next, message.sender)


def decode_each(body: bytes) -> tuple[Envelope, list[Refusal]]:
    """What the message has in it, without the generations that are not as they have to be, and which these are.

    Raises:
        ValueError: it is no message, or is cut off.
    """
    try:
        return decode(body), []
    except ValueError:
        # Of the message or of one of many: told apart below, where it takes its time.
        message = _read(_unread, body)
    generations, refused = [], []
    for position, raw in enumerate(message.generations):
        try:
            generations.append(_generation_of(_read(_generations, raw)))
        except ValueError as error:
            refused.append(Refusal(_id_of(raw, position), str(error)))
    return Envelope(generations, _losses_of(message.losses), message.next, message.sender), refused


def without_surrogates(value: Any) -> Any:
    """The same, where its texts have question marks in the place of halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {without_surrogates(name): without_surrogates(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_surrogates(each) for each in value]
    return value


def _read(decoder: msgspec.msgpack.Decoder[T], body: bytes | msgspec.Raw) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}") from error


def _id_of(raw: msgspec.Raw, position: int) -> str:
    """The id as far as there is one, else which of the message it is."""
    try:
        first, *_ = msgspec.msgpack.decode(raw, type=list[msgspec.Raw])
        return msgspec.msgpack.decode(first, type=str)
    except (msgspec.MsgspecError, ValueError):
        return f"generations[{position}]"


def _fields_of(generation: Generation) -> tuple[Any, ...]:
    return (
        generation.id,
        generation.call_id,
        generation.request_id,
        generation.response_id,
        generation.endpoint,
        generation.model,
        generation.rollout_id,
        generation.attempt_id,
        generation.session_id,
        generation.trace_id,
        generation.started_at,
        generation.first_token_at,
        generation.finished_at,
        generation.status,
        bytes_of(generation.prompt_token_ids),
        generation.prompt_text,
        generation.sampling_params,
        generation.logprobs_mode,
        generation.cached_tokens,
        [_fields_of_choice(choice) for choice in generation.choices],
    )


def _fields_of_choice(choice: Choice) -> tuple[Any, ...]:
    return (
        choice.index,
        bytes_of(choice.token_ids),
        bytes_of(choice.logprobs),
        choice.text,
        choice.finish_reason,
        choice.stop_reason,
        choice.weight_versions,
        experts_bytes(choice.routed_experts),
    )


def _generation_of(found: _Generation) -> Generation:
    fields = asdict(found)
    fields["prompt_token_ids"] = array_of("i", found.prompt_token_ids)
    fields["choices"] = [_choice_of(choice) for choice in found.choices]
    return Generation(**fields)


def _choice_of(found: _Choice) -> Choice:
    fields = asdict(found)
    fields["token_ids"] = array_of("i", found.token_ids)
    fields["logprobs"] = array_of("f", found.logprobs)
    fields["routed_experts"] = _experts_of(found.routed_experts)
    return Choice(**fields)


def _experts_of(found: bytes | None) -> RoutedExperts | None:
    try:
        experts = experts_of(found)
    except struct.error as error:
        raise ValueError("routed experts without their shape") from error
    if experts is not None and prod(experts.shape) != len(experts.ids):
        raise ValueError(f"{len(experts.ids)} routed experts, which is not what their shape says: {experts.shape}")
    return experts


def _losses_of(found: Sequence[_Loss]) -> list[Loss]:
    return [Loss(**asdict(loss)) for loss in found]
