"""Access tokens: traded for a key, and accepted only on the AgentOps SDK's routes."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from agentlightning.store import open_database
from agentlightning.store.uploads import shared_secret
from tests.agentops.client import SdkClient
from tests.server.process import SECONDS, StoreServer
from tests.server.test_otlp import a_span

KEY = "correct-horse:battery/staple"

Make = Callable[[StoreServer, SdkClient], str]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with StoreServer(tmp_path_factory.mktemp("locked") / "store.db", "--agentops", key=KEY) as server:
        yield server


@pytest.fixture
def outside(locked: StoreServer) -> Iterator[httpx.Client]:
    """A client without the key."""
    with httpx.Client(base_url=locked.url, timeout=SECONDS) as client:
        yield client


@pytest.fixture
def sender(outside: httpx.Client) -> SdkClient:
    return SdkClient(outside, KEY)


def test_login_accepts_only_the_key(outside: httpx.Client) -> None:
    for path, answered in (("/v3/auth/token", "token"), ("/public/v1/auth/access_token", "bearer")):
        right = outside.post(path, json={"api_key": KEY})
        wrong = outside.post(path, json={"api_key": KEY[:-1]})

        assert (right.status_code, wrong.status_code) == (200, 401)
        assert right.json()[answered].count(".") == 2
        assert wrong.json().keys() == {"detail"}


def test_login_without_a_store_key_accepts_any(client: httpx.Client) -> None:
    one, again, other = SdkClient(client, "one"), SdkClient(client, "one"), SdkClient(client, "other")

    assert one.project_id == again.project_id != other.project_id
    assert uuid.UUID(one.project_id)


@pytest.mark.parametrize("body", [{}, {"api_key": ""}, {"api_key": 1}, {"api_key": None}, []])
def test_login_without_a_key_answers_422(client: httpx.Client, body: Any) -> None:
    assert client.post("/v3/auth/token", json=body).status_code == 422


def claims_of(sender: SdkClient, **changes: Any) -> dict[str, Any]:
    claims = jwt.decode(sender.token, options={"verify_signature": False})
    return {name: value for name, value in {**claims, **changes}.items() if value is not None}


def signed(server: StoreServer, claims: dict[str, Any]) -> str:
    database = open_database(server.store)
    with database.writing() as connection:
        found = shared_secret(connection)
    database.close()
    return jwt.encode(claims, found, "HS256")


def tampered(_: StoreServer, sender: SdkClient) -> str:
    head, _body, signature = sender.token.split(".")
    body = base64.urlsafe_b64encode(json.dumps(claims_of(sender, project_id="another")).encode()).decode().rstrip("=")
    return f"{head}.{body}.{signature}"


REFUSED: dict[str, Make] = {
    "none": lambda *_: "",
    "no token": lambda *_: "abc",
    "another's": lambda _, sender: jwt.encode(claims_of(sender), "another secret, as long as the real one", "HS256"),
    "unsigned": lambda _, sender: jwt.encode(claims_of(sender), "", "none"),
    "tampered": tampered,
    "expired": lambda server, sender: signed(server, claims_of(sender, exp=int(time.time()) - 1)),
    "without an expiry": lambda server, sender: signed(server, claims_of(sender, exp=None)),
    "for something else": lambda server, sender: signed(server, claims_of(sender, aud="another")),
    "of another key": lambda server, sender: signed(server, claims_of(sender, project_id=str(uuid.uuid4()))),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_wrong_token_answers_401_and_keeps_nothing(locked: StoreServer, sender: SdkClient, make: Make) -> None:
    headers = {"Authorization": f"Bearer {make(locked, sender)}".strip()}
    span = a_span()
    spans = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}

    answers = [
        sender.http.post("/v1/traces", json=spans, headers=headers),
        sender.http.post("/v1/metrics", json={}, headers=headers),
        sender.http.post("/v4/logs/upload/", json={"body": "x"}, headers=headers),
        sender.http.post("/v4/objects/upload/", json={"body": "x"}, headers=headers),
        sender.http.get(f"/public/v1/traces/{span['traceId']}", headers=headers),
        sender.http.get(f"/public/v1/traces/{span['traceId']}/metrics", headers=headers),
        sender.http.get(f"/sessions?trace_id={span['traceId']}", headers=headers),
    ]

    assert [answer.status_code for answer in answers] == [401] * len(answers)
    with locked.client() as client:
        assert client.get("/v1/agl/spans", params={"trace_id": span["traceId"]}).json()["total"] == 0
        assert client.get("/v1/agl/statistics").json()["total_rollouts"] == 0


def test_wrong_token_is_refused_even_without_a_store_key(client: httpx.Client, sdk: SdkClient) -> None:
    span = a_span()
    spans = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}

    answer = client.post("/v1/traces", json=spans, headers={"Authorization": f"Bearer {sdk.token[:-4]}AAAA"})

    assert answer.status_code == 401
    assert client.get("/v1/agl/spans", params={"trace_id": span["traceId"]}).json()["total"] == 0


def test_upload_without_a_token_answers_401(client: httpx.Client) -> None:
    assert client.post("/v4/objects/upload/", json={"body": "x"}).status_code == 401


def test_token_is_refused_on_routes_that_need_the_key(sender: SdkClient) -> None:
    for path in ("/v1/agl/statistics", "/v1/agl/rollouts", "/metrics", "/openapi.json", "/sessions"):
        assert sender.http.get(path, headers=sender.headers).status_code == 401


def test_key_is_accepted_on_otlp_and_pages(locked: StoreServer, outside: httpx.Client) -> None:
    with locked.client() as client:
        assert client.post("/v1/traces", json={}).status_code == 200
    assert outside.get("/sessions", auth=("agl", KEY)).status_code == 200


def test_token_is_valid_after_a_restart(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--agentops") as server:
        with server.client() as client:
            token = SdkClient(client)
        server.kill()
        server.start()
        with server.client() as client:
            token.http = client
            token.send(a_span())


def test_servers_on_one_database_accept_each_others_tokens(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with (
        StoreServer(path, "--agentops") as one,
        StoreServer(tmp_path / "other.db", "--agentops", store=str(path)) as other,
        one.client() as client,
        other.client() as other_client,
    ):
        sdk = SdkClient(client)
        sdk.http = other_client
        sdk.send(a_span())


def test_store_without_agentops_has_none_of_its_routes(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert client.post("/v3/auth/token", json={"api_key": "any"}).status_code == 404

    assert not {path for path in paths if path.startswith(("/v3", "/v4", "/public", "/sessions"))}


def test_openapi_document_has_the_sdks_routes(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    assert paths.keys() >= {
        "/v3/auth/token",
        "/v4/logs/upload/",
        "/v4/objects/upload/",
        "/v4/{kind}/{upload_id}",
        "/public/v1/auth/access_token",
        "/public/v1/traces/{trace_id}",
        "/public/v1/traces/{trace_id}/metrics",
    }
