"""Generations as messages: what is put in comes out, and what is no message is told so."""

from __future__ import annotations

from array import array
from dataclasses import fields
from typing import Any

import msgspec
import pytest

from agentlightning.generation import Choice, Generation, Loss, RoutedExperts
from agentlightning.store import wire
from tests.common.generations import EMPTY, FULL, HOSTILE, START, generation

pytestmark = pytest.mark.tier("check")

LOSS = Loss(count=3, reason="queue full", first_at=START, last_at=START + 1, host="größe\0", pid=7)


def test_a_message_comes_back_as_it_was() -> None:
    sent = wire.encode([FULL, EMPTY, generation(1)], [LOSS], "a place")

    found = wire.decode(sent)

    assert found.generations[:2] == [FULL, EMPTY]
    assert found.losses == [LOSS]
    assert found.next == "a place"
    assert wire.decode_each(sent) == (found, [])


def test_nothing_comes_back_as_nothing() -> None:
    assert wire.decode(wire.encode([])) == wire.Envelope([], [], None)
    assert wire.decode(b"\x80") == wire.Envelope([], [], None)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_any_text_comes_back_exactly(text: str) -> None:
    names = dict.fromkeys(("rollout_id", "session_id", "response_id", "request_id", "prompt_text", "model"), text)
    kept = generation(1, **names, choices=[Choice(text=text, stop_reason=text, weight_versions=[(text, 0, 1)])])

    assert wire.decode(wire.encode([kept])).generations == [kept]


def test_half_a_surrogate_pair_becomes_a_question_mark_wherever_it_is() -> None:
    choice = Choice(text="\udfff", stop_reason="a\ud800", weight_versions=[("\ud800", 0, 1)])
    sent = wire.encode([generation(1, rollout_id="r\ud800\0", choices=[choice]), FULL])

    found, other = wire.decode(sent).generations

    assert found.rollout_id == "r?\0"
    assert found.choices == [Choice(text="?", stop_reason="a?", weight_versions=[("?", 0, 1)])]
    assert other == FULL


def test_numbers_are_little_endian_bytes_and_fields_are_in_the_order_of_the_generation() -> None:
    [sent] = msgspec.msgpack.decode(wire.encode([FULL]))["generations"]

    named = dict(zip([field.name for field in fields(Generation)], sent, strict=True))
    assert named["id"] == FULL.id
    assert named["finished_at"] == FULL.finished_at
    assert named["prompt_token_ids"].hex() == "0000000001000000ffffff7fffffffff"
    choice = dict(zip([field.name for field in fields(Choice)], named["choices"][0], strict=True))
    assert choice["token_ids"].hex() == "0700000008000000"
    assert choice["logprobs"].hex() == "cdccccbd000080ff"
    assert choice["routed_experts"].hex().startswith("020000000300000002000000" + "00000100")


def test_what_is_cut_off_anywhere_is_no_message() -> None:
    sent = wire.encode([FULL, EMPTY], [LOSS])

    for end in range(len(sent)):
        for read in (wire.decode, wire.decode_each):
            with pytest.raises(ValueError, match="cannot be read"):
                read(sent[:end])


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"\xc1",
        wire.encode([FULL]) + b"\0",
        b"\x91" * 100_000,
        msgspec.msgpack.encode([[], [], None]),
        msgspec.msgpack.encode({"generations": 1}),
        msgspec.msgpack.encode({"generation": []}),
        msgspec.msgpack.encode({"losses": [["id", 1, "reason"]]}),
        b"\x81\xabgenerations\xdd\xff\xff\xff\xff",
    ],
    ids=["text", "no byte of its", "something behind it", "deep", "an array", "a number", "a name", "a loss", "long"],
)
def test_what_is_no_message_is_told_so(body: bytes) -> None:
    for read in (wire.decode, wire.decode_each):
        with pytest.raises(ValueError, match="cannot be read"):
            read(body)


# Our own words: those behind it are msgspec's.
CANNOT_BE_READ = "cannot be read: "
# Where there is no reason, all of it is Python's own words.
WRONG: dict[str, tuple[str, Any, str]] = {
    "half an id": ("prompt_token_ids", b"1234567", ""),
    "ids as numbers": ("prompt_token_ids", [1, 2], CANNOT_BE_READ),
    "a status": ("status", "asleep", CANNOT_BE_READ),
    "no moment": ("finished_at", None, CANNOT_BE_READ),
    "a text as a number": ("model", 7, CANNOT_BE_READ),
    "a text that is no UTF-8": ("model", msgspec.Raw(b"\xa1\xff"), CANNOT_BE_READ),
    "choices": ("choices", [[0]], CANNOT_BE_READ),
    "logprobs": ("choices", [[0, None, b"123", None, None, None, None, None]], ""),
    "no shape": ("choices", [[0, None, None, None, None, None, None, b"1"]], "without their shape"),
    "a shape": ("choices", [[0, None, None, None, None, None, None, bytes([2, 0, 0, 0] * 3)]], "what their shape says"),
    "a version": ("choices", [[0, None, None, None, None, None, [["v", 0]], None]], CANNOT_BE_READ),
}


@pytest.mark.parametrize(("name", "value", "reason"), WRONG.values(), ids=WRONG)
def test_a_generation_that_is_not_as_it_has_to_be_is_named_and_the_others_are_read(
    name: str, value: Any, reason: str
) -> None:
    message = msgspec.msgpack.decode(wire.encode([FULL, generation(1), EMPTY]))
    bad = message["generations"][1]
    bad[[field.name for field in fields(Generation)].index(name)] = value
    sent = msgspec.msgpack.encode(message)

    with pytest.raises(ValueError, match=reason or "."):
        wire.decode(sent)
    found, refused = wire.decode_each(sent)

    assert found.generations == [FULL, EMPTY]
    assert [each.id for each in refused] == [bad[0]]
    assert reason in refused[0].reason


@pytest.mark.parametrize(
    "bad", [None, [], [7], "text", msgspec.Raw(b"\x91\xa1\xff")], ids=["none", "[]", "[7]", "text", "raw"]
)
def test_a_generation_without_an_id_is_named_by_its_place(bad: Any) -> None:
    message = msgspec.msgpack.decode(wire.encode([FULL]))
    message["generations"].append(bad)

    found, refused = wire.decode_each(msgspec.msgpack.encode(message))

    assert found.generations == [FULL]
    assert [each.id for each in refused] == ["generations[1]"]


def test_a_field_more_is_another_version() -> None:
    message = msgspec.msgpack.decode(wire.encode([FULL]))
    message["generations"][0].append("new")

    _, refused = wire.decode_each(msgspec.msgpack.encode(message))

    assert [each.id for each in refused] == [FULL.id]


@pytest.mark.parametrize(
    "bad",
    [
        {"started_at": 2**64},
        {"started_at": -(2**63) - 1},
        {"model": object()},
        {"choices": [Choice(routed_experts=RoutedExperts((2**32, 1, 1), array("h")))]},
    ],
    ids=["a number", "a negative one", "an object", "a shape"],
)
def test_what_no_message_can_hold_is_told_so(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a value that cannot be sent"):
        wire.encode([generation(1, **bad)])
