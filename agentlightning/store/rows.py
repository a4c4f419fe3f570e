"""A `Generation` as rows of the tables, and back."""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

from agentlightning.generation import STATUSES, Choice, Generation, Loss, RoutedExperts

__all__ = [
    "array_of",
    "bytes_of",
    "choice_row",
    "experts_bytes",
    "experts_of",
    "generation_of",
    "generation_row",
    "loss_of",
    "loss_row",
    "repeated_texts",
    "storable",
    "text_keys",
    "text_of",
    "token_counts",
    "uuid_bytes",
    "uuid_text",
    "versions_of",
]

Text = TypeVar("Text", str, None)

Row = tuple[Any, ...]
"""A row's values, in the order of its table's columns."""

_TEXT_KEYS = attrgetter(
    "endpoint_key",
    "model_key",
    "rollout_key",
    "attempt_key",
    "session_key",
    "sampling_params_key",
    "logprobs_mode_key",
)


def repeated_texts(generation: Generation) -> Iterator[str | None]:
    """What its rows have the keys of, in the place of the text itself."""
    yield generation.endpoint
    yield generation.model
    yield generation.rollout_id
    yield generation.attempt_id
    yield generation.session_id
    yield generation.sampling_params
    yield generation.logprobs_mode
    for choice in generation.choices:
        yield choice.finish_reason


def text_keys(generations: Iterable[Any], choices: Iterable[Any]) -> set[int | None]:
    """What these rows have in the place of a text."""
    of_generations = chain.from_iterable(map(_TEXT_KEYS, generations))
    return {*of_generations, *(choice.finish_reason_key for choice in choices)}


def token_counts(generation: Generation) -> tuple[int, int]:
    """How many ids its prompt has, and all of its choices."""
    outputs = 0
    for choice in generation.choices:
        if choice.token_ids is not None:
            outputs += len(choice.token_ids)
    return len(generation.prompt_token_ids or ()), outputs


def generation_row(
    generation: Generation,
    counts: tuple[int, int],
    key: int,
    keys: Mapping[str | None, int | None],
    sender_key: int | None,
) -> Row:
    """The row of `generations`; `keys` gives each repeated text's, and None for None; `counts` are its `token_counts`.

    Raises:
        ValueError: an id is no UUID, or the status is none.
    """
    return (
        key,
        uuid_bytes(generation.id),
        None if generation.call_id is None else uuid_bytes(generation.call_id),
        storable(generation.request_id),
        storable(generation.response_id),
        keys[generation.endpoint],
        keys[generation.model],
        keys[generation.rollout_id],
        keys[generation.attempt_id],
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
        *counts,
        bytes_of(generation.prompt_token_ids),
        storable(generation.prompt_text),
    )


def choice_row(choice: Choice, generation_key: int, keys: Mapping[str | None, int | None]) -> Row:
    """The row of `choices`."""
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
    )


def generation_of(row: Any, choices: Iterable[Any], texts: Mapping[int | None, str | None]) -> Generation:
    """The generation that these rows are of; `texts` gives each repeated text by its key, and None for None."""
    return Generation(
        id=uuid_text(row.id),
        call_id=None if row.call_id is None else uuid_text(row.call_id),
        request_id=text_of(row.request_id),
        response_id=text_of(row.response_id),
        endpoint=texts[row.endpoint_key],
        model=texts[row.model_key],
        rollout_id=texts[row.rollout_key],
        attempt_id=texts[row.attempt_key],
        session_id=texts[row.session_key],
        trace_id=text_of(row.trace_id),
        started_at=row.started_at,
        first_token_at=row.first_token_at,
        finished_at=row.finished_at,
        status=STATUSES[row.status],
        prompt_token_ids=array_of("i", row.prompt_token_ids),
        prompt_text=text_of(row.prompt_text),
        sampling_params=texts[row.sampling_params_key],
        logprobs_mode=texts[row.logprobs_mode_key],
        cached_tokens=row.cached_tokens,
        choices=[_choice_of(choice, texts) for choice in choices],
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
    )


def versions_of(found: str | None) -> list[tuple[str, int, int]] | None:
    """The weight versions that a column has the JSON of."""
    return None if found is None else [tuple(version) for version in json.loads(found)]


def loss_row(loss: Loss, key: int) -> Row:
    """The row of `losses`."""
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
    """The loss that this row is of."""
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
    """The sixteen bytes of a UUID.

    Raises:
        ValueError: it is none, or not written as `new_id` writes one, and so could not be given back as it was.
    """
    digits = text.replace("-", "")
    try:
        found = bytes.fromhex(digits)
    except ValueError:
        found = b""
    if len(text) == 36 and text[8:24:5] == "----" and found.hex() == digits:
        return found
    raise ValueError(f"{text[:100]!r} is no UUID in lower case")


def uuid_text(found: bytes) -> str:
    """The UUID that has these sixteen bytes."""
    digits = found.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


# A noncharacter, which no text has that is for others to read.
_ESCAPE = "\ufdd0"


def storable(text: str | None) -> str | None:
    """The text as every database can hold it: `text_of` gives it back.

    But for halves of surrogate pairs: JSON may have them, UTF-8 has no way to, and each becomes a question mark.
    """
    if text is None:
        return None
    if "\0" in text or _ESCAPE in text:
        text = text.replace(_ESCAPE, f"{_ESCAPE}1").replace("\0", f"{_ESCAPE}0")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def text_of(found: Text) -> Text:
    """The text that `storable` made this of."""
    if found is None or _ESCAPE not in found:
        return found
    return found.replace(f"{_ESCAPE}0", "\0").replace(f"{_ESCAPE}1", _ESCAPE)


def bytes_of(numbers: array[Any] | None) -> bytes | None:
    """The numbers, little-endian; None of None."""
    if numbers is None or sys.byteorder == "little":
        return None if numbers is None else numbers.tobytes()
    swapped = numbers[:]
    swapped.byteswap()
    return swapped.tobytes()


def array_of(kind: str, found: bytes | None) -> Any:
    """The array, of this type code, that `bytes_of` made this of.

    Raises:
        ValueError: no number is as long as what is left at the end.
    """
    if found is None:
        return None
    numbers = array(kind, found)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


_SHAPE = struct.Struct("<3I")


def experts_bytes(experts: RoutedExperts | None) -> bytes | None:
    """The shape, three uint32, and then the experts, int16; None of None."""
    return None if experts is None else _SHAPE.pack(*experts.shape) + (bytes_of(experts.ids) or b"")


def experts_of(found: bytes | None) -> RoutedExperts | None:
    """What `experts_bytes` made this of."""
    return None if found is None else RoutedExperts(_SHAPE.unpack_from(found), array_of("h", found[_SHAPE.size :]))
