"""The rollout and the agent of a generation, as its URL, headers, body or key name them."""

from __future__ import annotations

import http.client
import json
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any
from urllib.parse import quote

import anthropic
import httpx
import openai
import pytest

from agentlightning.generation import Generation
from tests.common.answers import fetch
from tests.recording.server import RecordingServer

TALK: Any = [{"role": "user", "content": "one two"}]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

Ask = Callable[[RecordingServer, str, dict[str, str]], object]


def chat(server: RecordingServer, before: str, headers: dict[str, str]) -> object:
    return openai_client(server, before, headers).chat.completions.create(
        model=server.model, messages=TALK, max_tokens=2
    )


def streamed_chat(server: RecordingServer, before: str, headers: dict[str, str]) -> object:
    create = openai_client(server, before, headers).chat.completions.create
    return [*create(model=server.model, messages=TALK, max_tokens=2, stream=True)]


def completion(server: RecordingServer, before: str, headers: dict[str, str]) -> object:
    return openai_client(server, before, headers).completions.create(model=server.model, prompt="one", max_tokens=2)


def response(server: RecordingServer, before: str, headers: dict[str, str]) -> object:
    create = openai_client(server, before, headers).responses.create
    return create(model=server.model, input="one", max_output_tokens=2)


def message(server: RecordingServer, before: str, headers: dict[str, str]) -> object:
    return anthropic_client(server, before, headers).messages.create(model=server.model, messages=TALK, max_tokens=2)


def streamed_message(server: RecordingServer, before: str, headers: dict[str, str]) -> object:
    client = anthropic_client(server, before, headers)
    with client.messages.stream(model=server.model, messages=TALK, max_tokens=2) as stream:
        return [*stream]


def openai_client(server: RecordingServer, before: str, headers: dict[str, str]) -> openai.OpenAI:
    base_url = f"{server.url}{before}/v1"
    return openai.OpenAI(base_url=base_url, default_headers=headers, api_key="none", max_retries=0, timeout=120)


def anthropic_client(server: RecordingServer, before: str, headers: dict[str, str]) -> anthropic.Anthropic:
    # vLLM looks for its key where OpenAI's clients have it.
    options: dict[str, Any] = {"auth_token": "none", "default_headers": headers, "max_retries": 0, "timeout": 120}
    return anthropic.Anthropic(base_url=f"{server.url}{before}", **options)


CLIENTS = pytest.mark.parametrize(
    "ask", [chat, streamed_chat, completion, response, message, streamed_message], ids=lambda ask: ask.__name__
)


def whose(generations: list[Generation]) -> set[tuple[str | None, str | None]]:
    return {(each.rollout_id, each.attempt_id) for each in generations}


@CLIENTS
def test_a_base_url_names_the_rollout(recording: RecordingServer, rollout: str, ask: Ask) -> None:
    ask(recording, f"/rollout/{quote(rollout)}/attempt/2", {})
    ask(recording, f"/rollout/{quote(rollout)}", {})

    assert whose(recording.recorded(rollout_id=rollout)) == {(rollout, "2"), (rollout, None)}
    assert whose(recording.kept(rollout_id=rollout, attempt_id="2")) == {(rollout, "2")}


def test_a_base_url_with_an_extra_slash_names_the_rollout(recording: RecordingServer, rollout: str) -> None:
    url = f"{recording.url}/rollout/{quote(rollout)}/attempt/a%2F2/v1/completions/"
    body, key = recording.body(prompt="one", max_tokens=2), {"Authorization": "Bearer none"}
    answer = httpx.post(url, json=body, headers=key, follow_redirects=True, timeout=120)

    assert answer.json()["choices"]
    assert whose(recording.recorded(rollout_id=rollout)) == {(rollout, "a/2")}


@CLIENTS
def test_headers_name_the_rollout(recording: RecordingServer, rollout: str, ask: Ask) -> None:
    ask(recording, "", {"x-agl-rollout-id": rollout, "X-AGL-Attempt-Id": "a/b"})

    assert whose(recording.recorded(rollout_id=rollout)) == {(rollout, "a/b")}


def test_baggage_names_the_rollout(recording: RecordingServer, rollout: str) -> None:
    members = f"other=1, agentlightning.rollout_id={quote(rollout)};kept=yes,agentlightning.attempt_id=%C3%A4%2C3"
    chat(recording, "", {"baggage": members})

    assert whose(recording.recorded(rollout_id=rollout)) == {(rollout, "ä,3")}


def test_the_first_source_that_names_a_rollout_decides_alone(recording: RecordingServer, rollout: str) -> None:
    baggage = {"baggage": f"agentlightning.rollout_id={quote(rollout)} c,agentlightning.attempt_id=3"}
    headers = {"x-agl-rollout-id": f"{rollout} b", "x-agl-attempt-id": "2", **baggage}
    chat(recording, f"/rollout/{quote(rollout)} a", headers)
    chat(recording, "", headers)
    chat(recording, "", baggage)
    chat(recording, "", {**baggage, "x-agl-rollout-id": f"{rollout} d"})

    recording.recorded()
    assert [whose(recording.kept(rollout_id=f"{rollout} {letter}")) for letter in "abcd"] == [
        {(f"{rollout} a", None)},
        {(f"{rollout} b", "2")},
        {(f"{rollout} c", "3")},
        {(f"{rollout} d", None)},
    ]


@pytest.mark.parametrize("header", ["x-request-id", "x-correlation-id"])
@CLIENTS
def test_id_of_a_request_names_the_rollout_and_stays_the_answers(
    recording: RecordingServer, rollout: str, ask: Ask, header: str
) -> None:
    sent = f"agl/{quote(rollout, safe='')}/a%2Fb/planner/{uuid.uuid4()}"
    ask(recording, "", {header: sent})

    kept = recording.recorded(rollout_id=rollout)
    assert {(each.attempt_id, each.agent_id, each.via) for each in kept} == {("a/b", "planner", "http")}
    if header == "x-request-id" and ask is not response:
        # vLLM makes its ids of this header, as without this package.
        assert all(sent in each.request_id for each in kept)


def test_user_of_a_chat_names_the_rollout(recording: RecordingServer, rollout: str) -> None:
    client = openai_client(recording, "", {})
    user = f"agl/{quote(rollout, safe='')}/2"
    client.chat.completions.create(model=recording.model, messages=TALK, max_tokens=2, user=user)
    client.responses.create(model=recording.model, input="one", max_output_tokens=2, user=user)
    client.completions.create(model=recording.model, prompt="one", max_tokens=2, user=user)

    kept = recording.recorded(rollout_id=rollout, attempt_id="2")
    assert {each.endpoint for each in kept} == {"/v1/chat/completions", "/v1/responses", "/v1/completions"}


@pytest.mark.parametrize("ask", [chat, response, message], ids=lambda ask: ask.__name__)
def test_key_that_names_a_rollout_is_accepted(recording: RecordingServer, rollout: str, ask: Ask) -> None:
    key = f"none@rollout={quote(rollout, safe='')},attempt=at-1,agent=planner"
    ask(recording, "", {"Authorization": f"Bearer {key}"})

    kept = recording.recorded(rollout_id=rollout)
    assert {(each.attempt_id, each.agent_id) for each in kept} == {("at-1", "planner")}
    assert "@rollout=" not in recording.log


def test_wrong_key_with_a_rollout_is_refused(recording: RecordingServer, rollout: str) -> None:
    for key in ("", "another", "nonE", "none@rollout=x,", "@rollout=none", "none,"):
        headers = {"Authorization": f"Bearer {key}@rollout={quote(rollout, safe='')}", "X-Api-Key": "none@rollout=x"}
        with pytest.raises(openai.AuthenticationError):
            chat(recording, "", headers)

    assert recording.recorded(rollout_id=rollout) == []


def test_conflicting_names_are_counted_and_the_first_counts(recording: RecordingServer, rollout: str) -> None:
    def conflicts() -> int:
        return fetch(recording, "/v1/agl/status")["counters"]["conflicting_names"].get("x-request-id", 0)

    before, metric = conflicts(), 'agentlightning_conflicting_names_total{carrier="x-request-id"}'
    chat(recording, "", {"x-agl-rollout-id": rollout, "x-request-id": "agl/another/x"})

    assert len(recording.recorded(rollout_id=rollout)) == 1
    assert conflicts() == before + 1
    assert recording.metrics()[metric] == before + 1


def test_only_calls_that_doctor_made_are_skipped_and_they_are_counted(recording: RecordingServer) -> None:
    def skipped() -> int:
        return fetch(recording, "/v1/agl/status")["counters"]["skipped_probes"].get("x-agl-rollout-id", 0)

    before, probe = skipped(), f"agl-doctor-{uuid.uuid4().hex}"
    like_it = ["agl-doctor-evaluation", f"{probe}0", f"x{probe}", probe.upper()]
    for rollout_id in (probe, *like_it):
        chat(recording, "", {"x-agl-rollout-id": rollout_id})

    named = [each.rollout_id for each in recording.recorded()]
    assert [named.count(rollout_id) for rollout_id in (probe, *like_it)] == [0, *[1] * len(like_it)]
    assert skipped() == before + 1


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        (
            {"x-agl-agent-id": "a", "x-agl-parent-agent-id": "p", "x-agl-purpose": "review"},
            ("a", "p", "review", None),
        ),
        ({"x-claude-code-agent-id": "a", "X-Stainless-Retry-Count": "2"}, ("a", None, None, 2)),
        ({"x-session-id": "child", "x-parent-session-id": "p"}, ("child", "p", None, None)),
        ({"x-codex-turn-metadata": '{"thread_id": "t", "request_kind": "turn"}'}, ("t", None, "main", None)),
    ],
    ids=["ours", "claude", "opencode", "codex"],
)
def test_agent_and_purpose_are_recorded(
    recording: RecordingServer, rollout: str, headers: dict[str, str], fields: tuple[Any, ...]
) -> None:
    body = recording.body(prompt="one", max_tokens=1)
    sent = {"Authorization": "Bearer none", "x-agl-rollout-id": quote(rollout), **headers}
    httpx.post(f"{recording.url}/v1/completions", json=body, headers=sent, timeout=120).raise_for_status()

    (kept,) = recording.recorded(rollout_id=quote(rollout))
    assert (kept.agent_id, kept.parent_agent_id, kept.purpose, kept.retry) == fields
    assert recording.kept(rollout_id=kept.rollout_id, agent_id=fields[0], purpose=fields[2]) == [kept]


def test_call_that_a_proxy_forwarded_came_through_a_router(recording: RecordingServer, rollout: str) -> None:
    chat(recording, f"/rollout/{quote(rollout)}", {"X-Forwarded-For": "10.0.0.1"})

    assert {each.via for each in recording.recorded(rollout_id=rollout)} == {"router"}


def test_direct_call_without_user_agent_came_over_http(recording: RecordingServer, rollout: str) -> None:
    # Python's http.client sends none.
    assert ask_with(recording, {"x-agl-rollout-id": quote(rollout).encode()}) == 200

    assert [each.via for each in recording.recorded(rollout_id=quote(rollout))] == ["http"]


@pytest.mark.parametrize("header", ["x-session-id", "x-claude-code-session-id"])
@CLIENTS
def test_sessions_and_traces_are_recorded_beside_the_rollout(
    recording: RecordingServer, rollout: str, ask: Ask, header: str
) -> None:
    ask(recording, "", {header: rollout, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"})

    kept = recording.recorded(session_id=rollout)
    assert {(each.session_id, each.trace_id, each.rollout_id) for each in kept} == {(rollout, TRACE, None)}


@CLIENTS
def test_a_request_without_a_rollout_is_recorded(recording: RecordingServer, rollout: str, ask: Ask) -> None:
    before = {each.id for each in recording.recorded(rollout_id=None)}
    ask(recording, "", {})

    # The last one is that which was asked for to see the others.
    *its, _ = [each for each in recording.recorded(rollout_id=None) if each.id not in before]
    assert len(its) == (2 if ask is response else 1)
    assert {(each.rollout_id, each.attempt_id, each.session_id, each.trace_id) for each in its} == {(None,) * 4}


def test_a_request_without_a_key_leaves_nothing(recording: RecordingServer, rollout: str) -> None:
    client = openai_client(recording, f"/rollout/{quote(rollout)}", {}).with_options(api_key="another")
    with pytest.raises(openai.AuthenticationError):
        client.completions.create(model=recording.model, prompt="one", max_tokens=2)

    assert recording.recorded(rollout_id=rollout) == []


@pytest.mark.parametrize("name", ["x-agl-rollout-id", "x-session-id"])
@pytest.mark.parametrize("said", ["a/b", "Größe 😀", "50% off", "r;x=1", "a, b", "...", "x" * 210], ids=ascii)
def test_ids_may_be_any_text(recording: RecordingServer, rollout: str, name: str, said: str) -> None:
    own = f"{said} {rollout[-32:]}"
    assert ask_with(recording, {name: own.encode()}) == 200

    filters: Any = {"rollout_id" if name == "x-agl-rollout-id" else "session_id": own}
    assert len(recording.recorded(**filters)) == 1


HOSTILE = {
    "10 kB": b"x" * 10_000,
    "257 characters": b"x" * 257,
    "a way up": b"../../../../tmp/generations.db",
    "a way up inside": b"x/../y",
    "nothing but up": b"..",
    "an apostrophe": b"x'; DROP TABLE generations; --",
    "quotes": b'"; ATTACH DATABASE "other.db" AS other; --',
    "backslashes": b"..\\..\\x",
    "not UTF-8": b"\xff\xfe\xc3",
    "C1 control characters": "x\x85y".encode(),
    "a tab": b"x\ty",
}
HEADERS = ("x-agl-rollout-id", "x-agl-attempt-id", "x-session-id", "x-claude-code-session-id", "x-request-id")


def ask_with(server: RecordingServer, headers: dict[str, bytes]) -> int:
    """Return the status of a request with these headers, sent without a client library that checks them."""
    body = json.dumps({"model": server.model, "prompt": "one", "max_tokens": 1})
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.putrequest("POST", "/v1/completions")
        usual = {"Content-Type": b"application/json", "Authorization": b"Bearer none"}
        for name, value in {**usual, "Content-Length": str(len(body)).encode(), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(body.encode())
        with connection.getresponse() as response:
            return response.status


def ids_in(server: RecordingServer) -> set[str | None]:
    found = server.recorded()
    return {text for each in found for text in (each.rollout_id, each.attempt_id, each.session_id, each.trace_id)}


def ignored(server: RecordingServer) -> dict[str, int]:
    return fetch(server, "/v1/agl/status")["counters"]["ignored_ids"]


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_a_header_with_an_invalid_id_is_ignored_and_counted(recording: RecordingServer, value: bytes) -> None:
    before = ignored(recording)
    # vLLM makes the answer's id of the last one, and refuses one that is too long for it.
    assert all(ask_with(recording, {name: value}) in (200, 400) for name in HEADERS)
    members = f"agentlightning.rollout_id={quote(value)},agentlightning.attempt_id={quote(value)}"
    assert ask_with(recording, {"baggage": members.encode()}) == 200

    counted = {name: count - before.get(name, 0) for name, count in ignored(recording).items()}
    assert {name: counted[name] for name in (*HEADERS, "baggage")} == {**dict.fromkeys(HEADERS, 1), "baggage": 2}
    assert not {value.decode("utf-8", "replace"), value.decode("latin-1")} & ids_in(recording)


@pytest.mark.parametrize(
    "value", [b"", b"00-", b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01", b"\xff" * 55, b"x" * 9999]
)
def test_an_invalid_traceparent_is_ignored_and_counted(recording: RecordingServer, value: bytes) -> None:
    before = ignored(recording).get("traceparent", 0)
    assert ask_with(recording, {"traceparent": value}) == 200

    assert ignored(recording)["traceparent"] == before + 1
    assert recording.recorded()[-2].trace_id is None


@pytest.mark.parametrize("value", [b"x\x00y", b"\x1b[31m"], ids=["NUL", "escape"])
def test_control_characters_in_headers_are_refused_or_ignored(recording: RecordingServer, value: bytes) -> None:
    # Before us, the server's own parser of HTTP looks at headers.
    assert {ask_with(recording, {name: value}) for name in (*HEADERS, "baggage", "traceparent")} == {400}
    before = ignored(recording).get("baggage", 0)
    assert ask_with(recording, {"baggage": f"agentlightning.rollout_id={quote(value)}".encode()}) == 200

    assert ignored(recording)["baggage"] == before + 1
    assert value.decode() not in ids_in(recording)


def test_the_file_is_intact_and_alone_after_all_other_tests(recording: RecordingServer) -> None:
    assert {each.name.removeprefix(recording.path.name) for each in recording.path.parent.iterdir()} <= FILES
    with closing(sqlite3.connect(recording.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert fetch(recording, "/v1/agl/status")["counters"]["failures"] == {}
    assert "Traceback" not in recording.log


FILES = {"", "-wal", "-shm"}
