"""Callers, as headers, keys and ids of requests name them."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from agentlightning.instrumentation.vllm import _carriers
from agentlightning.instrumentation.vllm._carriers import PROBE_PARAMS, SOURCES, Caller, InKey, without_name
from agentlightning.instrumentation.vllm.capture import request_names
from agentlightning.rollout_name import RolloutName, parse_name
from tests.common.environments import CHECKOUT

pytestmark = pytest.mark.tier("check")

CODEX_SUBAGENT = {
    "session-id": "s",
    "thread-id": "child",
    "x-codex-parent-thread-id": "s",
    "x-openai-subagent": "collab_spawn",
    "x-codex-turn-metadata": json.dumps({"thread_id": "child", "parent_thread_id": "s", "request_kind": "turn"}),
}


def caller_of(headers: dict[str, str], **path: Any) -> Caller:
    """Return what a request with these headers says, of which the path has named these fields."""
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    found, in_key = without_name(sent)
    caller = Caller(**path)
    _carriers.read_headers(dict(found), in_key, caller)
    return caller


def said(headers: dict[str, str], **path: Any) -> dict[str, Any]:
    caller = caller_of(headers, **path)
    caller.agent_id = caller.agent_id or caller.carrier_agent_id
    caller.carrier = caller.carrier_agent_id = None
    return {name: value for name in Caller.__slots__ if (value := getattr(caller, name)) is not None}


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        (
            {"x-agl-agent-id": "a", "x-agl-parent-agent-id": "p", "x-agl-purpose": "any text"},
            {"agent_id": "a", "parent_agent_id": "p", "purpose": "any text"},
        ),
        (
            {
                "baggage": "agentlightning.agent_id=a%20b,agentlightning.parent_agent_id=p;x=1,"
                "agentlightning.purpose=title,other=z"
            },
            {"agent_id": "a b", "parent_agent_id": "p", "purpose": "title"},
        ),
        (
            {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a", "x-stainless-retry-count": "0"},
            {"session_id": "s", "agent_id": "a", "retry": 0},
        ),
        (
            {"x-claude-code-parent-agent-id": "p", "x-claude-code-request-class": "subagent"},
            {"parent_agent_id": "p", "purpose": "sub-agent"},
        ),
        ({"x-claude-code-request-class": "compaction"}, {"purpose": "compaction"}),
        (
            CODEX_SUBAGENT,
            {"session_id": "s", "agent_id": "child", "parent_agent_id": "s", "purpose": "sub-agent"},
        ),
        (
            {"x-codex-turn-metadata": '{"session_id": "s", "thread_id": "t", "request_kind": "turn", "n": 1}'},
            {"session_id": "s", "agent_id": "t", "purpose": "main"},
        ),
        (
            {**CODEX_SUBAGENT, "x-codex-turn-metadata": '{"request_kind": "compaction"}'},
            {"session_id": "s", "agent_id": "child", "parent_agent_id": "s", "purpose": "compaction"},
        ),
        ({"x-session-id": "s", "x-session-affinity": "s"}, {"session_id": "s"}),
        (
            {"x-session-id": "child", "x-session-affinity": "child", "x-parent-session-id": "s"},
            {"session_id": "child", "agent_id": "child", "parent_agent_id": "s"},
        ),
        ({"x-agl-agent-id": "ours", "x-claude-code-agent-id": "its own"}, {"agent_id": "ours"}),
        ({"x-agl-purpose": "main", "x-openai-subagent": "review"}, {"purpose": "main"}),
        # As sent: only agents' own words become ours.
        ({"x-agl-purpose": "turn"}, {"purpose": "turn"}),
        ({"baggage": "agentlightning.purpose=compact"}, {"purpose": "compact"}),
        ({"x-agl-purpose": """the user's "plan" in ../docs"""}, {"purpose": """the user's "plan" in ../docs"""}),
        ({"x-agl-purpose": "a\x01b"}, {}),
        (
            {"x-openai-subagent": "review", "x-codex-turn-metadata": '{"request_kind": "turn"}'},
            {"purpose": "review"},
        ),
        ({"x-agent": "a", "x-claude-code-agent-type": "Explore", "user-agent": "opencode/1"}, {}),
    ],
)
def test_headers_of_agents_say_who_called(headers: dict[str, str], fields: dict[str, Any]) -> None:
    assert said(headers) == fields


def test_documented_headers_are_those_that_are_read() -> None:
    page = (CHECKOUT / "docs" / "recording.md").read_text()
    rows = {field: next(line for line in page.splitlines() if line.startswith(f"| `{field}` |")) for field in SOURCES}
    for field, sources in SOURCES.items():
        headers = re.findall(r"`(?:agentlightning\.\w+` of `)?([\w-]+)(?:\.\w+)?`(?: beside `[\w-]+`)?", rows[field])
        assert [each for each in headers[1:] if each != "turn"] == [source.header.decode() for source in sources]


@pytest.mark.parametrize("value", ["", "-1", "1.5", "one", "²", "99999999999", "9" * 5000])
def test_retry_that_is_no_count_is_unknown(value: str) -> None:
    assert said({"x-stainless-retry-count": value}) == {}


@pytest.mark.parametrize(
    "value", ["", "{", "null", "[1]", '{"thread_id": 7}', "[" * 100_000, '{"thread_id": {"a": 1}}', "\x7f"]
)
def test_metadata_that_is_no_object_of_texts_says_nothing(value: str) -> None:
    assert said({"x-codex-turn-metadata": value}) == {}


def test_invalid_names_are_ignored_and_each_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = _carriers.ignored_ids.copy()
    bad = "x" * 257
    assert said({"x-session-id": bad, "x-parent-session-id": bad, "x-agl-purpose": bad}) == {}

    assert _carriers.ignored_ids - ignored == {"x-session-id": 1, "x-parent-session-id": 1, "x-agl-purpose": 1}


NAMES = {
    "agl/ro-1": ("ro-1",),
    "agl/ro-1/": ("ro-1",),
    "agl/ro-1/anything": ("ro-1",),
    "agl/ro-1/at-1/": ("ro-1", "at-1"),
    "agl/ro-1/at-1/0197": ("ro-1", "at-1"),
    "agl/ro-1/at-1/planner/": ("ro-1", "at-1", "planner"),
    "agl/ro-1/at-1/planner/a/b/c\n": ("ro-1", "at-1", "planner"),
    "agl/a%2Fb/%25/x": ("a/b", "%"),
    "agl/ro-1//x": ("ro-1",),
}
NO_NAMES = ["", "agl", "agl/", "agl//x", "AGL/ro-1/x", "xagl/ro-1/x", " agl/ro-1", "ro-1", "chatcmpl-agl/ro-1"]


@pytest.mark.parametrize(("text", "names"), NAMES.items())
def test_id_of_a_request_names_rollout_attempt_and_agent(text: str, names: tuple[str, ...]) -> None:
    assert parse_name(text) == RolloutName(*names)
    fields = dict(zip(("rollout_id", "attempt_id", "agent_id"), names, strict=False))
    if "\n" not in text:
        assert said({"x-request-id": text}) == said({"x-correlation-id": text}) == fields
        assert request_names.parse_client_id(text) == RolloutName(*names)


@pytest.mark.parametrize(
    ("user", "names"),
    [
        ("agl/ro-1", ("ro-1", None, None)),
        ("agl/ro-1/", ("ro-1", None, None)),
        ("agl/ro-1/at-1", ("ro-1", "at-1", None)),
        ("agl/ro-1/at-1/", ("ro-1", "at-1", None)),
        ("agl/a%2Fb/at-1/planner", ("a/b", "at-1", "planner")),
        ("agl/ro-1/at-1/planner/more", ("ro-1", "at-1", "planner")),
    ],
)
def test_user_of_the_body_names_rollout_attempt_and_agent(user: str, names: tuple[str | None, ...]) -> None:
    caller = Caller()
    _carriers.read_user(user, caller)

    assert (caller.rollout_id, caller.attempt_id, caller.carrier_agent_id) == names


@pytest.mark.parametrize("text", NO_NAMES)
def test_other_ids_of_requests_name_nothing(text: str) -> None:
    assert parse_name(text) is None
    assert said({"x-request-id": text, "x-correlation-id": text}) == {}


KEYS = {
    "KEY@rollout=ro-1": ("KEY", ("ro-1",)),
    "@rollout=ro-1,attempt=at-1": ("", ("ro-1", "at-1")),
    "KEY@rollout=ro-1,agent=planner": ("KEY", ("ro-1", None, "planner")),
    "KEY@rollout=ro-1,agent=planner,attempt=at-1": ("KEY", ("ro-1", "at-1", "planner")),
    "KEY@agent=planner,attempt=at-1,rollout=ro-1": ("KEY", ("ro-1", "at-1", "planner")),
    "K@Y@rollout=a%2Cb%40c,attempt=at-1,agent=%C3%A9": ("K@Y", ("a,b@c", "at-1", "é")),
    "KEY@rollout=x@rollout=ro-1": ("KEY@rollout=x", ("ro-1",)),
}
WHOLE_KEYS = [
    "KEY",
    "KEY@rollout=",
    "KEY@rollout=a,",
    "KEY@rollout=a,attempt=",
    "KEY@rollout=a,rollout=b",
    "KEY@attempt=a,rollout=b,attempt=a",
    "KEY@rollout=a,other=b",
    "KEY@rollout=a ",
    "KEY@rollout=a b",
    "KEY@ROLLOUT=a",
    "KEY@attempt=a",
    "@rollout=a@b",
]


@pytest.mark.parametrize(("header", "scheme"), [("authorization", "Bearer "), ("x-api-key", "")])
@pytest.mark.parametrize(("sent", "key", "names"), [(sent, *found) for sent, found in KEYS.items()])
def test_end_of_a_key_names_the_rollout_and_is_removed(
    sent: str, key: str, names: tuple[Any, ...], header: str, scheme: str
) -> None:
    found, named = without_name([(b"host", b"x@rollout=no"), (header.encode(), f"{scheme}{sent}".encode())])

    assert found == [(b"host", b"x@rollout=no"), (header.encode(), f"{scheme}{key}".encode())]
    assert named == InKey(RolloutName(*names), None)


@pytest.mark.parametrize(
    ("headers", "pins"),
    [
        ({"x-agl-sampling": "temperature=0.5"}, {"temperature": 0.5}),
        ({"x-agl-sampling": "client", "baggage": "agentlightning.sampling=top_k%3D5"}, {}),
        ({"x-agl-sampling": "heat=1", "baggage": "agentlightning.sampling=top_k%3D5"}, {"top_k": 5}),
        ({"authorization": "Bearer k@sampling=top_p%3D0.9%2Cmin_p%3D0,rollout=ro"}, {"top_p": 0.9, "min_p": 0}),
        ({"authorization": "Bearer k@rollout=ro"}, None),
    ],
)
def test_a_carrier_sends_on_what_a_rollout_has_pinned(headers: dict[str, str], pins: dict[str, float] | None) -> None:
    before = _carriers.ignored_ids.copy()

    found, in_key = without_name([(name.encode(), value.encode()) for name, value in headers.items()])
    caller = Caller()
    _carriers.read_headers(dict(found), in_key, caller)

    assert caller.sampling == pins
    ignored = {"sampling in x-agl-sampling": 1} if headers.get("x-agl-sampling") == "heat=1" else {}
    assert _carriers.ignored_ids - before == ignored


@pytest.mark.parametrize("key", WHOLE_KEYS)
def test_any_other_end_is_a_part_of_the_key(key: str) -> None:
    sent, before = [(b"authorization", f"Bearer {key}".encode())], _carriers.ignored_ids.copy()

    assert without_name(sent) == (sent, None)
    # Not silently: whoever writes it means to name a rollout.
    assert _carriers.ignored_ids - before == ({"key": 1} if "@rollout=" in key else {})


IN_ORDER = {
    "x-agl-rollout-id": "x-agl-rollout-id",
    "baggage": "agentlightning.rollout_id={}",
    "x-request-id": "agl/{}/x",
    "x-correlation-id": "agl/{}/x",
    "key": "none@rollout={}",
}
"""The carriers in a request's head, in the documented order, with what stands in each."""


