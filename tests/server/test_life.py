"""`agl store`: its start, its end, and the arguments that it refuses."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from pathlib import Path

import httpx
import pytest

from agentlightning.cli.serving import PACKAGES
from agentlightning.settings import without_secrets
from tests.common.environments import CHECKOUT
from tests.common.vllm import without_agl
from tests.server.process import AGL_STORE, StoreServer


def test_start_prints_the_address_and_answers(store: StoreServer) -> None:
    assert f"{without_secrets(store.store)} is served at {store.url} and asks for no key" in store.log.read_text()
    with store.client() as client:
        assert client.get("/healthz").json() == {"status": "ok"}


def refused(*arguments: str) -> str:
    done = subprocess.run([*AGL_STORE, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_public_host_without_a_key_is_refused(host: str) -> None:
    output = refused("--host", host)
    assert f"{host} can be reached from other machines" in output
    assert "--api-key" in output


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (["--backend", "memory"], "use --store agl-store.db"),
        (["--backend=mongo"], "use --store agl-store.db"),
        (["--mongo-uri", "mongodb://localhost"], "use --store agl-store.db"),
        (["--tracker", "prometheus", "console"], "/metrics"),
        (["--n-workers", "4"], "--port of its own"),
    ],
)
def test_options_of_agent_lightning_0_3_name_their_replacement(arguments: list[str], instead: str) -> None:
    output = refused(*arguments)
    assert instead in output
    assert "Agent Lightning 0.3" in output


@pytest.mark.parametrize("arguments", [["--port=65536"], ["--port=x"], ["--max-body-mb=0"], ["--log-level=loud"]])
def test_invalid_option_values_are_refused(arguments: list[str]) -> None:
    assert arguments[0].partition("=")[0] in refused(*arguments)


def test_port_in_use_is_reported(store: StoreServer, tmp_path: Path) -> None:
    port = store.url.rpartition(":")[2]
    assert refused("--port", port, "--store", str(tmp_path / "other.db")) == (
        f"agl store: cannot listen on 127.0.0.1:{port}: another program uses this port; choose another --port, "
        "or 0 for any free one\n"
    )
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "this machine does not have this address; choose another --host"),
        ("nowhere.invalid", "this host is not known here; choose another --host"),
    ],
)
def test_host_that_cannot_be_used_is_refused_with_what_to_do(host: str, reason: str, tmp_path: Path) -> None:
    output = refused("--host", host, "--insecure", "--port=0", "--store", str(tmp_path / "store.db"))
    assert output == f"agl store: cannot listen on {host}:0: {reason}\n"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("origin", "instead"),
    [
        ("foo", "write it like https://app.example.org or http://localhost:3000, or * for any"),
        ("localhost:3000", "write it like https://app.example.org or http://localhost:3000, or * for any"),
        ("https://", "write it like https://app.example.org or http://localhost:3000, or * for any"),
        ("http://[::1", "write it like https://app.example.org or http://localhost:3000, or * for any"),
        ("https://App.example.org/page", "write it as https://app.example.org"),
        ("http://localhost:80", "write it as http://localhost"),
        ("http://me@[::1]:3000", "write it as http://[::1]:3000"),
    ],
)
def test_cors_origin_that_no_browser_sends_is_refused_with_an_example(origin: str, instead: str) -> None:
    sentence, _ = refused("--cors-origin", origin).splitlines()
    assert sentence.startswith(f"agl store: argument --cors-origin: {origin!r} is not an origin")
    assert sentence.endswith(f"; {instead}")


def can_bind_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not can_bind_ipv6(), reason="this machine has no IPv6")
def test_all_addresses_of_ipv6_are_also_those_of_ipv4(tmp_path: Path) -> None:
    command = [*AGL_STORE, "--host=::", "--insecure", "--port=0", f"--store={tmp_path / 'store.db'}"]
    with subprocess.Popen(command, env=without_agl(os.environ), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        started = next(line for line in process.stderr if "is served at" in line)
        port = re.findall(r":([0-9]+) ", started)[-1]
        assert f"is served at http://{socket.gethostname()}:{port} and asks" in started
        for host in ("[::1]", "127.0.0.1"):
            assert httpx.get(f"http://{host}:{port}/healthz").status_code == 200
        process.kill()


def test_agentops_routes_come_with_the_variables_that_their_sdk_needs(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--agentops") as server:
        until(lambda: "AGENTOPS_APP_URL" in server.log.read_text())
        log = server.log.read_text()
    for name, value in {
        "AGENTOPS_API_KEY": "agl",
        "AGENTOPS_API_ENDPOINT": server.url,
        "AGENTOPS_EXPORTER_ENDPOINT": f"{server.url}/v1/traces",
        "AGENTOPS_APP_URL": server.url,
    }.items():
        assert f"export {name}={value}\n" in log


@pytest.mark.parametrize("level", ["info", "debug"])
def test_each_log_line_has_the_name_of_the_command(level: str, tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", f"--log-level={level}") as server, server.client() as client:
        client.get("/healthz")
        server.stop()
    lines = server.log.read_text().splitlines()
    assert [line for line in lines if not re.match(r"((DEBUG|INFO|WARNING) )?agl store: .", line)] == []
    assert lines[-1] == "agl store: stopped"
    assert any("GET /healthz" in line for line in lines) == (level == "debug")


def test_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be looked at as one" * 100)
    assert f"agl store: {path} is not a SQLite file" in refused("--store", str(path))


def test_sigterm_finishes_requests_and_exits(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        [rollout] = client.post("/v1/agl/queues/rollouts/enqueue", json={"rollouts": [{"input": 1}]}).json()
        server.stop()
        server.start()
        assert client.get(f"/v1/agl/rollouts/{rollout['rollout_id']}").json() == rollout


def test_sigterm_tells_waiting_clients_to_retry(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, ThreadPoolExecutor(1) as pool, server.client() as client:
        [rollout] = client.post("/v1/agl/queues/rollouts/enqueue", json={"rollouts": [{"input": 1}]}).json()
        body = {"rollout_ids": [rollout["rollout_id"]], "timeout": None}
        waiting = pool.submit(client.post, "/v1/agl/waits/rollouts", json=body)
        # The waiting request, and this one.
        until(lambda: "agl_store_requests_in_progress 2.0" in client.get("/metrics").text)
        server.stop()
        answer = waiting.result()
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json() == {"detail": "the store is being stopped"}


def test_writes_answered_during_shutdown_are_kept(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server:
        answered: list[str] = []

        def start_rollouts() -> None:
            with server.client() as client:
                # Ends with an error when the server is gone.
                while True:
                    answered.append(client.post("/v1/agl/rollouts", json={"input": 1}).json()["rollout_id"])

        with ThreadPoolExecutor(8) as pool:
            ends = [pool.submit(start_rollouts) for _ in range(8)]
            until(lambda: len(answered) > 100)
            server.stop()
            assert all(isinstance(each.exception(), httpx.TransportError) for each in ends)
        server.start()
        with server.client() as client:
            kept = {each["rollout_id"] for each in client.get("/v1/agl/rollouts").json()["items"]}
        assert set(answered) <= kept
        assert len(answered) == len(set(answered))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_listed_packages_are_those_of_the_extra_and_of_the_client() -> None:
    extra = [requirement for requirement in requires("agentlightning") or () if "extra == 'store'" in requirement]
    names = {re.split(r"[<>=!;]", requirement)[0] for requirement in extra}
    assert sorted(names | {"msgspec", "urllib3"}) == list(PACKAGES)


def test_missing_package_says_how_to_install_it(tmp_path: Path) -> None:
    # -S leaves only this package and the standard library.
    output = refused_by(sys.executable, "-S", "-m", "agentlightning", "store", "--store", str(tmp_path / "store.db"))
    assert f"{sys.executable} -m pip install fastapi" in output


def refused_by(*command: str) -> str:
    env = {**without_agl(os.environ), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr
