"""Generations on their way to an `agl store` and back, in six versions of a message.

`application/vnd.agl.generations.v5+msgpack` has whole prompts; `application/vnd.agl.generations.v6+msgpack`, which is
for the way to the store alone, has what is new in them. Versions 3 and 4 are the same without `served_model`,
`requested_params` and `prompt_logprobs`, and without `sampling_mask` and `top_logprobs` of choices; versions 1 and 2
also without `agent_id`, `parent_agent_id`, `purpose`, `retry` and `via`: servers of earlier releases send them.

A message is a MessagePack map: `generations`, an array; `losses`, an array; `next`, the cursor of the next page; and
`sender`, the id of the process that recorded the generations. Empty entries may be absent.

Generations, choices and losses are arrays of all their fields, in the order of `agentlightning.generation`; what is
unknown is nil. Token ids are bytes of little-endian int32; logprobs of little-endian float32; routed experts of their
shape, three little-endian uint32, followed by int16; sampling masks and top logprobs are as `store.tables` has them.
All other fields are plain MessagePack.

In versions 6, 4 and 2, the ids and the text of a prompt are arrays (`store.chains` has what blocks are): the key and
the name of a block that the store is assumed to have, 0 and no bytes where there is none; the blocks after it, those of
ids packed; the name of the last of these, from which the store sees that it has put the right ones together; and the
rest.
A block may be one that came earlier in the same message; then its key is 0.

A change of the format gets another version, so that no field is taken for another.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, Any, AnyStr, TypeVar

import msgspec
from msgspec.structs import asdict

from agentlightning.errors import InvalidRecord
from agentlightning.generation import Choice, Generation, Loss, field_types, record_fields
from agentlightning.store.chains import IDS, TEXTS, Chain, Kind, Prompt, Recent
from agentlightning.store.rows import ARRAYS, Packing

__all__ = [
    "ERROR_HEADER",
    "IN_BLOCKS",
    "MEDIA_TYPE",
    "NOT_FOUND",
    "TOO_LARGE",
    "VERSIONS",
    "Envelope",
    "Refusal",
    "Sent",
    "TooMuch",
    "decode",
    "decode_each",
    "encode",
    "encode_in_blocks",
    "has_blocks",
    "missing_in",
    "without_surrogates",
]

VERSIONS = tuple(f"application/vnd.agl.generations.v{number}+msgpack" for number in (6, 5, 4, 3, 2, 1))
"""The media types of a message, newest first."""
IN_BLOCKS, MEDIA_TYPE = VERSIONS[:2]
MOST_UNPACKED = 256 << 20
"""Bytes that the blocks of one message may become. Texts are compressed, and a few bytes can stand for many."""
ERROR_HEADER = "X-AGL-Error"
"""A header of every error of `agl store`: any FastAPI application on the way answers `{"detail": "..."}`, too."""
NOT_FOUND = "not-found"
"""Its value where a rollout or another record is not found, rather than a route."""
TOO_LARGE = "too-large"
"""Its value where a rollout is too large to be read at once."""

T = TypeVar("T")


Sent = dict[str, tuple[Sequence[bytes], Sequence[bytes]]]
"""The names of the blocks that were sent for the ids and for the text of each generation, by its id."""


@dataclass(slots=True)
class Envelope:
    """Content of a message.

    Attributes:
        next: None on the last page.
        sender: None where it is unknown.
        prompts: those that arrived in blocks, by the ids of their generations, which have none.
        unpacked: bytes of the blocks of these.
    """

    generations: list[Generation] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    next: str | None = None
    sender: str | None = None
    prompts: dict[str, Prompt] = field(default_factory=dict)
    unpacked: int = 0


class TooMuch(Exception):
    """A message that becomes more than fits into memory: its sender should send it in parts."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A generation that cannot be stored, and the reason in one sentence."""

    id: str
    reason: str


_NEW_OF_CHOICES = ("sampling_mask", "top_logprobs")
_NEW = ("served_model", "requested_params", "prompt_logprobs")
"""Fields that versions 1 to 4 do not have, of choices and of generations."""
_NEW_BEFORE = ("agent_id", "parent_agent_id", "purpose", "retry", "via")
"""Fields of generations that versions 1 and 2 do not have either."""


