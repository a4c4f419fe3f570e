"""Conversion of generations and losses to rows of the tables, and back."""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from operator import attrgetter
from typing import Any, TypeVar

from agentlightning.errors import InvalidRecord
from agentlightning.generation import (
    STATUSES,
    VIAS,
    Choice,
    Generation,
    Loss,
    RoutedExperts,
    SamplingMask,
    TopLogprobs,
)

__all__ = [
    "TEXT_KEYS",
    "array_of",
    "bytes_of",
    "choice_row",
    "experts_bytes",
    "experts_of",
    "generation_of",
    "generation_row",
    "loss_of",
    "loss_row",
    "mask_bytes",
    "mask_of",
    "output_tokens",
    "repeated_texts",
    "storable",
    "text_keys",
    "text_of",
    "top_bytes",
    "top_of",
    "uuid_bytes",
    "uuid_text",
    "versions_of",
]

Text = TypeVar("Text", str, None)

Row = tuple[Any, ...]
"""Values of a row, in the order of its table's columns."""

TEXT_KEYS = {
    "endpoint": "endpoint_key",
    "model": "model_key",
    "rollout_id": "rollout_key",
    "attempt_id": "attempt_key",
    "session_id": "session_key",
    "agent_id": "agent_key",
    "parent_agent_id": "parent_agent_key",
    "purpose": "purpose_key",
    "sampling_params": "sampling_params_key",
    "logprobs_mode": "logprobs_mode_key",
    "served_model": "served_model_key",
    "requested_params": "requested_params_key",
}
"""Fields of a generation that are repeated texts, and the columns with the keys of these."""
_always_texts_of = attrgetter(*(name for name in TEXT_KEYS if name != "attempt_id"))
_keys_of = attrgetter(*TEXT_KEYS.values())


def repeated_texts(generations: Sequence[Generation]) -> set[str | None]:
    """Collect the texts of generations that their rows refer to by keys; an empty attempt id is none."""
    found = {*chain.from_iterable(map(_always_texts_of, generations))}
    found.update([each.attempt_id or None for each in generations])
    found.update([choice.finish_reason for each in generations for choice in each.choices])
    return found


def text_keys(generations: Iterable[Any], choices: Iterable[Any]) -> set[int | None]:
    """Collect the keys of texts in these rows."""
    of_generations = chain.from_iterable(map(_keys_of, generations))
    return {*of_generations, *(choice.finish_reason_key for choice in choices)}


def output_tokens(generation: Generation) -> int:
    """Count the ids of all choices."""
    return sum([len(choice.token_ids) for choice in generation.choices if choice.token_ids is not None])


def generation_row(
    generation: Generation,
    generation_id: bytes,
    prompt: tuple[int, bytes | None, str | None, int | None, int | None],
    tokens: tuple[int, int],
    key: int,
    keys: Mapping[str | None, int | None],
    sender_key: int | None,
) -> Row:
    """Make the row of `generations`.

    Args:
        generation_id: its id, as `uuid_bytes` parses it.
        prompt: as `prompts.add` has stored it, in the columns' order.
        tokens: the numbers of ids of its prompt and of all its choices.
        keys: maps its `repeated_texts` to their keys, and None to None.

    Raises:
        ValueError: the id of its call is not a UUID, or the status is unknown.
    """
    return (
        key,
        generation_id,
        None if generation.call_id is None else uuid_bytes(generation.call_id),
        storable(generation.request_id),
        storable(generation.response_id),
        keys[generation.endpoint],
        keys[generation.model],
        keys[generation.rollout_id],
        keys[generation.attempt_id or None],
        keys[generation.session_id],
        storable(generation.trace_id),
        generation.started_at,
        generation.first_token_at,
        generation.finished_at,
        STATUSES.index(generation.status),
        keys[generation.sampling_params],
        keys[generation.logprobs_mode],
        generation.cached_tokens,
        sender_key,
        *tokens,
        *prompt[1:],
        keys[generation.agent_id],
        keys[generation.parent_agent_id],
        keys[generation.purpose],
        generation.retry,
        None if generation.via is None else VIAS.index(generation.via),
        keys[generation.served_model],
        keys[generation.requested_params],
        top_bytes(generation.prompt_logprobs),
    )


