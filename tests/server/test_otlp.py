"""OTLP: spans of OpenTelemetry's newest SDK and of the oldest in use are stored exactly; malformed ones are refused."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from agentlightning.server import create_app
from agentlightning.store import lifecycle, open_database, spans
from tests.common.environments import CHECKOUT
from tests.common.vllm import without_agl
from tests.server.opentelemetry_sdk import ATTRIBUTES, LINKED
from tests.server.process import StoreServer

PROTOBUF = {"Content-Type": "application/x-protobuf"}
TRACE_ID = "00112233445566778899aabbccddeeff"


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def an_attempt(client: httpx.Client) -> tuple[str, str]:
    """Start a rollout; return its id and its attempt's."""
    made = client.post("/v1/agl/rollouts", json={"input": 1}).json()
    return made["rollout_id"], made["attempt"]["attempt_id"]


def spans_of(client: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    found = client.get("/v1/agl/spans", params=query)
    assert found.status_code == 200, found.text
    return found.json()["items"]


def post_json(client: httpx.Client, *spans: dict[str, Any], resource: Any = None) -> dict[str, Any]:
    """Send spans as OTLP JSON; return the answer."""
    body = {"resourceSpans": [{"resource": resource or {}, "scopeSpans": [{"spans": spans}]}]}
    answer = client.post("/v1/traces", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def a_span(**fields: Any) -> dict[str, Any]:
    """Make a span in OTLP JSON, with random ids."""
    ids = {"traceId": uuid.uuid4().hex, "spanId": uuid.uuid4().hex[:16]}
    times = {"startTimeUnixNano": "1700000000000000000", "endTimeUnixNano": "1700000001500000000"}
    return {**ids, "name": "chat", **times, **fields}


def attribute(key: str, kind: str, value: Any) -> dict[str, Any]:
    return {"key": key, "value": {kind: value}}


def of_rollout(rollout_id: str, attempt_id: str | None = None) -> list[dict[str, Any]]:
    """Make the attributes that name a rollout and an attempt."""
    ids = {"rollout_id": rollout_id, "attempt_id": attempt_id}
    return [attribute(f"agentlightning.{name}", "stringValue", each) for name, each in ids.items() if each is not None]


@pytest.mark.parametrize("compression", ["gzip", "none"])
@pytest.mark.parametrize("version", ["newest", "1.38"])
@pytest.mark.tier("all", new_store="postgresql")
def test_spans_of_the_sdk_are_stored_exactly(
    version: str, compression: str, store: StoreServer, client: httpx.Client, lightning: Path
) -> None:
    python = str(lightning / "python") if version == "1.38" else sys.executable
    rollout_id, attempt_id = an_attempt(client)
    other_id, other_attempt_id = an_attempt(client)
    arguments = [store.url, compression, rollout_id, attempt_id, other_id]
    script = CHECKOUT / "tests" / "server" / "opentelemetry_sdk.py"
    environment = {name: value for name, value in without_agl(os.environ).items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [python, script, *arguments], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    sent = json.loads(done.stdout)
    assert version == "newest" or sent["version"].startswith("1.38.")

    found = spans_of(client, rollout_id=rollout_id, attempt_id=attempt_id)
    # By end, except for the span with a number of its own; the span sent twice is there once.
    assert [(each["name"], each["sequence_id"]) for each in found] == [("chat", 1), ("agent", 2), ("numbered", 40)]
    chat = found[0]
    assert chat["rollout_id"] == rollout_id
    assert chat["attempt_id"] == attempt_id
    assert {name: chat[name] for name in ("trace_id", "span_id", "parent_id")} == {
        name: sent[name] for name in ("trace_id", "span_id", "parent_id")
    }
    assert chat["attributes"] == ATTRIBUTES
    kinds = {name: type(value) for name, value in chat["attributes"].items()}
    # To Python, 2 == 2.0 and True == 1.
    assert kinds == {name: type(value) for name, value in ATTRIBUTES.items()}
    assert [type(each) for each in chat["attributes"]["switches"]] == [bool, bool]
    assert chat["status"] == {"status_code": "ERROR", "description": "cut off"}
    assert chat["events"] == [{"name": "first token", "attributes": {"index": 0}, "timestamp": 1_700_000_000.25}]
    [link] = chat["links"]
    assert link["attributes"] == {"why": "retry"}
    assert (link["context"]["trace_id"], link["context"]["span_id"]) == (f"{LINKED[0]:032x}", f"{LINKED[1]:016x}")
    assert chat["start_time"] == sent["start_time"] / 1_000_000_000
    assert chat["end_time"] == sent["end_time"] / 1_000_000_000
    assert chat["resource"]["attributes"]["service.name"] == "agent"
    assert chat["scope"] == {"name": "tests", "version": "1.2.3"}
    assert found[1]["parent_id"] is None
    assert found[1]["status"]["status_code"] == "UNSET"

    # Attributes of a span override those of its resource, whose attempt belongs to another rollout.
    [other] = spans_of(client, rollout_id=other_id)
    assert (other["name"], other["attempt_id"]) == ("of another", other_attempt_id)
    for each in (rollout_id, other_id):
        rollout = client.get(f"/v1/agl/rollouts/{each}").json()
        assert (rollout["status"], rollout["attempt"]["status"]) == ("running", "running")
        assert rollout["attempt"]["last_heartbeat_time"] is not None
    query = {"rollout_id": rollout_id, "attempt_id": attempt_id}
    assert client.post("/v1/agl/spans/next", json=query).json()["sequence_id"] > 40


def test_logs_and_metrics_of_the_sdk_are_accepted(store: StoreServer) -> None:
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import LogRecordExportResult, SimpleLogRecordProcessor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader

    results: list[Any] = []

    class Logs(OTLPLogExporter):
        def export(self, batch: Any) -> LogRecordExportResult:
            results.append(super().export(batch))
            return results[-1]

    class Metrics(OTLPMetricExporter):
        def export(self, *arguments: Any, **named: Any) -> MetricExportResult:
            results.append(super().export(*arguments, **named))
            return results[-1]

    logs = LoggerProvider(shutdown_on_exit=False)
    logs.add_log_record_processor(SimpleLogRecordProcessor(Logs(f"{store.url}/v1/logs")))
    logs.get_logger("tests").emit(body="hello", severity_text="INFO")
    logs.shutdown()
    assert results == [LogRecordExportResult.SUCCESS]
    reader = PeriodicExportingMetricReader(Metrics(f"{store.url}/v1/metrics"), export_interval_millis=3_600_000)
    metrics = MeterProvider([reader], shutdown_on_exit=False)
    metrics.get_meter("tests").create_counter("calls").add(1)
    metrics.shutdown()
    assert results[1:] == [MetricExportResult.SUCCESS]


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/logs", "/v1/metrics"])
def test_malformed_otlp_is_refused(path: str, client: httpx.Client) -> None:
    for body, content_type, status in (
        (b"\xff garbage", "application/x-protobuf", 400),
        (b"garbage", "application/json", 400),
        (b'"resourceSpans"', "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"{}", None, 415),
    ):
        answer = client.post(path, content=body, headers={"Content-Type": content_type} if content_type else {})
        assert answer.status_code == status, answer.text
        assert answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"resourceSpans": "none"},
        {"resourceSpans": [""]},
        {"resourceSpans": [{"scopeSpans": [{"spans": ["AAA"]}]}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": [{"name": 1}]}]}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": [a_span(spanId="no hexadecimal")]}]}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": [a_span(startTimeUnixNano="9" * 100_000)]}]}]},
        {"resourceSpans": [{"scopeSpans": [{"spans": [a_span(attributes=[attribute("n", "intValue", "1e99")])]}]}]},
    ],
    # Without the ids of spans, which are random.
    ids=lambda body: re.sub(r"[0-9a-f]{16,}", "…", str(body))[:80],
)
def test_json_of_another_shape_is_refused_with_a_sentence(body: Any, client: httpx.Client) -> None:
    answer = client.post("/v1/traces", json=body)
    assert answer.status_code == 400
    detail = answer.json()["detail"]
    assert detail.startswith("the body is not an OTLP request in application/json")
    assert "\n" not in detail
    assert len(detail) < 500