def test_first_carrier_counts_and_each_other_name_is_a_conflict() -> None:
    carriers = list(IN_ORDER)
    for first in range(len(carriers)):
        before = _carriers.conflicting_names.copy()
        headers = {
            "authorization" if name == "key" else name: value.format(name)
            for name, value in list(IN_ORDER.items())[first:]
        }
        caller = caller_of(headers)
        _carriers.read_user("agl/user/x", caller)

        follows = "user" if carriers[first] == "key" else carriers[first]
        assert (caller.rollout_id, caller.carrier) == (follows, follows)
        assert _carriers.conflicting_names - before == dict.fromkeys({*carriers[first:], "user"} - {follows}, 1)


def test_path_comes_first_and_equal_names_are_no_conflict() -> None:
    before = _carriers.conflicting_names.copy()
    headers = {"x-agl-rollout-id": "r", "x-request-id": "agl/r/1/x", "authorization": "Bearer k@rollout=other"}

    assert said(headers, rollout_id="r", attempt_id="1", carrier="path") == {"rollout_id": "r", "attempt_id": "1"}
    assert _carriers.conflicting_names - before == {"key": 1}


def test_attempts_of_one_rollout_that_differ_are_a_conflict() -> None:
    before = _carriers.conflicting_names.copy()

    assert said({"x-request-id": "agl/r/1/x", "authorization": "k@rollout=r,attempt=2"})["attempt_id"] == "1"
    assert _carriers.conflicting_names - before == {"key": 1}


