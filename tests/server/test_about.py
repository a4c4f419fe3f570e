"""The store's metrics, readiness, statistics, and OpenAPI document."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agentlightning.rollout_records import ROLLOUT_STATUSES
from tests.server.process import StoreServer


def metrics(client: httpx.Client) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_metrics_count_rollouts_by_status(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        assert {status: metrics(client)[key("agl_store_rollouts", status=status)] for status in ROLLOUT_STATUSES} == (
            dict.fromkeys(ROLLOUT_STATUSES, 0)
        )
        client.post("/v1/agl/queues/rollouts/enqueue", json={"rollouts": [{"input": 1}] * 3})
        [taken] = client.post("/v1/agl/queues/rollouts/dequeue", json={"limit": 1}).json()
        path = f"/v1/agl/rollouts/{taken['rollout_id']}/attempts/latest"
        assert client.post(path, json={"status": "succeeded"}).status_code == 200
        found = metrics(client)
        assert found[key("agl_store_rollouts", status="queuing")] == 2
        assert found[key("agl_store_rollouts", status="preparing")] == 0
        assert found[key("agl_store_rollouts", status="succeeded")] == 1
        assert found[key("agl_store_writes_waiting")] == 0


def test_metrics_count_requests_by_route_not_by_id(client: httpx.Client) -> None:
    route = "/v1/agl/rollouts/{rollout_id}"
    counted = key("agl_store_requests_total", method="GET", route=route, status="200")
    refused = key("agl_store_requests_total", method="GET", route=route, status="422")
    unknown = key("agl_store_requests_total", method="any", route="none", status="404")
    ids = [uuid.uuid4().hex for _ in range(20)]
    client.get(f"/v1/agl/rollouts/{ids[0]}")
    before = metrics(client)
    for each in ids:
        client.get(f"/v1/agl/rollouts/{each}")
        client.get(f"/{each}")
        client.get(f"/v1/agl/rollouts/{each * 20}")
    found = metrics(client)
    for name in (counted, refused, unknown):
        assert found[name] - before.get(name, 0) == 20
    seconds = key("agl_store_request_seconds_count", method="GET", route=route)
    assert found[seconds] - before[seconds] == 40
    assert not [name for name in found if any(each in str(name) for each in ids)]


def test_health_routes_answer_ok(client: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/v1/agl/health"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/v1/agl/rollouts", "/docs", "/metrics", "/no"])
def test_head_is_answered_as_get_without_a_body(client: httpx.Client, path: str) -> None:
    answer, of_get = client.head(path), client.get(path)

    assert (answer.status_code, answer.content) == (of_get.status_code, b"")
    assert answer.headers["content-type"] == of_get.headers["content-type"]
    if path != "/metrics":
        # Those count this request.
        assert answer.headers["content-length"] == of_get.headers["content-length"]


def test_head_where_there_is_no_get_is_refused(client: httpx.Client) -> None:
    answer = client.head("/v1/agl/queues/rollouts/enqueue")

    assert (answer.status_code, answer.content) == (405, b"")


def assert_not_ready(server: StoreServer, client: httpx.Client, *, because: str) -> None:
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert because in server.log.read_text()
    assert "Traceback" not in answer.text
    assert int(answer.headers["retry-after"]) > 0
    # The process itself works, and needs no restart.
    assert client.get("/healthz").status_code == 200


def test_missing_file_is_not_ready_until_it_is_back(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        made = client.post("/v1/agl/rollouts", json={"input": 1}).json()
        away = server.path.with_name("away.db")
        server.path.rename(away)
        assert_not_ready(server, client, because="cannot be opened: No such file or directory")
        assert client.post("/v1/agl/rollouts", json={"input": 2}).status_code == 503
        away.rename(server.path)
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/agl/rollouts").json()["items"][0]["rollout_id"] == made["rollout_id"]
        assert client.post("/v1/agl/rollouts", json={"input": 3}).status_code == 201
        assert client.get("/v1/agl/statistics").json()["total_rollouts"] == 2


def test_replaced_file_is_not_ready(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        server.path.rename(tmp_path / "away.db")
        server.path.write_bytes(b"")
        assert_not_ready(server, client, because="was replaced since it was opened")


@pytest.mark.parametrize("size", [0, 1 << 20], ids=["empty", "overwritten"])
def test_damaged_file_is_not_ready(size: int, tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server:
        with server.client() as client:
            client.post("/v1/agl/rollouts", json={"input": "x" * (1 << 20)})
        # So that none of it is in memory or in the WAL.
        server.stop()
        server.start()
        with server.path.open("r+b") as file:
            file.truncate(size)
            file.write(b"?" * size)
        with server.client() as client:
            assert_not_ready(server, client, because="is not a SQLite file, or is damaged")
            for path in ("/v1/agl/rollouts", "/v1/agl/statistics", "/metrics"):
                assert "damaged" in client.get(path).json()["detail"]
        assert "Traceback" not in server.log.read_text()


def test_statistics_count_everything(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        first = client.get("/v1/agl/statistics").json()
        kinds = ("rollouts", "attempts", "spans", "resources", "workers")
        assert {kind: first[f"total_{kind}"] for kind in kinds} == dict.fromkeys(kinds, 0)
        client.post("/v1/agl/queues/rollouts/enqueue", json={"rollouts": [{"input": 1}] * 2})
        client.post("/v1/agl/queues/rollouts/dequeue", json={"limit": 1, "worker_id": "w"})
        span = {"traceId": "ab" * 16, "spanId": "cd" * 8}
        client.post("/v1/traces", json={"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})
        then = client.get("/v1/agl/statistics").json()
        assert {kind: then[f"total_{kind}"] for kind in kinds} == {
            "rollouts": 2,
            "attempts": 1,
            "spans": 1,
            "resources": 0,
            "workers": 1,
        }
        assert then["name"] == "agl store"
        assert then["uptime"] > first["uptime"] > 0


@pytest.fixture
def document(client: httpx.Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def test_document_has_a_schema_for_every_answer(document: dict[str, Any]) -> None:
    assert document["info"]["title"] == "agl store"
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            assert about["description"], f"{method} {path}"
            for status, answer in about["responses"].items():
                assert ("content" in answer) == (status != "204"), f"{method} {path} {status}"
                for content in answer.get("content", {}).values():
                    assert content["schema"], f"{method} {path} {status}"
                if int(status) >= 400:
                    assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
            if path not in ("/healthz", "/readyz", "/v1/agl/health"):
                assert {"401", "503"} <= about["responses"].keys()


def test_document_has_a_working_example_of_every_body(document: dict[str, Any], client: httpx.Client) -> None:
    bodies = 0
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            content = about.get("requestBody", {"content": {}})["content"].get("application/json")
            if content is None:
                # No body, or a binary one.
                continue
            bodies += 1
            examples = [content["example"]] if "example" in content else examples_of(content["schema"], document)
            assert examples, f"{method} {path}"
            for example in examples:
                # With a well-formed id in the path.
                address = path.replace("{sender_id}", str(uuid.uuid4())).replace("{", "").replace("}", "")
                answer = client.request(method, address, json=example)
                # 404 for unknown ids.
                assert answer.status_code in (200, 201, 404), f"{method} {path}: {answer.text}"
    assert bodies > 15


def examples_of(schema: dict[str, Any], document: dict[str, Any]) -> list[Any]:
    """Return the examples of a schema, or of the schema that it refers to."""
    for each in (schema, *schema.get("anyOf", ())):
        if "$ref" in each:
            each = document["components"]["schemas"][each["$ref"].rpartition("/")[2]]
        if "examples" in each:
            return each["examples"]
    return []