@pytest.mark.parametrize("detail", ["links", "events"])
def test_too_many_events_and_links_are_refused(detail: str, client: httpx.Client) -> None:
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add(trace_id=bytes(16), span_id=bytes(8))
    for _ in range(100_001):
        getattr(span, detail).add()
    packed = gzip.compress(request.SerializeToString())
    assert len(packed) < 1_000

    answer = client.post("/v1/traces", content=packed, headers={**PROTOBUF, "Content-Encoding": "gzip"})
    assert (answer.status_code, "100000 events and links" in answer.json()["detail"]) == (400, True)


def test_otlp_json_reads_hexadecimal_ids_and_numbers_as_text(client: httpx.Client) -> None:
    rollout_id, attempt_id = an_attempt(client)
    values = [{"intValue": "0"}, {"intValue": 9707}, {"intValue": "0"}]
    span = a_span(
        traceId=TRACE_ID.upper(),
        parentSpanId="0123456789abcdef",
        kind=3,
        status={"code": 2, "message": "cut off"},
        attributes=[
            attribute("count", "intValue", "-9223372036854775808"),
            attribute("few", "intValue", 7),
            attribute("yes", "boolValue", True),
            attribute("share", "doubleValue", 0.25),
            attribute("token_ids", "arrayValue", {"values": values}),
            attribute("inner", "kvlistValue", {"values": [attribute("traceId", "stringValue", "not hexadecimal")]}),
            attribute("bytes", "bytesValue", "AAH/"),
        ],
        events=[{"timeUnixNano": "1700000000250000000", "name": "first token"}],
        traceState="vendor=1,other = 2",
        links=[{"traceId": TRACE_ID, "spanId": "fedcba9876543210", "traceState": "k=v"}],
        laterField={"traceId": "of a later version"},
        flags=None,
    )
    assert post_json(client, span, resource={"attributes": of_rollout(rollout_id, attempt_id)}) == {}
    [found] = spans_of(client, rollout_id=rollout_id)
    assert (found["trace_id"], found["span_id"], found["parent_id"]) == (TRACE_ID, span["spanId"], "0123456789abcdef")
    assert found["attributes"] == {
        "count": -(2**63),
        "few": 7,
        "yes": True,
        "share": 0.25,
        "token_ids": [0, 9707, 0],
        "inner": {"traceId": "not hexadecimal"},
        "bytes": "0001ff",
    }
    assert (found["kind"], found["status"]["status_code"]) == ("CLIENT", "ERROR")
    assert (found["start_time"], found["end_time"]) == (1_700_000_000.0, 1_700_000_001.5)
    assert found["events"][0]["timestamp"] == 1_700_000_000.25
    assert found["context"]["trace_state"] == {"vendor": "1", "other": "2"}
    linked = found["links"][0]["context"]
    assert (linked["span_id"], linked["trace_state"]) == ("fedcba9876543210", {"k": "v"})