def test_attempt_that_is_not_followed_is_a_conflict() -> None:
    before = _carriers.conflicting_names.copy()

    headers = {"authorization": "k@rollout=r,attempt=2"}
    assert said(headers, rollout_id="r", carrier="path") == {"rollout_id": "r"}
    assert _carriers.conflicting_names - before == {"key": 1}


@pytest.mark.parametrize(("second", "count"), [("r", 0), ("other", 1), ("r,attempt=2", 1)])
def test_two_keys_that_name_different_rollouts_are_a_conflict(second: str, count: int) -> None:
    before = _carriers.conflicting_names.copy()

    keys = {"authorization": "Bearer k@rollout=r", "x-api-key": f"k@rollout={second}"}
    assert said(keys) == {"rollout_id": "r"}
    assert _carriers.conflicting_names - before == ({"key": 1} if count else {})


def test_agents_own_headers_name_it_before_the_key_does() -> None:
    key = {"authorization": "Bearer k@rollout=r,attempt=1,agent=planner"}

    assert said(key)["agent_id"] == "planner"
    assert said({**key, "x-claude-code-agent-id": "child"})["agent_id"] == "child"


def test_agent_belongs_to_the_rollout_beside_it() -> None:
    caller = caller_of({"authorization": "Bearer k@rollout=r,attempt=1,agent=planner"})
    _carriers.read_user("agl/other", caller)

    assert (caller.rollout_id, caller.attempt_id, caller.carrier_agent_id) == ("other", None, None)


