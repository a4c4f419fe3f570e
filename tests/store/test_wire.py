"""Tests of messages: what is encoded is decoded unchanged, and an invalid message is refused."""

from __future__ import annotations

from array import array
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agentlightning.errors import InvalidRecord
from agentlightning.generation import Choice, Generation, Loss, RoutedExperts
from agentlightning.store import wire
from agentlightning.store.chains import Recent
from tests.common.generations import EMPTY, FULL, HOSTILE, START, generation

pytestmark = pytest.mark.tier("check")

LOSS = Loss(count=3, reason="queue full", first_at=START, last_at=START + 1, host="größe\0", pid=7)


def test_message_round_trips() -> None:
    sent = wire.encode([FULL, EMPTY, generation(1)], [LOSS], "a place")

    found = wire.decode(sent)

    assert found.generations[:2] == [FULL, EMPTY]
    assert found.losses == [LOSS]
    assert found.next == "a place"
    assert wire.decode_each(sent) == (found, [])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_message_of_an_earlier_release_is_read_without_what_is_new_since(number: int) -> None:
    body = (Path(__file__).parent / "messages" / f"v{number}.msgpack").read_bytes()
    version = f"application/vnd.agl.generations.v{number}+msgpack"

    found = wire.decode(body, version)

    assert wire.decode_each(body, version) == (found, [])
    full, empty = found.generations
    assert (full.id, full.session_id, full.trace_id) == (found.sender, FULL.session_id, FULL.trace_id)
    choices = [replace(choice, sampling_mask=None, top_logprobs=None) for choice in FULL.choices]
    assert (full.started_at, full.cached_tokens, full.choices) == (FULL.started_at, FULL.cached_tokens, choices)
    called = [FULL.agent_id, FULL.parent_agent_id, FULL.purpose, FULL.retry, FULL.via]
    assert [full.agent_id, full.parent_agent_id, full.purpose, full.retry, full.via] == (
        called if number > 2 else [None] * 5
    )
    assert [full.served_model, full.requested_params, full.prompt_logprobs] == [None] * 3
    if number % 2:
        assert full.prompt_token_ids == FULL.prompt_token_ids
        assert [loss.reason for loss in found.losses] == [LOSS.reason]
        assert wire.encode([full, empty], found.losses, None, full.id, version) == body
    else:
        prompt, ids = found.prompts[full.id], FULL.prompt_token_ids
        assert (prompt.ids and prompt.ids.rest, prompt.text and prompt.text.rest) == (
            ids and ids.tobytes(),
            FULL.prompt_text,
        )
        full.prompt_token_ids, full.prompt_text = FULL.prompt_token_ids, FULL.prompt_text
        assert wire.encode_in_blocks([full, empty], full.id, Recent(), version)[0] == body


def test_empty_message_round_trips() -> None:
    assert wire.decode(wire.encode([])) == wire.Envelope([], [], None)
    assert wire.decode(b"\x80") == wire.Envelope([], [], None)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_round_trips(text: str) -> None:
    names = dict.fromkeys(("rollout_id", "session_id", "response_id", "request_id", "prompt_text", "model"), text)
    kept = generation(1, **names, choices=[Choice(text=text, stop_reason=text, weight_versions=[(text, 0, 1)])])

    assert wire.decode(wire.encode([kept])).generations == [kept]


def test_half_a_surrogate_pair_in_any_field_becomes_a_question_mark() -> None:
    choice = Choice(text="\udfff", stop_reason="a\ud800", weight_versions=[("\ud800", 0, 1)])
    sent = wire.encode([generation(1, rollout_id="r\ud800\0", choices=[choice]), FULL])

    found, other = wire.decode(sent).generations

    assert found.rollout_id == "r?\0"
    assert found.choices == [Choice(text="?", stop_reason="a?", weight_versions=[("?", 0, 1)])]
    assert other == FULL