def test_otlp_json_may_be_gzipped(client: httpx.Client) -> None:
    rollout_id = new_id("packed")
    text = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [a_span(attributes=of_rollout(rollout_id))]}]}]})
    body = gzip.compress(text.encode())
    headers = {"Content-Type": "application/json; charset=utf-8", "Content-Encoding": "gzip"}
    assert client.post("/v1/traces", content=body, headers=headers).status_code == 200
    assert len(spans_of(client, rollout_id=rollout_id)) == 1


def test_batch_sent_twice_is_kept_once(client: httpx.Client) -> None:
    rollout_id, _ = an_attempt(client)
    spans = [a_span() for _ in range(20)]
    for _ in range(2):
        post_json(client, *spans, resource={"attributes": of_rollout(rollout_id)})
    found = spans_of(client, rollout_id=rollout_id)
    assert [each["span_id"] for each in found] == [each["spanId"] for each in spans]
    assert [each["sequence_id"] for each in found] == list(range(1, 21))


def test_sequence_numbers_follow_the_order_of_arrival(client: httpx.Client) -> None:
    rollout_id, _ = an_attempt(client)
    for size in (1, 3, 2):
        post_json(client, *(a_span() for _ in range(size)), resource={"attributes": of_rollout(rollout_id)})
    assert [each["sequence_id"] for each in spans_of(client, rollout_id=rollout_id)] == [1, 2, 3, 4, 5, 6]