@pytest.mark.parametrize(
    ("headers", "is_forwarded"),
    [
        ({"host": "h", "accept-encoding": "identity", "content-type": "application/json"}, False),
        ({"accept": "*/*", "accept-encoding": "gzip", "user-agent": "OpenAI/Python 2.0"}, False),
        ({"accept": "*/*", "user-agent": "curl/8.0"}, False),
        ({"accept": "*/*", "accept-encoding": "identity"}, False),
        ({}, False),
        ({"user-agent": "curl/8.0", "via": "1.1 proxy"}, True),
        ({"x-forwarded-for": "10.0.0.1"}, True),
        ({"user-agent": "litellm/1.108.0", "accept": "*/*", "accept-encoding": "gzip, deflate"}, True),
        ({"host": "h", "accept": "*/*", "content-type": "application/json"}, True),
    ],
)
def test_forwarded_request_is_told_by_its_headers(headers: dict[str, str], is_forwarded: bool) -> None:
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]

    assert _carriers.is_forwarded(sent) == is_forwarded


PROBE = f"agl-doctor-{'0' * 32}"


@pytest.mark.parametrize(
    ("rollout_id", "params", "counted"),
    [
        (PROBE, None, "path"),
        (PROBE, SimpleNamespace(**PROBE_PARAMS), "path"),
        # As float32.
        (None, SimpleNamespace(temperature=0.6970030069351196, top_p=0.9137210249900818), "none"),
        ("another", SimpleNamespace(**PROBE_PARAMS), "none"),
        (f"{PROBE}0", SimpleNamespace(temperature=PROBE_PARAMS["temperature"], top_p=1.0), None),
        ("agl-doctor-mine", SimpleNamespace(temperature=0.697, top_p=0.913721), None),
        (None, SimpleNamespace(temperature=None), None),
    ],
)
def test_calls_of_doctor_are_skipped_and_counted_by_what_arrived(
    rollout_id: str | None, params: Any, counted: str | None
) -> None:
    before = _carriers.skipped_probes.copy()

    caller, request = Caller(rollout_id=rollout_id, carrier="path"), SimpleNamespace(sampling_params=params)
    assert _carriers.skips_probe(caller, request) == (counted is not None)
    assert _carriers.skipped_probes - before == ({} if counted is None else {counted: 1})


@pytest.mark.parametrize("user", [None, 7, "", "somebody", {"agl/r": 1}])
def test_users_that_are_no_name_name_nothing(user: Any) -> None:
    caller = Caller()
    _carriers.read_user(user, caller)

    assert caller == Caller()
