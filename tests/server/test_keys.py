"""The key of a store: required on every route, accepted in several forms, and never revealed."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx
import pytest

from tests.server.process import SECONDS, StoreServer

KEY = "correct-horse:battery/staple@4747"
PAGE = "https://pages.example"
OPEN = ("/healthz", "/readyz")
METHODS = ("get", "post", "put", "patch", "delete")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    arguments = ("--log-level=debug", f"--cors-origin={PAGE}")
    with StoreServer(tmp_path_factory.mktemp("locked") / "store.db", *arguments, key=KEY) as server:
        yield server


@pytest.fixture
def outside(locked: StoreServer) -> Iterator[httpx.Client]:
    """A client without the key."""
    with httpx.Client(base_url=locked.url, timeout=SECONDS) as client:
        yield client


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def routes(server: StoreServer) -> list[tuple[str, str]]:
    """Return method and path of all routes, from the OpenAPI document."""
    with server.client() as client:
        document = client.get("/openapi.json").json()
    return [(method, path) for path, about in document["paths"].items() for method in METHODS if method in about]


def totals(server: StoreServer) -> dict[str, int]:
    with server.client() as client:
        found = client.get("/v1/agl/statistics").json()
    return {name: number for name, number in found.items() if name.startswith("total_")}


WRONG = {
    "none": None,
    "another": "Bearer wrong",
    "an empty one": "",
    "the scheme alone": "Bearer",
    "a prefix": f"Bearer {KEY[:-1]}",
    "more than it": f"Bearer {KEY}x",
    "another case": f"Bearer {KEY.upper()}",
    "no scheme": KEY,
    "another scheme": f"Digest {KEY}",
    "of GitHub": f"token {KEY}",
    "Basic, as it is": f"Basic {KEY}",
    "Basic, empty": basic("", ""),
    "Basic, wrong": basic("agl", "wrong"),
    "Basic, a prefix": basic(KEY[:-1], KEY[:-1]),
    "Basic, half of it": basic("correct-horse", ""),
}


@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG)
def test_every_route_without_the_key_answers_401(
    header: str | None, locked: StoreServer, outside: httpx.Client
) -> None:
    found = routes(locked)
    assert len(found) > 30
    before = totals(locked)
    headers = {} if header is None else {"Authorization": header}
    for method, path in [*found, ("get", "/openapi.json"), ("get", "/nothing"), ("options", "/v1/agl/rollouts")]:
        path = path.replace("{", "").replace("}", "")
        answer = outside.request(method, path, headers=headers, json=None if method == "get" else {"input": 1})
        if path in OPEN:
            assert answer.json() == {"status": "ok"}
            continue
        assert answer.status_code == 401, f"{method} {path}"
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert "the key of this store is missing or wrong" in answer.json()["detail"]
        assert KEY not in answer.text
    assert totals(locked) == before


def test_public_route_in_another_spelling_needs_the_key(outside: httpx.Client) -> None:
    for path in ("/healthz/", "//healthz", "/healthz/../metrics", "/healthz%2F..%2Fmetrics", "/HEALTHZ", "/healthz;x"):
        assert outside.get(path).status_code == 401, path


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/v1/agl/rollouts", "/v1/agl/statistics"])
@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer   {KEY}", basic("agl", KEY), basic("", KEY)])
def test_key_is_accepted_as_bearer_and_as_password(path: str, header: str, outside: httpx.Client) -> None:
    assert outside.get(path, headers={"Authorization": header}).status_code == 200


def test_key_in_the_url_is_accepted_from_httpx_and_aiohttp(locked: StoreServer) -> None:
    for user in (f"agl:{quote(KEY, safe='')}", f":{quote(KEY, safe='')}"):
        url = locked.url.replace("://", f"://{user}@") + "/v1/agl/statistics"
        assert httpx.get(url).status_code == 200
        assert asyncio.run(_status(url)) == 200
    assert asyncio.run(_status(f"{locked.url}/v1/agl/statistics")) == 401


async def _status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status


def test_key_without_a_colon_is_accepted_as_user(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", key="s3cret") as server:
        for header in (basic("s3cret", ""), basic("s3cret", "x"), basic("x", "s3cret")):
            answer = httpx.get(f"{server.url}/metrics", headers={"Authorization": header})
            assert answer.status_code == 200
        assert httpx.get(server.url.replace("://", "://s3cret@") + "/metrics").status_code == 200


def test_key_may_be_any_text(tmp_path: Path) -> None:
    key = "schlüssel"
    with StoreServer(tmp_path / "store.db", key=key) as server:
        for encoding in ("utf-8", "latin-1"):
            headers = {b"Authorization": b"Bearer " + key.encode(encoding)}
            assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 200
        url = server.url.replace("://", f"://agl:{quote(key)}@") + "/metrics"
        assert httpx.get(url).status_code == 200
        # aiohttp sends Latin-1, the original encoding of Basic.
        assert asyncio.run(_status(url)) == 200
        assert httpx.get(f"{server.url}/metrics", headers={"Authorization": "Bearer schlussel"}).status_code == 401
    with StoreServer(tmp_path / "other.db", key="🔑 of 金") as server:
        headers = {b"Authorization": "Bearer 🔑 of 金".encode()}
        assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 200
        url = server.url.replace("://", f"://agl:{quote('🔑 of 金')}@") + "/metrics"
        assert httpx.get(url).status_code == 200


def test_key_is_never_printed(locked: StoreServer, outside: httpx.Client) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answers = [
        outside.get("/v1/agl/rollouts?limit=x", headers=headers),
        outside.post("/v1/agl/spans", content=b"{", headers=headers),
        outside.delete("/metrics", headers=headers),
        outside.get("/metrics", headers=headers),
        outside.get("/openapi.json", headers=headers),
        outside.get("/metrics", headers={"Authorization": f"Bearer {KEY}x"}),
    ]
    log = locked.log.read_text()
    # uvicorn's access log, whose version is locked.
    assert "GET /metrics" in log, "the log is not at level debug"
    encoded = base64.b64encode(f"agl:{KEY}".encode()).decode()
    for text in (log, *(answer.text for answer in answers), *(str(answer.headers) for answer in answers)):
        for secret in (KEY, quote(KEY, safe=""), encoded):
            assert secret not in text


def preflight(client: httpx.Client, origin: str, path: str = "/v1/agl/rollouts") -> httpx.Response:
    headers = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return client.options(path, headers={"Origin": origin, **headers})


def cors(answer: httpx.Response) -> dict[str, Any]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-allow-o")}


def test_allowed_origin_may_read_with_the_key(locked: StoreServer, outside: httpx.Client) -> None:
    allowed = preflight(outside, PAGE)
    assert allowed.status_code == 200
    assert cors(allowed) == {"access-control-allow-origin": PAGE}
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    # With CORS headers, so that the page can read the reason.
    refused = outside.get("/v1/agl/rollouts", headers={"Origin": PAGE})
    assert (refused.status_code, cors(refused)) == (401, {"access-control-allow-origin": PAGE})
    with locked.client() as client:
        answer = client.get("/v1/agl/rollouts", headers={"Origin": PAGE})
    assert (answer.status_code, cors(answer)) == (200, {"access-control-allow-origin": PAGE})


@pytest.mark.parametrize("origin", ["https://other.example", f"{PAGE}.other.example", PAGE.replace("s:", ":"), "null"])
def test_other_origins_may_not_read(origin: str, locked: StoreServer, outside: httpx.Client) -> None:
    refused = preflight(outside, origin)
    assert refused.is_client_error
    assert not cors(refused)
    with locked.client() as client:
        assert not cors(client.get("/v1/agl/rollouts", headers={"Origin": origin}))


def test_any_origin_may_not_use_the_browsers_key(tmp_path: Path) -> None:
    """A browser that knows the key would otherwise send it for any page."""
    with StoreServer(tmp_path / "store.db", "--cors-origin=*", key=KEY) as server, server.client() as client:
        answer = client.get("/v1/agl/rollouts", headers={"Origin": "https://other.example"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


def test_public_route_refuses_large_bodies(outside: httpx.Client) -> None:
    answer = outside.post("/healthz", content=b"x" * (1 << 17))
    assert (answer.status_code, answer.json()) == (413, {"detail": "the body is larger than 64 KiB"})


def test_readyz_without_a_key_hides_the_store_path(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", key=KEY) as server, httpx.Client(base_url=server.url) as outside:
        server.path.rename(tmp_path / "away.db")
        answer = outside.get("/readyz")
        assert (answer.status_code, answer.json()) == (
            503,
            {"detail": "the store cannot be used now: its log says why"},
        )
        assert str(server.path) in server.log.read_text().rpartition("cannot be")[0]


def test_store_without_allowed_origins_sends_no_cors_headers(client: httpx.Client) -> None:
    assert preflight(client, PAGE).status_code == 405
    assert not cors(client.get("/v1/agl/rollouts", headers={"Origin": PAGE}))


def test_key_option_overrides_the_environment(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--api-key=of-the-line", key="of-the-environment") as server:
        url = f"{server.url}/metrics"
        assert httpx.get(url, headers={"Authorization": "Bearer of-the-environment"}).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer of-the-line"}).status_code == 200
        assert "of-the" not in server.log.read_text()