def test_spans_without_a_rollout_are_kept_under_their_trace(client: httpx.Client) -> None:
    trace_id = uuid.uuid4().hex
    unusable = attribute("agentlightning.rollout_id", "stringValue", "x" * 10_000)
    spans = [a_span(traceId=trace_id), a_span(traceId=trace_id, attributes=[unusable])]
    for _ in range(2):
        post_json(client, *spans)
    found = spans_of(client, trace_id=trace_id)
    assert [each["span_id"] for each in found] == [each["spanId"] for each in spans]
    assert {(each["rollout_id"], each["attempt_id"], each["sequence_id"]) for each in found} == {(None, None, 0)}


def test_spans_of_an_unknown_rollout_are_kept_under_its_id(client: httpx.Client) -> None:
    rollout_id = new_id("unknown")
    post_json(client, a_span(), a_span(attributes=of_rollout(rollout_id, "mine")), resource={"attributes": []})
    post_json(client, a_span(), resource={"attributes": of_rollout(rollout_id)})
    found = spans_of(client, rollout_id=rollout_id)
    assert [(each["attempt_id"], each["sequence_id"]) for each in found] == [("mine", 1), ("", 2)]
    assert client.get(f"/v1/agl/rollouts/{rollout_id}").json() is None


def test_spans_with_ids_of_wrong_length_are_counted_and_others_kept(client: httpx.Client) -> None:
    rollout_id = new_id("partly")
    good, bad = a_span(), [a_span(traceId="00ff"), a_span(spanId=""), a_span(spanId="00" * 9)]
    answer = post_json(client, *bad, good, resource={"attributes": of_rollout(rollout_id)})
    assert int(answer["partialSuccess"]["rejectedSpans"]) == len(bad)
    assert "span_id" in answer["partialSuccess"]["errorMessage"]
    assert [each["span_id"] for each in spans_of(client, rollout_id=rollout_id)] == [good["spanId"]]


UNREADABLE_SPANS: dict[str, tuple[dict[str, Any], str]] = {
    "an id that is not hexadecimal": ({"spanId": "no hexadecimal"}, "not a valid OTLP span"),
    "a name that is a number": ({"name": 7}, "not a valid OTLP span"),
    "a number that is too long": ({"startTimeUnixNano": "9" * 30}, "not a valid OTLP span"),
    "an attribute of another shape": ({"attributes": [{"key": {}}]}, "not a valid OTLP span"),
    "a trace id of zeros": ({"traceId": "0" * 32}, "all zeros"),
    "a span id of zeros": ({"spanId": "0" * 16}, "all zeros"),
    "a span id that is too short": ({"spanId": "00ff"}, "must have 16 bytes, a span_id 8"),
}


@pytest.mark.parametrize(("fields", "reason"), UNREADABLE_SPANS.values(), ids=UNREADABLE_SPANS)
def test_unstorable_span_is_counted_and_others_kept(fields: dict[str, Any], reason: str, client: httpx.Client) -> None:
    rollout_id = new_id("partly")
    good = [a_span() for _ in range(5)]
    sent = [*good[:2], a_span(**fields), *good[2:], a_span(**fields)]
    answer = post_json(client, *sent, resource={"attributes": of_rollout(rollout_id)})
    assert answer["partialSuccess"]["rejectedSpans"] == "2"
    assert answer["partialSuccess"]["errorMessage"].startswith("2 of the spans: ")
    assert reason in answer["partialSuccess"]["errorMessage"]
    assert [each["span_id"] for each in spans_of(client, rollout_id=rollout_id)] == [each["spanId"] for each in good]


