"""Requests that pages of other origins make a browser send: they change and reveal nothing."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from agentlightning.errors import StoreRefused
from agentlightning.store import open_store
from tests.common.vllm import without_agl
from tests.server.process import AGL_STORE, SECONDS, StoreServer

KEY = "correct-horse"
PAGE = "https://pages.example"
OTHER = "https://other.example"
DEQUEUE = "/v1/agl/queues/rollouts/dequeue"
KEYS = {"without a key": None, "with one": KEY}


def waiting(client: httpx.Client) -> int:
    """Return the number of queued rollouts."""
    return client.get("/v1/agl/rollouts?status_in=queuing").json()["total"]


@pytest.fixture(scope="module", params=KEYS.values(), ids=list(KEYS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    path = tmp_path_factory.mktemp("origins") / "store.db"
    with StoreServer(path, f"--cors-origin={PAGE}", "--agentops", key=request.param) as server:
        yield server


@pytest.fixture
def client(server: StoreServer) -> Iterator[httpx.Client]:
    """A client with the key, if there is one, and a rollout in the queue."""
    with server.client() as client:
        client.post("/v1/agl/queues/rollouts/enqueue", json={"rollouts": [{"input": 1}]}).raise_for_status()
        yield client


FOREIGN = {
    "of another site": {"Sec-Fetch-Site": "cross-site", "Origin": OTHER},
    "of another port": {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:8888"},
    "of another site that is not named": {"Sec-Fetch-Site": "cross-site"},
    "of an older browser": {"Origin": OTHER},
    "of an older browser and another port": {"Origin": "http://127.0.0.1:1"},
    "of no origin": {"Origin": "null"},
    "of a name that begins like an allowed one": {"Origin": f"{PAGE}.other.example"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
def test_change_from_another_origin_answers_403(client: httpx.Client, headers: dict[str, str]) -> None:
    before = waiting(client)

    for path in (DEQUEUE, "/v1/agl/rollouts/ro-1/attempts", "/v3/auth/token", "/v1/traces", "/nothing"):
        answer = client.post(path, headers=headers)
        assert answer.status_code == 403, path
        assert answer.json()["detail"].startswith("pages of "), path
        assert "--cors-origin" in answer.json()["detail"]
    for method in ("PUT", "PATCH", "DELETE"):
        assert client.request(method, "/v1/agl/rollouts", headers=headers).status_code == 403
    assert waiting(client) == before


def test_change_from_an_allowed_origin_is_made(client: httpx.Client) -> None:
    for headers in ({"Origin": PAGE}, {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}):
        answer = client.post(DEQUEUE, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE


def test_preflight_of_an_allowed_origin_is_answered(client: httpx.Client) -> None:
    asks = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site", "Access-Control-Request-Method": "POST"}
    assert client.options(DEQUEUE, headers=asks).status_code == 200


def test_change_from_its_own_pages_is_made(server: StoreServer, client: httpx.Client) -> None:
    for headers in (
        {"Origin": server.url},
        {"Origin": server.url, "Sec-Fetch-Site": "same-origin"},
        # Behind a proxy that terminates TLS.
        {"Origin": "https://store.example", "Sec-Fetch-Site": "same-origin"},
    ):
        assert client.post(DEQUEUE, headers=headers).status_code == 200


def test_change_without_browser_headers_is_made(client: httpx.Client) -> None:
    assert client.post(DEQUEUE).status_code == 200


def test_link_from_another_site_opens_the_page(client: httpx.Client) -> None:
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_any_origin_still_needs_the_key_from_the_page(tmp_path: Path) -> None:
    headers = {"Origin": OTHER, "Sec-Fetch-Site": "cross-site"}
    with StoreServer(tmp_path / "store.db", "--cors-origin=*", key=KEY) as server:
        by_the_browser = httpx.post(server.url + DEQUEUE, headers=headers, auth=("agl", KEY))
        by_the_page = httpx.post(server.url + DEQUEUE, headers={**headers, "Authorization": f"Bearer {KEY}"})

    assert (by_the_browser.status_code, by_the_page.status_code) == (403, 200)


def test_any_origin_without_a_key_may_make_changes(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--cors-origin=*") as server:
        headers = {"Origin": OTHER, "Sec-Fetch-Site": "cross-site"}
        assert httpx.post(server.url + DEQUEUE, headers=headers).status_code == 200


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with StoreServer(tmp_path_factory.mktemp("keyless") / "store.db", "--agentops") as server:
        yield server


REBOUND = ("other.example", "other.example:{port}", "127.0.0.1.other.example", "localhost.other.example", "10.0.0.1")
OWN = ("localhost", "LOCALHOST:{port}", "127.0.0.1", "127.0.0.1:{port}", "127.1.2.3:80", "[::1]", "[::1]:{port}")


def called(host: str, server: StoreServer) -> dict[str, str]:
    """Make the headers of a browser that shows a page of this host."""
    host = host.format(port=urlsplit(server.url).port)
    return {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}


@pytest.mark.parametrize("host", REBOUND)
def test_rebound_host_name_answers_421(keyless: StoreServer, host: str) -> None:
    headers = called(host, keyless)
    with keyless.client() as client:
        for method, path in (("GET", "/"), ("GET", "/v1/agl/rollouts"), ("GET", "/sessions"), ("POST", DEQUEUE)):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 421, path
            assert headers["Host"] in answer.json()["detail"]
            assert "--api-key" in answer.json()["detail"]


@pytest.mark.parametrize("host", OWN)
def test_loopback_host_names_are_accepted(keyless: StoreServer, host: str) -> None:
    with keyless.client() as client:
        for method, path in (("GET", "/"), ("GET", "/sessions"), ("POST", DEQUEUE)):
            assert client.request(method, path, headers=called(host, keyless)).status_code == 200, path


def test_any_host_name_is_accepted_with_a_key(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", key=KEY) as server, server.client() as client:
        headers = called("store.example", server)
        assert client.get("/v1/agl/rollouts", headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/v1/agl/rollouts", headers=headers).status_code == 401


def test_any_host_name_is_accepted_with_insecure(tmp_path: Path) -> None:
    command = [*AGL_STORE, "--host=0.0.0.0", "--insecure", "--port=0", f"--store={tmp_path / 'store.db'}"]
    with subprocess.Popen(command, env=without_agl(os.environ), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        started = next(line for line in process.stderr if "is served at" in line)
        url = f"http://127.0.0.1:{re.findall(r':([0-9]+) ', started)[-1]}"
        # The line is printed when it listens; it answers a moment later.
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=SECONDS) as client:
            assert client.get(url, headers={"Host": "store.example"}).status_code == 200
        process.kill()


def test_recording_by_another_host_name_gives_the_reason(keyless: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    find = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *about: find("127.0.0.1", *about))

    with pytest.raises(StoreRefused, match=r"store\.example:\d+ is not to be asked by this name: .*--api-key"):
        open_store(keyless.url.replace("127.0.0.1", "store.example"))
