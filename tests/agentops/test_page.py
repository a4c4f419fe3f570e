"""The page of a session, to which the SDK prints a link."""

from __future__ import annotations

import re
import uuid
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentlightning.generation import new_id
from agentlightning.store import open_store
from tests.agentops.client import SdkClient
from tests.common.generations import FULL
from tests.server.process import StoreServer
from tests.server.test_otlp import a_span, attribute

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """The tags, attributes, scripts and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            # An inline script has no source.
            self.scripts.append(dict(attrs).get("src") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(client: httpx.Client, trace_id: str | None = None) -> Elements:
    answer = client.get("/sessions", params={} if trace_id is None else {"trace_id": trace_id})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    return Elements(answer.text)


def test_session_page_shows_its_spans(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    root = sdk.session(trace_id, name="root.session")
    agent = a_span(traceId=trace_id, parentSpanId=root["spanId"], name="agent")
    failed = a_span(
        traceId=trace_id, parentSpanId=agent["spanId"], name="tool", status={"code": 2, "message": "no such city"}
    )
    sdk.send(failed, agent)
    sdk.send(root)
    page = shown(sdk.http, trace_id)

    rollout_id, attempt_id = sdk.place(trace_id)
    for text in (
        trace_id,
        rollout_id,
        attempt_id,
        sdk.project_id,
        "succeeded",
        "no such city",
        "1.5\N{NO-BREAK SPACE}s",
    ):
        assert text in page.text
    assert page.text.index("root.session") < page.text.index("agent") < page.text.index("tool")


def test_session_of_a_rollout_that_was_never_queued_shows_how_it_ended(store: StoreServer, sdk: SdkClient) -> None:
    trace_id, rollout_id, response_id = uuid.uuid4().hex, f"ro-{uuid.uuid4().hex}", f"chatcmpl-{uuid.uuid4().hex}"
    called = replace(
        FULL, id=new_id(), call_id=new_id(), response_id=response_id, rollout_id=rollout_id, attempt_id=None
    )
    with open_store(store.url) as opened:
        opened.add([called])
    named = attribute("agentlightning.rollout_id", "stringValue", rollout_id)
    ended = attribute("agentops.session.end_state", "stringValue", "Success")
    # The SDK tells the outcome by an attribute alone.
    root = sdk.session(trace_id, named, ended, name="root.session", status={})
    answered = [named, attribute("gen_ai.response.id", "stringValue", response_id)]
    sdk.send(a_span(traceId=trace_id, parentSpanId=root["spanId"], name="chat", attributes=answered, status={}))
    assert "running" in shown(sdk.http, trace_id).text
    sdk.send(root)
    page, listed = shown(sdk.http, trace_id), shown(sdk.http)

    assert sdk.place(trace_id) == (rollout_id, "")
    assert page.text.count("succeeded") == 2
    assert "UNSET" not in page.text
    assert "recorded by vLLM" in page.text
    assert "not in this store" not in page.text + listed.text
    assert f"{rollout_id}succeeded" in listed.text
    # On the page of its rollout the call is below the span that names its answer, and the spans' outcomes are known.
    rows = sdk.http.get("/rollout", params={"id": rollout_id}).text
    assert re.findall(r'<li class="(\w+ d\d+)">', rows) == ["attempt d0", "span d1", "span d2", "generation d3"]
    assert "Calls that name no attempt" in rows


def test_recorded_model_call_shows_the_recording(store: StoreServer, sdk: SdkClient) -> None:
    trace_id, response_id = uuid.uuid4().hex, f"chatcmpl-{uuid.uuid4().hex}"
    recorded = replace(FULL, id=new_id(), call_id=new_id(), response_id=response_id)
    with open_store(store.url) as opened:
        opened.add([recorded])
    named = attribute("gen_ai.response.id", "stringValue", response_id)
    call = sdk.session(trace_id, named)
    # AgentOps records two spans for some calls.
    sdk.send(call, a_span(traceId=trace_id, parentSpanId=call["spanId"], attributes=[named]))
    page = shown(sdk.http, trace_id)
    prompt, response = 4, 2
    metrics = sdk.http.get(f"/public/v1/traces/{trace_id}/metrics", headers=sdk.headers).json()

    assert f"{prompt} prompt tokens, {response} output tokens, recorded by vLLM" in page.text
    assert "what went in" in page.text
    assert "what came out" in page.text
    assert (metrics["prompt_tokens"], metrics["completion_tokens"]) == (prompt, response)
    assert metrics["total_tokens"] == prompt + response


def test_unrecorded_model_call_shows_values_of_its_span(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    texts = {"gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "hello", "gen_ai.completion.0.content": "you"}
    attributes = [attribute(name, "stringValue", value) for name, value in texts.items()]
    sdk.send(sdk.session(trace_id, *attributes, attribute("gen_ai.usage.prompt_tokens", "intValue", "7")))
    page = shown(sdk.http, trace_id)

    assert "user: hello" in page.text
    assert "7 prompt tokens, ? output tokens, from the span" in page.text


def test_markup_in_a_session_is_shown_as_text(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    evil = [attribute(name, "stringValue", EVIL) for name in ("gen_ai.prompt.0.content", "gen_ai.response.id")]
    status = {"code": 2, "message": EVIL}
    sdk.send(sdk.session(trace_id, *evil, attribute("agentlightning.rollout_id", "stringValue", EVIL), status=status))
    sdk.send(a_span(traceId=trace_id, name=EVIL))
    for page in (shown(sdk.http, trace_id), shown(sdk.http)):
        assert EVIL in page.text
        # The icon.
        assert page.tags.count("img") == 1
        assert all(source.startswith("./page/") for source in page.scripts)
        assert not {name for name in page.attributes if name.startswith("on")}


ODD: dict[str, list[dict[str, Any]]] = {
    "a cycle": [
        {"spanId": "00000000000000aa", "parentSpanId": "00000000000000bb"},
        {"spanId": "00000000000000bb", "parentSpanId": "00000000000000aa"},
    ],
    "its own parent": [{"spanId": "00000000000000aa", "parentSpanId": "00000000000000aa"}],
    "an unknown parent": [{"parentSpanId": "00000000000000ff"}],
    "no times": [{"startTimeUnixNano": "0", "endTimeUnixNano": "0"}],
    "the end of time": [{"endTimeUnixNano": str(2**64 - 1), "startTimeUnixNano": str(2**64 - 1)}],
}


@pytest.mark.parametrize("spans", ODD.values(), ids=ODD)
def test_odd_spans_are_shown_once(sdk: SdkClient, spans: list[dict[str, Any]]) -> None:
    trace_id = uuid.uuid4().hex
    sdk.send(*(a_span(traceId=trace_id, name=f"odd {number}", **each) for number, each in enumerate(spans)))
    page = shown(sdk.http, trace_id)
    read = sdk.http.get(f"/public/v1/traces/{trace_id}", headers=sdk.headers)

    assert all(page.text.count(f"odd {number}") == 1 for number in range(len(spans)))
    assert len(read.json()["spans"]) == len(spans)


def test_unknown_session_answers_404(client: httpx.Client) -> None:
    answer = client.get("/sessions", params={"trace_id": "0" * 32})

    assert answer.status_code == 404
    assert "There is no session" in answer.text


def test_silent_client_is_named_with_the_likely_cause(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--agentops") as server, server.client() as client:
        client.headers["user-agent"] = "agentops-python/0.4.21"
        silent = SdkClient(client)
        client.headers["user-agent"] = "agentops-python/0.4.20"
        SdkClient(client).send(a_span())
        page = shown(client)
        server.stop()
        log = server.log.read_text()

    for text in (page.text, log):
        assert "agentops-python/0.4.21" in text
        assert "opentelemetry-sdk<1.45" in text
        assert "0.4.20" not in text
    assert silent.token not in log


def test_client_that_sent_a_trace_is_not_named(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--agentops") as server, server.client() as client:
        SdkClient(client).send(a_span())
        page = shown(client)
        server.stop()
        log = server.log.read_text()

    assert "not sent a trace" not in page.text + log