def test_spans_with_too_long_ids_are_counted_and_others_kept(store: StoreServer, client: httpx.Client) -> None:
    rollout_id = new_id("partly")
    # PostgreSQL cannot compress these; an index entry has room for 2,700 bytes.
    long = "".join(chr(0x10000 + each) for each in random.Random(1).sample(range(0x10000), 512))
    good = [a_span() for _ in range(20)]
    bad = [a_span(attributes=of_rollout(long, long[::-1])) for _ in range(2)]
    answer = post_json(client, *good[:7], bad[0], *good[7:], bad[1], resource={"attributes": of_rollout(rollout_id)})
    kept = [each["span_id"] for each in spans_of(client, rollout_id=rollout_id)]
    assert kept == [each["spanId"] for each in good]
    if store.store.startswith("postgresql"):
        assert answer["partialSuccess"]["rejectedSpans"] == "2"
        assert "index" in answer["partialSuccess"]["errorMessage"]
    else:
        assert answer == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a \ud83d b", "a ? b"), ("\udc00\ud83d", "??"), ("\ud83d\ude00", "\U0001f600"), ("\\ud83d", "\\ud83d")],
)
def test_unpaired_surrogates_in_json_become_question_marks(text: str, expected: str, client: httpx.Client) -> None:
    rollout_id = new_id("surrogates")
    attributes = [*of_rollout(rollout_id), attribute("text", "stringValue", text)]
    sent = [a_span(), a_span(name=text, attributes=attributes), a_span(attributes=of_rollout(rollout_id))]
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": sent}]}]})
    answer = client.post("/v1/traces", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (200, {})
    found = spans_of(client, rollout_id=rollout_id)
    assert [each["name"] for each in found] == [expected, "chat"]
    assert found[0]["attributes"]["text"] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"a \xff b", "a ? b"), (b"\xed\xa0\xbd", "?"), (b"\xc3", "?"), ("größe".encode("latin-1"), "gr??e")],
)
@pytest.mark.parametrize("kind", ["protobuf", "json"])
def test_text_that_is_not_utf_8_is_repaired(kind: str, text: bytes, expected: str, client: httpx.Client) -> None:
    rollout_id = new_id("latin")
    mark = "MARK" + "x" * (len(text) - 4) if len(text) > 4 else "MARK"[: len(text)]
    if kind == "json":
        sent = [a_span(attributes=of_rollout(rollout_id)), a_span(name="NAME", attributes=of_rollout(rollout_id))]
        body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": sent}]}]}).encode().replace(b"NAME", text)
        headers = {"Content-Type": "application/json"}
    else:
        request = ExportTraceServiceRequest()
        spans = request.resource_spans.add().scope_spans.add().spans
        for name in ("chat", mark):
            span = spans.add(trace_id=os.urandom(16), span_id=os.urandom(8), name=name)
            span.attributes.add(key="agentlightning.rollout_id").value.string_value = rollout_id
            span.attributes.add(key="bytes").value.bytes_value = b"\xff\x00"
        marked = mark.encode()
        body, headers = request.SerializeToString(), PROTOBUF
        assert body.count(b"*" + bytes([len(marked)]) + marked) == 1
        body = body.replace(b"*" + bytes([len(marked)]) + marked, b"*" + bytes([len(text)]) + text)
    answer = client.post("/v1/traces", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    found = spans_of(client, rollout_id=rollout_id)
    assert [each["name"] for each in found] == ["chat", expected]
    assert kind == "json" or found[1]["attributes"]["bytes"] == "ff00"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_headers_name_a_rollout_in_utf_8_or_latin_1(encoding: str, client: httpx.Client) -> None:
    """vLLM servers read headers the same way, so that a call and its span match."""
    rollout_id, attempt_id = new_id("größe"), "versuch-ü"
    headers = {b"x-agl-rollout-id": rollout_id.encode(encoding), b"x-agl-attempt-id": attempt_id.encode(encoding)}
    body = {"resourceSpans": [{"scopeSpans": [{"spans": [a_span()]}]}]}
    assert client.post("/v1/traces", json=body, headers=headers).json() == {}
    [found] = spans_of(client, rollout_id=rollout_id)
    assert found["attempt_id"] == attempt_id


@pytest.mark.parametrize("parent", ["", "0" * 16, None])
def test_parent_of_zeros_is_no_parent(parent: str | None, client: httpx.Client) -> None:
    rollout_id = new_id("root")
    post_json(client, a_span(parentSpanId=parent, attributes=of_rollout(rollout_id)))
    [found] = spans_of(client, rollout_id=rollout_id)
    assert found["parent_id"] is None


def test_shared_resource_and_scope_are_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    rollout_id = new_id("common")
    long = attribute("long", "stringValue", "x" * 100_000)
    scope = {"name": "y" * 100_000, "version": "1"}
    with StoreServer(path) as server, server.client() as client:
        resource = {"attributes": [*of_rollout(rollout_id), long]}
        for _ in range(2):
            sent = [{"resource": resource, "scopeSpans": [{"scope": scope, "spans": [a_span() for _ in range(500)]}]}]
            assert client.post("/v1/traces", json={"resourceSpans": sent}).json() == {}
        found = spans_of(client, rollout_id=rollout_id, limit=1000, offset=999)
        server.stop()
    assert len(found) == 1
    assert found[0]["resource"]["attributes"]["long"] == "x" * 100_000
    assert found[0]["scope"] == scope
    assert path.stat().st_size < 8 << 20


def test_protobuf_request_gets_a_protobuf_answer(client: httpx.Client) -> None:
    request = ExportTraceServiceRequest()
    request.resource_spans.add().scope_spans.add().spans.add(trace_id=b"short", span_id=b"12345678")
    answer = client.post("/v1/traces", content=request.SerializeToString(), headers=PROTOBUF)
    assert answer.headers["content-type"] == PROTOBUF["Content-Type"]
    assert ExportTraceServiceResponse.FromString(answer.content).partial_success.rejected_spans == 1


def test_non_finite_doubles_become_their_names(client: httpx.Client) -> None:
    rollout_id = new_id("doubles")
    values = {"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 5e-324, "e": -0.0}
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add(trace_id=os.urandom(16), span_id=os.urandom(8))
    span.attributes.add(key="agentlightning.rollout_id").value.string_value = rollout_id
    for name, value in values.items():
        span.attributes.add(key=name).value.double_value = value
    assert client.post("/v1/traces", content=request.SerializeToString(), headers=PROTOBUF).status_code == 200
    as_text = [attribute("f", "doubleValue", "NaN"), attribute("g", "doubleValue", "-Infinity")]
    post_json(client, a_span(attributes=[*of_rollout(rollout_id), *as_text]))
    first, second = spans_of(client, rollout_id=rollout_id)
    assert {name: first["attributes"][name] for name in values} == {
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
        "d": 5e-324,
        "e": 0.0,
    }
    assert (second["attributes"]["f"], second["attributes"]["g"]) == ("NaN", "-Infinity")


def test_span_belongs_to_one_attempt_only(client: httpx.Client) -> None:
    rollout_id, first = an_attempt(client)
    second = client.post(f"/v1/agl/rollouts/{rollout_id}/attempts").json()["attempt"]["attempt_id"]
    span = a_span()
    for attempt_id in (first, second, None):
        post_json(client, span, resource={"attributes": of_rollout(rollout_id, attempt_id)})
    # Without an attempt, the span belongs to the latest, which already has it.
    assert [each["attempt_id"] for each in spans_of(client, rollout_id=rollout_id)] == [first, second]


def test_span_sent_again_stays_with_its_attempt(client: httpx.Client) -> None:
    """A span without an attempt belongs to the attempt that was the latest when it first arrived."""
    rollout_id, attempt_id = an_attempt(client)
    sent = a_span(attributes=of_rollout(rollout_id))
    post_json(client, sent)
    client.post(f"/v1/agl/rollouts/{rollout_id}/attempts", json={})

    post_json(client, sent, a_span(attributes=of_rollout(rollout_id)))

    first, second = spans_of(client, rollout_id=rollout_id)
    assert (first["attempt_id"], first["span_id"]) == (attempt_id, sent["spanId"])
    assert second["attempt_id"] != attempt_id


def test_batch_locks_rollouts_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression test: in different orders, two servers with spans of the same rollouts would deadlock."""
    ids = [new_id("ro") for _ in range(20)]
    alive: list[str] = []
    numbered: list[str] = []
    write = spans.run_many

    def note(connection: Any, statement: str, rows: Any) -> None:
        numbered.extend(rollout_id for rollout_id, _ in rows)
        write(connection, statement, rows)

    def note_alive(_: Any, named: Any) -> None:
        alive.extend(rollout_id for rollout_id, _ in named)

    monkeypatch.setattr(lifecycle, "heartbeats", note_alive)
    monkeypatch.setattr(spans, "run_many", note)
    app = create_app(open_database(str(tmp_path / "store.db")), body_limit=1 << 20)
    with TestClient(app) as client:
        post_json(client, *(a_span(attributes=of_rollout(each)) for each in ids))

    assert alive == numbered == sorted(ids)