def choice_row(choice: Choice, generation_key: int, keys: Mapping[str | None, int | None]) -> Row:
    """Make the row of `choices`; `keys` is as for `generation_row`."""
    return (
        generation_key,
        choice.index,
        bytes_of(choice.token_ids),
        bytes_of(choice.logprobs),
        storable(choice.text),
        keys[choice.finish_reason],
        None if choice.stop_reason is None else json.dumps(choice.stop_reason),
        None if choice.weight_versions is None else json.dumps(choice.weight_versions),
        experts_bytes(choice.routed_experts),
        mask_bytes(choice.sampling_mask),
        top_bytes(choice.top_logprobs),
    )


def generation_of(
    row: Any,
    choices: Iterable[Any],
    texts: Mapping[int | None, str | None],
    prompt: tuple[array[int] | None, str | None],
) -> Generation:
    """Read a generation from its rows.

    Args:
        texts: maps the keys of repeated texts to them, and None to None.
        prompt: the ids and the text of the prompt.
    """
    known: dict[str, Any] = dict(zip(TEXT_KEYS, map(texts.__getitem__, _keys_of(row)), strict=True))
    known["attempt_id"] = known["attempt_id"] or None
    return Generation(
        id=uuid_text(row.id),
        call_id=None if row.call_id is None else uuid_text(row.call_id),
        request_id=text_of(row.request_id),
        response_id=text_of(row.response_id),
        trace_id=text_of(row.trace_id),
        retry=row.retry,
        via=None if row.via is None else VIAS[row.via],
        started_at=row.started_at,
        first_token_at=row.first_token_at,
        finished_at=row.finished_at,
        status=STATUSES[row.status],
        prompt_token_ids=prompt[0],
        prompt_text=prompt[1],
        cached_tokens=row.cached_tokens,
        choices=[_choice_of(choice, texts) for choice in choices],
        prompt_logprobs=top_of(row.prompt_logprobs),
        **known,
    )


def _choice_of(row: Any, texts: Mapping[int | None, str | None]) -> Choice:
    return Choice(
        index=row.index,
        token_ids=array_of("i", row.token_ids),
        logprobs=array_of("f", row.logprobs),
        text=text_of(row.text),
        finish_reason=texts[row.finish_reason_key],
        stop_reason=None if row.stop_reason is None else json.loads(row.stop_reason),
        weight_versions=versions_of(row.weight_versions),
        routed_experts=experts_of(row.routed_experts),
        sampling_mask=mask_of(row.sampling_mask),
        top_logprobs=top_of(row.top_logprobs),
    )


def versions_of(found: str | None) -> list[tuple[str, int, int]] | None:
    """Parse the weight versions of a choice."""
    return None if found is None else [tuple(version) for version in json.loads(found)]


def loss_row(loss: Loss, key: int) -> Row:
    """Make the row of `losses`."""
    return (
        key,
        uuid_bytes(loss.id),
        loss.count,
        storable(loss.reason),
        loss.first_at,
        loss.last_at,
        storable(loss.host),
        loss.pid,
    )


def loss_of(row: Any) -> Loss:
    """Read a loss from its row."""
    return Loss(
        id=uuid_text(row.id),
        count=row.count,
        reason=text_of(row.reason),
        first_at=row.first_at,
        last_at=row.last_at,
        host=text_of(row.host),
        pid=row.pid,
    )


def uuid_bytes(text: str) -> bytes:
    """Parse a UUID into its sixteen bytes.

    Raises:
        InvalidRecord: the text is not a UUID as `new_id` writes one; only that form can be restored from the bytes.
    """
    digits = text.replace("-", "")
    try:
        found = bytes.fromhex(digits)
    except ValueError:
        found = b""
    if len(text) == 36 and text[8:24:5] == "----" and found.hex() == digits:
        return found
    raise InvalidRecord(f"{text[:100]!r} is not a lower-case UUID")


def uuid_text(found: bytes) -> str:
    """Write a UUID, given as sixteen bytes."""
    digits = found.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


# A noncharacter: Unicode reserves it for internal use.
_ESCAPE = "\ufdd0"