def _message_type(kind: type, without: Sequence[str] = (), **others: Any) -> Any:
    """Derive the type of a message's part from a record's dataclass: its fields, as an array in their order."""
    types = field_types(kind, dict.fromkeys(ARRAYS, bytes)) | others
    known = [each for each in types.items() if each[0] not in without]
    return msgspec.defstruct(f"_{kind.__name__}", known, array_like=True, forbid_unknown_fields=True)


def _packings(kind: type) -> dict[str, Packing]:
    """Return how the fields of a record are packed that are arrays."""
    return {each.name: ARRAYS[each.type] for each in record_fields(kind) if each.type in ARRAYS}


_Choice = _message_type(Choice)
_OldChoice = _message_type(Choice, _NEW_OF_CHOICES)
_Loss = _message_type(Loss)


class _Cut(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A content in blocks."""

    after_key: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    after: bytes
    blocks: list[bytes]
    last: bytes


class _CutIds(_Cut, array_like=True, forbid_unknown_fields=True):
    rest: bytes


class _CutText(_Cut, array_like=True, forbid_unknown_fields=True):
    rest: str


_IN_BLOCKS: dict[str, Any] = {"prompt_token_ids": _CutIds | None, "prompt_text": _CutText | None}
_Generation = _message_type(Generation, choices=list[_Choice])


def _whole_message(generation: Any) -> Any:
    fields = [("generations", list[generation], []), ("losses", list[_Loss], [])]
    texts = [(name, str | None, None) for name in ("next", "sender")]
    return msgspec.defstruct("_Message", [*fields, *texts], forbid_unknown_fields=True)


class _Unread(msgspec.Struct, forbid_unknown_fields=True):
    """A message whose generations are not decoded yet."""

    generations: list[msgspec.Raw] = []
    losses: list[_Loss] = []  # pyright: ignore[reportInvalidTypeForm]
    next: str | None = None
    sender: str | None = None


_encoder = msgspec.msgpack.Encoder()
_unread = msgspec.msgpack.Decoder(_Unread)
_MISSING: dict[str, Sequence[str]] = dict(
    zip(VERSIONS, ((), (), _NEW, _NEW, (*_NEW, *_NEW_BEFORE), (*_NEW, *_NEW_BEFORE)), strict=True)
)
"""The fields of a generation that each version does not have."""


def missing_in(version: str) -> Sequence[str]:
    """Return the fields of generations and their choices that a version of the message does not have."""
    missing = _MISSING[version]
    return (*missing, *_NEW_OF_CHOICES) if missing else ()


def has_blocks(version: str) -> bool:
    """Tell whether a version of the message has prompts in blocks."""
    return version in VERSIONS[::2]


_KINDS = {
    version: _message_type(
        Generation,
        missing,
        choices=list[_OldChoice if missing else _Choice],
        **(_IN_BLOCKS if has_blocks(version) else {}),
    )
    for version, missing in _MISSING.items()
}
_messages = {version: msgspec.msgpack.Decoder(_whole_message(kind)) for version, kind in _KINDS.items()}
_generations = {version: msgspec.msgpack.Decoder(kind) for version, kind in _KINDS.items()}


def encode(
    generations: Sequence[Generation],
    losses: Sequence[Loss] = (),
    cursor: str | None = None,
    sender_id: str | None = None,
    version: str = MEDIA_TYPE,
) -> bytes:
    """Encode a message. Halves of surrogate pairs, which UTF-8 does not have, become question marks, as in a database.

    Args:
        cursor: of the next page; None on the last one.
        sender_id: the process that recorded the generations; None where it is unknown.
        version: one with whole prompts; if there are no generations, any.

    Raises:
        InvalidRecord: a number or another value that no message can hold.
    """
    return _encoded(
        lambda: {
            "generations": [_fields_in(version, _fields_of(generation)) for generation in generations],
            "losses": [_loss_fields(loss) for loss in losses],
            "next": cursor,
            "sender": sender_id,
        }
    )


def encode_in_blocks(
    generations: Sequence[Generation], sender_id: str | None, recent: Recent, version: str = IN_BLOCKS
) -> tuple[bytes, Sent]:
    """Encode a message with prompts in blocks.

    Args:
        recent: blocks that the store is assumed to have, with their keys there.
        version: one that has blocks.

    Returns:
        The message, and which blocks it has.

    Raises:
        InvalidRecord: a number or another value that no message can hold.
    """
    sent: Sent = {}
    in_message: set[bytes] = set()

    def packed(kind: Kind[AnyStr], whole: Chain[AnyStr] | None) -> tuple[list[Any] | None, Sequence[bytes]]:
        if whole is None:
            return None, ()
        chain = whole.continued(in_message, recent)
        in_message.update(chain.names)
        blocks = [kind.pack(block) for block in chain.blocks]
        return [chain.after_key, chain.after or b"", blocks, chain.last or b"", chain.rest], chain.names

    def fields_of(generation: Generation) -> list[Any]:
        fields = _fields_of(generation)
        prompt = Prompt.of(generation, recent)
        fields[_PROMPT], of_ids = packed(IDS, prompt.ids)
        fields[_TEXT], of_text = packed(TEXTS, prompt.text)
        sent[generation.id] = of_ids, of_text
        return _fields_in(version, fields)

    message = _encoded(lambda: {"generations": [fields_of(each) for each in generations], "sender": sender_id})
    return message, sent


def _encoded(message: Callable[[], Any]) -> bytes:
    try:
        message = message()
        try:
            return _encoder.encode(message)
        except UnicodeEncodeError:
            return _encoder.encode(without_surrogates(message))
    except (TypeError, OverflowError, struct.error) as error:
        raise InvalidRecord(f"a value that cannot be sent: {error}") from error


def count(body: bytes) -> int:
    """Count the generations and losses of a message before any is decoded; 0 where that is not possible."""
    try:
        parts = msgspec.msgpack.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 0
    return sum(_length(bytes(parts[name])) for name in ("generations", "losses") if name in parts)


def _length(array: bytes) -> int:
    """Return the number of elements that the head of a MessagePack array states."""
    head = array[0]
    if 0x90 <= head <= 0x9F:
        return head & 0x0F
    return int.from_bytes(array[1 : {0xDC: 3, 0xDD: 5}.get(head, 1)], "big")


def decode(body: bytes, version: str = MEDIA_TYPE) -> Envelope:
    """Decode a message.

    Args:
        version: its media type.

    Raises:
        ValueError: it is malformed or cut off, or one of its values is invalid.
        TooMuch: its prompts do not fit into memory.
    """
    message = _read(_messages[version], body)
    found = Envelope([], _losses_of(message.losses), message.next, message.sender)
    for each in message.generations:
        _take(found, each, version)
    return found


def decode_each(body: bytes, version: str = MEDIA_TYPE) -> tuple[Envelope, list[Refusal]]:
    """Decode a message without its invalid generations, which are returned apart.

    Args:
        version: its media type.

    Raises:
        ValueError: it is malformed or cut off.
        TooMuch: its prompts do not fit into memory.
    """
    try:
        return decode(body, version), []
    except ValueError:
        # The error is in the message or in one generation: told apart below, where it costs more time.
        message = _read(_unread, body)
    found, refused = Envelope([], _losses_of(message.losses), message.next, message.sender), list[Refusal]()
    for position, raw in enumerate(message.generations):
        try:
            _take(found, _read(_generations[version], raw), version)
        except ValueError as error:
            refused.append(Refusal(_id_of(raw, position), str(error)))
    return found, refused


def _take(envelope: Envelope, found: Any, version: str) -> None:
    """Add a generation to the content of a message."""
    if found.id in envelope.prompts:
        # The same once more: the first is kept, whose blocks the second continues.
        return
    fields = asdict(found)
    fields["choices"] = [Choice(**_unpacked(asdict(choice), _PACKED_OF_CHOICES)) for choice in found.choices]
    if has_blocks(version):
        ids, text = fields.pop("prompt_token_ids"), fields.pop("prompt_text")
        prompt = Prompt(_chain_of(IDS, ids, "prompt_token_ids"), _chain_of(TEXTS, text, "prompt_text"))
        envelope.unpacked += sum(len(block) for chain in (prompt.ids, prompt.text) if chain for block in chain.blocks)
        if envelope.unpacked > MOST_UNPACKED:
            raise TooMuch(f"the prompts of this message are more than {MOST_UNPACKED >> 20} MiB")
        envelope.prompts[found.id] = prompt
    envelope.generations.append(Generation(**_unpacked(fields, _PACKED)))


def _unpacked(fields: dict[str, Any], packings: Mapping[str, Packing]) -> dict[str, Any]:
    """Unpack the arrays among fields of a message."""
    for name, (_, unpack) in packings.items():
        if fields.get(name) is not None:
            fields[name] = unpack(fields[name])
    return fields


def _chain_of(kind: Kind[Any], found: Any, name: str) -> Chain[Any] | None:
    """Check what arrived in blocks: as long as they are cut, and named for their content."""
    if found is None:
        return None
    after = found.after or None
    try:
        if after is not None and not after.startswith(kind.seed):
            raise ValueError(f"the block {after.hex()} is one of another kind")
        blocks = kind.blocks_of(found.blocks, is_first=after is None)
        kind.check_rest(found.rest, is_whole=after is None and not blocks)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    chain = Chain(found.rest, blocks, [*kind.names(blocks, after)], after, found.after_key)
    if (chain.last or b"") != found.last:
        raise ValueError(f"{name}: the name of the last block, {found.last.hex()}, is not that of its content")
    return chain


def without_surrogates(value: Any) -> Any:
    """Replace halves of surrogate pairs in all texts by question marks."""
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
    """Return the id of a generation if it can be read, else its position in the message."""
    try:
        first, *_ = msgspec.msgpack.decode(raw, type=list[msgspec.Raw])
        return msgspec.msgpack.decode(first, type=str)
    except (msgspec.MsgspecError, ValueError):
        return f"generations[{position}]"


_generation_fields = attrgetter(*_Generation.__struct_fields__)
_choice_fields = attrgetter(*_Choice.__struct_fields__)
_loss_fields = attrgetter(*_Loss.__struct_fields__)
_PROMPT, _TEXT, _CHOICES = map(_Generation.__struct_fields__.index, ("prompt_token_ids", "prompt_text", "choices"))
_POSITIONS = {
    version: [at for at, name in enumerate(_Generation.__struct_fields__) if name not in missing]
    for version, missing in _MISSING.items()
}
_PACKED, _PACKED_OF_CHOICES = _packings(Generation), _packings(Choice)
_PACKED_AT = [(_Generation.__struct_fields__.index(name), pack) for name, (pack, _) in _PACKED.items()]
_PACKED_OF_CHOICES_AT = [
    (_Choice.__struct_fields__.index(name), pack) for name, (pack, _) in _PACKED_OF_CHOICES.items()
]


def _fields_of(generation: Generation) -> list[Any]:
    found = _packed([*_generation_fields(generation)], _PACKED_AT)
    found[_CHOICES] = [_packed([*_choice_fields(choice)], _PACKED_OF_CHOICES_AT) for choice in generation.choices]
    return found


def _packed(fields: list[Any], packings: Iterable[tuple[int, Callable[[Any], Any]]]) -> list[Any]:
    """Pack the arrays among fields, each of which stands at a position."""
    for at, pack in packings:
        if fields[at] is not None:
            fields[at] = pack(fields[at])
    return fields


def _fields_in(version: str, fields: list[Any]) -> list[Any]:
    """Leave out the fields that a version does not have: those of choices are their last."""
    if not _MISSING[version]:
        return fields
    fields[_CHOICES] = [choice[: -len(_NEW_OF_CHOICES)] for choice in fields[_CHOICES]]
    return [fields[at] for at in _POSITIONS[version]]


def _losses_of(found: Sequence[Any]) -> list[Loss]:
    return [Loss(**asdict(loss)) for loss in found]