def test_encode_writes_little_endian_numbers_and_fields_in_declared_order() -> None:
    [sent] = msgspec.msgpack.decode(wire.encode([FULL]))["generations"]

    named = dict(zip([field.name for field in fields(Generation)], sent, strict=True))
    assert named["id"] == FULL.id
    assert named["finished_at"] == FULL.finished_at
    assert named["prompt_token_ids"].hex() == "0000000001000000ffffff7fffffffff"
    choice = dict(zip([field.name for field in fields(Choice)], named["choices"][0], strict=True))
    assert choice["token_ids"].hex() == "0700000008000000"
    assert choice["logprobs"].hex() == "cdccccbd000080ff"
    assert choice["routed_experts"].hex().startswith("020000000300000002000000" + "00000100")


def test_decode_of_a_truncated_message_is_refused() -> None:
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
    ids=["text", "unused byte", "trailing byte", "deep", "an array", "a number", "a name", "a loss", "long"],
)
def test_decode_of_an_invalid_message_is_refused(body: bytes) -> None:
    for read in (wire.decode, wire.decode_each):
        with pytest.raises(ValueError, match="cannot be read"):
            read(body)


# The rest of the message is msgspec's.
CANNOT_BE_READ = "cannot be read: "
NOTHING = [None] * 7
# An empty reason: the whole message is Python's.
WRONG: dict[str, tuple[str, Any, str]] = {
    "half an id": ("prompt_token_ids", b"1234567", ""),
    "ids as numbers": ("prompt_token_ids", [1, 2], CANNOT_BE_READ),
    "a status": ("status", "asleep", CANNOT_BE_READ),
    "no time": ("finished_at", None, CANNOT_BE_READ),
    "a text as a number": ("model", 7, CANNOT_BE_READ),
    "a text that is not UTF-8": ("model", msgspec.Raw(b"\xa1\xff"), CANNOT_BE_READ),
    "choices": ("choices", [[0]], CANNOT_BE_READ),
    "logprobs": ("choices", [[0, None, b"123", *NOTHING]], ""),
    "no shape": ("choices", [[0, *NOTHING[:6], b"1", None, None]], "without their shape"),
    "a shape": ("choices", [[0, *NOTHING[:6], bytes([2, 0, 0, 0] * 3), None, None]], "what their shape says"),
    "a mask": ("choices", [[0, *NOTHING, bytes([2, 0, 0, 0]), None]], "numbers of ids are missing"),
    "numbers that are huge": (
        "choices",
        [[0, *NOTHING, b"\2\0\0\0" + b"\xff" * 8, None]],
        "as their numbers say",
    ),
    "numbers beyond 32 bits": (
        "choices",
        [[0, *NOTHING, None, b"\3\0\0\0" + b"\0\0\0\x80" * 3 + bytes(64)]],
        "as their numbers say",
    ),
    "alternatives": ("choices", [[0, *NOTHING, None, bytes([1, 0, 0, 0] * 3)]], "and not 8 as their numbers say"),
    "a version": ("choices", [[0, None, None, None, None, None, [["v", 0]], None, None, None]], CANNOT_BE_READ),
}


@pytest.mark.parametrize(("name", "value", "reason"), WRONG.values(), ids=WRONG)
def test_decode_each_names_an_invalid_generation_and_reads_the_others(name: str, value: Any, reason: str) -> None:
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
def test_decode_each_names_a_generation_without_id_by_its_position(bad: Any) -> None:
    message = msgspec.msgpack.decode(wire.encode([FULL]))
    message["generations"].append(bad)

    found, refused = wire.decode_each(msgspec.msgpack.encode(message))

    assert found.generations == [FULL]
    assert [each.id for each in refused] == ["generations[1]"]


def test_decode_each_refuses_a_generation_with_an_extra_field() -> None:
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
def test_encode_of_an_unsupported_value_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRecord, match="a value that cannot be sent"):
        wire.encode([generation(1, **bad)])