def storable(text: str | None) -> str | None:
    """Encode a text so that every database can store it; `text_of` decodes it.

    Halves of surrogate pairs are lost: JSON may have them, UTF-8 cannot encode them, and each becomes a question mark.
    """
    if text is None:
        return None
    if "\0" in text or _ESCAPE in text:
        text = text.replace(_ESCAPE, f"{_ESCAPE}1").replace("\0", f"{_ESCAPE}0")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def text_of(found: Text) -> Text:
    """Decode a text that `storable` encoded."""
    if found is None or _ESCAPE not in found:
        return found
    return found.replace(f"{_ESCAPE}0", "\0").replace(f"{_ESCAPE}1", _ESCAPE)


def bytes_of(numbers: array[Any] | None) -> bytes | None:
    """Pack numbers, little-endian."""
    if numbers is None or sys.byteorder == "little":
        return None if numbers is None else numbers.tobytes()
    swapped = numbers[:]
    swapped.byteswap()
    return swapped.tobytes()


def array_of(kind: str, found: bytes | None) -> Any:
    """Unpack the numbers that `bytes_of` packed.

    Args:
        kind: type code of the array.

    Raises:
        ValueError: the length is not a multiple of a number's size.
    """
    if found is None:
        return None
    numbers = array(kind, found)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


_SHAPE = struct.Struct("<3I")


def experts_bytes(experts: RoutedExperts | None) -> bytes | None:
    """Pack routed experts: the shape, three uint32, and then the experts, int16."""
    return None if experts is None else _SHAPE.pack(*experts.shape) + (bytes_of(experts.ids) or b"")


def experts_of(found: bytes | None) -> RoutedExperts | None:
    """Unpack the routed experts that `experts_bytes` packed."""
    return None if found is None else RoutedExperts(_SHAPE.unpack_from(found), array_of("h", found[_SHAPE.size :]))


def mask_bytes(mask: SamplingMask | None) -> bytes | None:
    """Pack a sampling mask: its number of positions, the number of ids at each, and then the ids."""
    return None if mask is None else _offset_bytes(mask.offsets) + (bytes_of(mask.ids) or b"")


def mask_of(found: bytes | None) -> SamplingMask | None:
    """Unpack the sampling mask that `mask_bytes` packed.

    Raises:
        ValueError: it is not as long as it says.
    """
    if found is None:
        return None
    offsets, ids = _offsets_of(found)
    return SamplingMask(offsets, array_of("i", _exactly(ids, offsets[-1] * 4)))


def top_bytes(top: TopLogprobs | None) -> bytes | None:
    """Pack logprobs of ids and alternatives, as `mask_bytes` does, and then the logprobs."""
    if top is None:
        return None
    return _offset_bytes(top.offsets) + (bytes_of(top.ids) or b"") + (bytes_of(top.logprobs) or b"")


def top_of(found: bytes | None) -> TopLogprobs | None:
    """Unpack the logprobs that `top_bytes` packed.

    Raises:
        ValueError: it is not as long as it says.
    """
    if found is None:
        return None
    offsets, rest = _offsets_of(found)
    half = offsets[-1] * 4
    rest = _exactly(rest, 2 * half)
    return TopLogprobs(offsets, array_of("i", rest[:half]), array_of("f", rest[half:]))


def _offset_bytes(offsets: array[int]) -> bytes:
    counts = array("I", (end - start for start, end in pairwise(offsets)))
    return struct.pack("<I", len(counts)) + (bytes_of(counts) or b"")


def _offsets_of(found: bytes) -> tuple[array[int], bytes]:
    """Return the offsets at the beginning, and what follows them."""
    start = 4 + 4 * int.from_bytes(found[:4], "little")
    if len(found) < start:
        raise ValueError("numbers of ids are missing")
    counts = array_of("I", found[4:start])
    if sum(counts) * 4 > len(found):
        # Not only for the message: an offset has no room for more than 2^32.
        raise ValueError(f"{len(found) - start} bytes of ids, which are fewer than their numbers say")
    return array("I", accumulate(counts, initial=0)), found[start:]


def _exactly(found: bytes, length: int) -> bytes:
    if len(found) != length:
        raise ValueError(f"{len(found)} bytes of ids, and not {length} as their numbers say")
    return found
