"""Uploads of output and objects: returned unchanged, at URLs that cannot be guessed."""

from __future__ import annotations

import uuid
from pathlib import Path

import httpx
import pytest

from tests.agentops.client import SdkClient
from tests.server.process import StoreServer

TEXT = "2026-11-24 - INFO - <script>alert(1)</script>\nünïcode 🦙\0\n"


@pytest.mark.parametrize("kind", ["logs", "objects"])
def test_upload_is_returned_as_plain_text(sdk: SdkClient, kind: str) -> None:
    body = f"{TEXT}{uuid.uuid4()}"
    uploaded = sdk.http.post(f"/v4/{kind}/upload/", json={"body": body}, headers=sdk.headers).json()
    found = sdk.http.get(uploaded["url"])

    assert uploaded["size"] == len(body.encode())
    assert (found.status_code, found.content) == (200, body.encode())
    assert found.headers["content-type"] == "text/plain; charset=utf-8"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["content-security-policy"] == "sandbox"


def test_upload_sent_twice_is_kept_once(sdk: SdkClient) -> None:
    trace_id = uuid.uuid4().hex
    headers = {**sdk.headers, "Trace-Id": str(int(trace_id, 16))}
    urls = {sdk.http.post("/v4/logs/upload/", json={"body": "x"}, headers=headers).json()["url"] for _ in range(3)}
    sdk.send(sdk.session(trace_id))

    [url] = urls
    page = sdk.http.get("/sessions", params={"trace_id": trace_id}).text
    assert page.count(url.removeprefix(str(sdk.http.base_url).rstrip("/"))) == 1


def test_upload_urls_cannot_be_guessed(client: httpx.Client) -> None:
    one, other = SdkClient(client, "one"), SdkClient(client, "other")
    urls = [
        client.post("/v4/objects/upload/", json={"body": "same"}, headers=sender.headers).json()["url"]
        for sender in (one, other)
    ]

    assert urls[0] != urls[1]
    assert all(len(url.rpartition("/")[2]) >= 32 for url in urls)
    assert client.get("/v4/objects/1").status_code == 404
    assert client.get(urls[0].replace("objects", "logs")).status_code == 404


@pytest.mark.parametrize("trace_id", ["", "abc", "-1", str(1 << 128), "9" * 5000, "٣"])
def test_invalid_trace_id_answers_422(sdk: SdkClient, trace_id: str) -> None:
    headers = {**sdk.headers, "Trace-Id": trace_id}
    sent = {name.encode(): value.encode() for name, value in headers.items()}
    answer = sdk.http.post("/v4/logs/upload/", json={"body": "x"}, headers=sent)

    assert (answer.status_code, answer.json().keys()) == (422, {"detail"})


@pytest.mark.parametrize("body", [{}, {"body": None}, {"body": 1}, [], "x"])
def test_upload_without_text_answers_422(sdk: SdkClient, body: object) -> None:
    assert sdk.http.post("/v4/objects/upload/", json=body, headers=sdk.headers).status_code == 422


def test_too_large_upload_answers_413(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--agentops", "--max-body-mb=1") as server, server.client() as client:
        sdk = SdkClient(client)
        for kind in ("logs", "objects"):
            answer = client.post(f"/v4/{kind}/upload/", json={"body": "x" * (1 << 20)}, headers=sdk.headers)
            assert (answer.status_code, answer.json().keys()) == (413, {"detail"})


def test_upload_survives_a_kill(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--agentops") as server:
        with server.client() as client:
            sdk = SdkClient(client)
            url = client.post("/v4/objects/upload/", json={"body": TEXT}, headers=sdk.headers).json()["url"]
        server.kill()
        server.start()
        assert httpx.get(url).content == TEXT.encode()
