"""Sessions are attempts: of the rollout that they name, or else of a rollout of their own."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.agentops.client import SdkClient
from tests.agentops.conftest import Run
from tests.server.process import StoreServer
from tests.server.test_otlp import PROTOBUF, a_span, an_attempt, attribute, of_rollout

TAGS = "agentops.tags"


def child(trace_id: str, **fields: Any) -> dict[str, Any]:
    return a_span(traceId=trace_id, parentSpanId="00000000000000ff", **fields)


def tags(*texts: str) -> dict[str, Any]:
    return attribute(TAGS, "arrayValue", {"values": [{"stringValue": text} for text in texts]})


def test_session_gets_one_rollout_of_its_own(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    for _ in range(3):
        sdk.send(child(trace_id), child(trace_id))
    unfinished = sdk.rollout(sdk.place(trace_id)[0])
    sdk.send(sdk.session(trace_id))
    rollout_id, attempt_id = sdk.place(trace_id)
    found = sdk.rollout(rollout_id)

    assert (unfinished["status"], unfinished["attempt"]["status"]) == ("running", "running")
    assert found["input"] == {"trace_id": trace_id}
    assert found["metadata"] == {"agentops.project.id": sdk.project_id}
    assert (found["status"], found["attempt"]["status"]) == ("succeeded", "succeeded")
    assert found["attempt"]["attempt_id"] == attempt_id
    assert found["attempt"]["sequence_id"] == 1


FAILED: dict[str, dict[str, Any]] = {
    "Fail": {"attributes": [attribute("agentops.session.end_state", "stringValue", "Fail")]},
    "Error": {"attributes": [attribute("agentops.session.end_state", "stringValue", "Error")]},
    # The SDK sends these for a decorated function that raises or is cancelled.
    "Indeterminate": {"attributes": [attribute("agentops.session.end_state", "stringValue", "Indeterminate")]},
    "Unknown": {"attributes": [attribute("agentops.session.end_state", "stringValue", "Unknown")]},
    "the status of its root": {"status": {"code": 2, "message": "ValueError"}},
}


@pytest.mark.parametrize("fields", FAILED.values(), ids=FAILED)
def test_session_with_a_failed_end_state_fails(sdk: SdkClient, fields: dict[str, Any]) -> None:
    trace_id = uuid.uuid4().hex
    sdk.send(a_span(traceId=trace_id, **fields), child(trace_id))

    assert sdk.rollout(sdk.place(trace_id)[0])["status"] == "failed"


@pytest.mark.parametrize("state", ["Success", "Shutdown"])
def test_session_with_another_end_state_succeeds(sdk: SdkClient, state: str) -> None:
    trace_id = uuid.uuid4().hex
    sdk.send(sdk.session(trace_id, attribute("agentops.session.end_state", "stringValue", state)))

    assert sdk.rollout(sdk.place(trace_id)[0])["status"] == "succeeded"


@pytest.mark.parametrize("state", [None, "Shutdown"])
@pytest.mark.parametrize("failed", [0, 1])
def test_session_without_end_state_ends_like_its_last_span(sdk: SdkClient, failed: int, state: str | None) -> None:
    trace_id = uuid.uuid4().hex
    below = [child(trace_id, endTimeUnixNano=f"170000000{number}000000000") for number in (1, 2)]
    below[failed]["status"] = {"code": 2}
    sdk.send(*below)
    attributes = [] if state is None else [attribute("agentops.session.end_state", "stringValue", state)]
    sdk.send(sdk.session(trace_id, *attributes, endTimeUnixNano="1700000009000000000"))

    assert sdk.rollout(sdk.place(trace_id)[0])["status"] == ("succeeded", "failed")[failed]


def test_session_of_a_raising_function_fails(store: StoreServer, client: httpx.Client, run_sdk: Run) -> None:
    known = {each["rollout_id"] for each in client.get("/v1/agl/rollouts").json()["items"]}
    run_sdk(store, "raising.py")

    made = [each for each in client.get("/v1/agl/rollouts").json()["items"] if each["rollout_id"] not in known]
    spans = [client.get("/v1/agl/spans", params={"rollout_id": each["rollout_id"]}).json()["items"] for each in made]
    statuses = {found[-1]["name"].partition(".")[0]: each["status"] for each, found in zip(made, spans, strict=True)}
    assert statuses == {"returns": "succeeded", "raises": "failed", "is_interrupted": "failed"}


def test_session_with_a_parent_of_zeros_ends(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    sdk.send(sdk.session(trace_id, parentSpanId="0" * 16))

    assert sdk.rollout(sdk.place(trace_id)[0])["status"] == "succeeded"


def test_success_end_state_overrides_failed_spans(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    success = attribute("agentops.session.end_state", "stringValue", "Success")
    sdk.send(child(trace_id, status={"code": 2}), sdk.session(trace_id, success))

    assert sdk.rollout(sdk.place(trace_id)[0])["status"] == "succeeded"


def test_failed_call_leaves_its_session_running(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    sdk.send(child(trace_id, status={"code": 2}))

    assert sdk.rollout(sdk.place(trace_id)[0])["status"] == "running"


def test_status_set_by_a_client_is_kept(sdk: SdkClient) -> None:
    trace_id, root = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    sdk.send(sdk.session(trace_id, spanId=root))
    rollout_id, attempt_id = sdk.place(trace_id)
    sdk.http.post(f"/v1/agl/rollouts/{rollout_id}/attempts/{attempt_id}", json={"status": "failed"})
    sdk.send(sdk.session(trace_id, spanId=root), child(trace_id))

    assert sdk.rollout(rollout_id)["status"] == "failed"


@pytest.mark.parametrize("names_attempt", [True, False])
@pytest.mark.parametrize("where", ["attributes", "a tag", "a header"])
def test_session_joins_the_rollout_that_it_names(sdk: SdkClient, where: str, names_attempt: bool) -> None:
    trace_id = uuid.uuid4().hex
    rollout_id, attempt_id = an_attempt(sdk.http)
    ids = of_rollout(rollout_id, attempt_id if names_attempt else None)
    values = {each["key"]: each["value"]["stringValue"] for each in ids}
    root, headers = sdk.session(trace_id), {}
    if where == "attributes":
        root["attributes"] = ids
    elif where == "a tag":
        root["attributes"] = [tags("mine", *(f"{name}={value}" for name, value in values.items()))]
    else:
        short = {name.removeprefix("agentlightning.").replace("_", "-"): value for name, value in values.items()}
        headers = {f"x-agl-{name}": value for name, value in short.items()}
    # The root ends last, so that the spans below it are sent before.
    sdk.send(child(trace_id), child(trace_id), headers=headers)
    before = sdk.place(trace_id)
    sdk.send(root, child(trace_id), headers=headers)
    sdk.send(child(trace_id))

    assert sdk.place(trace_id) == (rollout_id, attempt_id)
    assert sdk.rollout(rollout_id)["status"] == "running"
    if where == "a header":
        assert before == (rollout_id, attempt_id)
    else:
        assert sdk.rollout(before[0]) is None
    found = sdk.http.get("/v1/agl/spans", params={"rollout_id": rollout_id}).json()["items"]
    assert [each["sequence_id"] for each in found] == [1, 2, 3, 4, 5]


def test_span_resent_after_joining_is_kept_once(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    rollout_id, _ = an_attempt(sdk.http)
    below = child(trace_id)
    sdk.send(below)
    sdk.send(sdk.session(trace_id, *of_rollout(rollout_id)))
    sdk.send(below)

    assert sdk.http.get("/v1/agl/spans", params={"trace_id": trace_id}).json()["total"] == 2


def test_session_of_an_unknown_rollout_is_kept_under_its_id(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    sdk.send(child(trace_id), sdk.session(trace_id, tags("agentlightning.rollout_id=elsewhere")))

    assert sdk.place(trace_id) == ("elsewhere", "")


def test_span_has_the_project_of_the_token(sdk: SdkClient) -> None:
    span = a_span()
    sdk.send(span)
    [found] = sdk.http.get("/v1/agl/spans", params={"trace_id": span["traceId"]}).json()["items"]

    assert found["resource"]["attributes"]["agentops.project.id"] == sdk.project_id


def test_spans_sent_before_the_login_join_their_session(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    early = {"resourceSpans": [{"scopeSpans": [{"spans": [child(trace_id)]}]}]}
    assert sdk.http.post("/v1/traces", json=early).status_code == 200
    sdk.send(sdk.session(trace_id))

    rollout_id, _ = sdk.place(trace_id)
    assert sdk.http.get("/v1/agl/spans", params={"rollout_id": rollout_id}).json()["total"] == 2


def test_spans_sent_without_a_token_have_no_rollout(client: httpx.Client) -> None:
    span = a_span()
    client.post("/v1/traces", json={"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})

    [found] = client.get("/v1/agl/spans", params={"trace_id": span["traceId"]}).json()["items"]
    assert found["rollout_id"] is None


def run_concurrently(*works: Callable[[], object]) -> None:
    with ThreadPoolExecutor(len(works)) as threads:
        for each in [threads.submit(work) for work in works]:
            each.result()


def test_concurrent_batches_of_a_session_share_one_attempt(sdk: SdkClient) -> None:
    trace_ids = [uuid.uuid4().hex for _ in range(3)]

    def send() -> None:
        for _ in range(5):
            sdk.send(*(child(each) for each in trace_ids))

    run_concurrently(*[send] * 8)

    places = [sdk.place(each) for each in trace_ids]
    assert len(set(places)) == 3
    for trace_id, (rollout_id, _) in zip(trace_ids, places, strict=True):
        assert sdk.http.get("/v1/agl/spans", params={"rollout_id": rollout_id}).json()["total"] == 40
        assert sdk.rollout(rollout_id)["attempt"]["sequence_id"] == 1
        assert sdk.rollout(rollout_id)["input"] == {"trace_id": trace_id}


def test_session_joins_while_more_spans_arrive(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    rollout_id, attempt_id = an_attempt(sdk.http)

    def send() -> None:
        for _ in range(10):
            sdk.send(child(trace_id))

    run_concurrently(send, send, lambda: sdk.send(sdk.session(trace_id, *of_rollout(rollout_id))), send, send)

    assert sdk.place(trace_id) == (rollout_id, attempt_id)
    found = sdk.http.get("/v1/agl/spans", params={"rollout_id": rollout_id}).json()["items"]
    assert [each["sequence_id"] for each in found] == sorted({each["sequence_id"] for each in found})
    assert len(found) == 41


def test_truncated_otlp_answers_400(sdk: SdkClient) -> None:
    answer = sdk.http.post("/v1/traces", content=b"\n\x7fabc", headers={**PROTOBUF, **sdk.headers})

    assert (answer.status_code, answer.json().keys()) == (400, {"detail"})


def test_trace_of_another_project_answers_404(client: httpx.Client, sdk: SdkClient) -> None:
    span = a_span()
    sdk.send(span)
    path = f"/public/v1/traces/{span['traceId']}"
    other = SdkClient(client, "another")

    assert client.get(path, headers=sdk.headers).json()["spans"][0]["span_id"] == span["spanId"]
    assert client.get(path, headers=other.headers).status_code == 404
    assert client.get(f"{path}/metrics", headers=other.headers).status_code == 404
