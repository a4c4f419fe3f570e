"""`agl doctor --url`: what it says of a server that runs, and of one that is none of ours."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from threading import Thread
from typing import Any

import pytest

from agentlightning import __version__, instrumentation
from tests.common.http_server import Quiet, serving
from tests.common.vllm import RemoteOpenAIServer, free_port
from tests.doctor.command import Said, doctor_elsewhere

PATCH_SETS = tuple(instrumentation.status())
KEY = "a-key"

STATUS: dict[str, Any] = {
    "agentlightning": "0.1.0",
    "vllm": "0.99.0",
    "python": "3.11.7",
    "pid": 4304,
    "api_servers": 1,
    "switches": {
        "AGL_INSTRUMENT": "on",
        "AGL_RETURN_TOKEN_IDS": "all",
        "AGL_LOGPROBS": "off",
        "AGL_RECORD_OFFLINE": "off",
        "AGL_CONTINUE": "off",
        "AGL_SAMPLING": "off",
        "AGL_MODEL_NAMES": "served",
    },
    "patches": {"chat": {"state": "applied", "reason": None}},
    "counters": {"failures": {}},
    "limits": [],
    "recording": None,
    "continuation": None,
    "sampling": None,
}
CONTINUATION: dict[str, Any] = {
    "results": {"continued": 7, "first call": 2, "no match": 0, "seam": 1},
    "calls": 9,
    "bytes": 12_000,
    "dropped": 3,
}
RECORDING: dict[str, Any] = {
    "store": "run.db",
    "generations": 12,
    "queue_bytes": 0,
    "lost": {"queue full": 0, "not built": 0, "refused": 0, "stopped": 0},
    "trouble": None,
}
FAILURES = {"attaching ids: KeyError": 3, "editing a stream: ValueError": 1}


def ask(url: str, *arguments: str, **variables: str) -> Said:
    return doctor_elsewhere("--url", url, *arguments, **variables)


@contextlib.contextmanager
def answering(body: bytes, status: int = 200, key: str | None = None) -> Iterator[str]:
    """A server that answers everything with this, where it is given the key; its address."""

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = key is None or self.headers["Authorization"] == f"Bearer {key}"
            found = self.path == "/v1/agl/status"
            self.send_response((status if found else 404) if allowed else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Handler) as url:
        yield url


@contextlib.contextmanager
def saying(said: bytes) -> Iterator[str]:
    """A server of some other protocol: it says this to whoever connects, and hangs up; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(said)

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def answering_status(**changes: Any) -> contextlib.AbstractContextManager[str]:
    return answering(json.dumps(STATUS | changes).encode())


def the_problem(said: Said) -> str:
    """Return the only problem in the output."""
    assert said.status == 1
    assert said.stderr == ""
    assert said.text.endswith("1 problem.")
    _, _, problem = said.text.partition(" problem server ")
    assert " -> " in problem, said.stdout
    return problem


def test_a_server_that_answers_with_ids_is_well(armed: RemoteOpenAIServer) -> None:
    said = ask(armed.url)

    assert said.status == 0, said.stdout
    assert said.text.startswith(f"agl doctor {__version__}: the server at {armed.url} ")
    assert f", agentlightning {__version__}, Python 3." in said.text
    assert f"; process {armed.process.pid} " in said.text
    assert "API servers" not in said.text
    assert "ok switches AGL_INSTRUMENT=on, AGL_RETURN_TOKEN_IDS=all" in said.text
    for patch_set in PATCH_SETS:
        # The scheduler is the engine core's, and a server has no offline engine.
        elsewhere = f"note {patch_set} pending: not imported in this process; others may have imported it"
        is_elsewhere = patch_set in ("scheduler", "offline engine", "offline calls")
        assert (elsewhere if is_elsewhere else f"ok {patch_set} applied") in said.text
    assert said.text.endswith("All is well.")


def test_json_has_the_status_of_the_server(armed: RemoteOpenAIServer) -> None:
    said = ask(armed.url, "--json")

    assert said.status == 0, said.stdout
    assert said.json.keys() == {"ok", "findings", "server", "carriers"}
    assert said.json["ok"] is True
    assert said.json["server"].keys() == STATUS.keys()
    assert said.json["server"]["pid"] == armed.process.pid
    assert tuple(said.json["server"]["patches"]) == PATCH_SETS


def test_server_without_agent_lightning_is_reported_as_not_instrumented(plain: RemoteOpenAIServer) -> None:
    said = the_problem(ask(plain.url))

    assert f"{plain.url}/v1/agl/status does not exist: this server is not instrumented" in said
    assert "-> set AGL_INSTRUMENT=1 in the environment of the server" in said


def test_one_of_several_api_servers_says_so(two_api_servers: RemoteOpenAIServer) -> None:
    said = ask(two_api_servers.url)

    assert said.status == 0, said.stdout
    assert ", one of 2 API servers (each answers for itself: ask again for another)" in said.text


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_address_may_be_written_in_many_ways(scheme: str, ending: str) -> None:
    with answering_status() as url:
        said = ask(f"{scheme}{url.removeprefix('http://')}{ending}")

    assert said.status == 0, said.stdout


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_an_address_where_nothing_listens_is_a_problem(arguments: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}"

    said = ask(url, *arguments)

    if arguments:
        assert (said.status, said.json["ok"], said.json["server"]) == (1, False, {})
    else:
        assert f"{url}/v1/agl/status does not answer: " in the_problem(said)
        assert "refused" in said.text


@pytest.mark.parametrize(
    "url", ["", "http://", "localhost:port", "gopher://localhost", "http://[::1", "http://no such/"]
)
def test_invalid_url_is_refused_with_a_sentence(url: str) -> None:
    assert " does not answer: " in the_problem(ask(url))


@pytest.mark.parametrize(
    "body",
    [
        b"<!doctype html><title>a router</title>",
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'{"status": "ok"}',
        *(
            json.dumps(STATUS | {key: value}).encode()
            for key in ("api_servers", "switches", "patches", "counters")
            for value in (None, [1], {"chat": 1})
            if (key, value) != ("switches", {"chat": 1})
        ),
    ],
)
def test_an_answer_about_something_else_is_a_problem(body: bytes) -> None:
    with answering(body) as url:
        said = the_problem(ask(url))

    assert f"{url}/v1/agl/status answers with something other than a status" in said
    assert "-> is this the address of a vLLM server" in said


@pytest.mark.parametrize(
    "said", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00\x01\x02", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_server_of_another_protocol_is_a_problem(said: bytes) -> None:
    with saying(said) as url:
        problem = the_problem(ask(url))

    assert f"{url}/v1/agl/status does not answer: " in problem


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_answers_with_an_error_is_a_problem(status: int) -> None:
    with answering(b"", status) as url:
        said = the_problem(ask(url))

    assert f"{url}/v1/agl/status answers with HTTP {status} -> see the server's log" in said


@pytest.mark.parametrize("key", [None, "", "another"])
def test_a_server_asked_without_its_key_is_a_problem(key: str | None) -> None:
    with answering(json.dumps(STATUS).encode(), key=KEY) as url:
        said = the_problem(ask(url, *([] if key is None else ["--api-key", key])))

    assert "needs the server's API key -> pass --api-key KEY, or set VLLM_API_KEY" in said


def test_a_server_asked_with_its_key_answers() -> None:
    with answering(json.dumps(STATUS).encode(), key=KEY) as url:
        assert ask(url, "--api-key", KEY).status == 0
        assert ask(url, VLLM_API_KEY=KEY).status == 0
        assert ask(url, "--api-key", KEY, VLLM_API_KEY="another").status == 0


def test_failures_while_serving_are_problems() -> None:
    with answering_status(counters={"failures": FAILURES}) as url:
        said, as_json = ask(url), ask(url, "--json")

    assert said.status == 1
    failures = "3 times an answer went out as vLLM made it, after an error of ours: attaching ids: KeyError"
    assert f"problem failures {failures} -> the server's log" in said.text
    assert said.text.endswith("2 problems.")
    assert as_json.json["server"]["counters"]["failures"] == FAILURES


def test_an_engine_that_does_not_give_all_ids_is_a_note() -> None:
    limit = "vLLM's V0 engine answers"
    with answering_status(limits=[limit]) as url:
        said = ask(url)

    assert said.status == 0
    assert f"note engine {limit}" in said.text


def test_a_server_that_records_says_where_and_how_much() -> None:
    with answering_status(recording=RECORDING) as url:
        said = ask(url)

    assert said.status == 0
    assert "ok store this API server has recorded 12 generations in run.db, 0 bytes wait for it" in said.text


def test_prompts_that_could_go_on_are_counted_by_result() -> None:
    with answering_status(continuation=CONTINUATION) as url:
        said = ask(url)

    assert said.status == 0
    counted = "7 continued, 2 first call, 1 seam; 9 calls kept in 12000 bytes, 3 dropped"
    assert f"ok continuation chat prompts of rollouts: {counted}" in said.text


def test_a_store_that_cannot_be_written_and_what_was_lost_are_problems() -> None:
    trouble = {
        "queue_bytes": 4096,
        "lost": {"queue full": 3, "not built": 0, "refused": 1, "stopped": 0},
        "trouble": "database is locked",
    }
    with answering_status(recording={**RECORDING, **trouble}) as url:
        said = ask(url)

    assert said.status == 1
    assert "has recorded 12 generations in run.db, 4096 bytes wait for it: database is locked" in said.text
    assert "generations lost: 3 (queue full), 1 (refused)" in said.text


def test_what_a_server_could_not_patch_is_a_problem() -> None:
    patches = {
        "chat": {"state": "failed", "reason": "no OpenAIServingChat"},
        "completions": {"state": "pending", "reason": None},
        "chat response": {"state": "not for this release", "reason": "has one of its own"},
    }
    with answering_status(patches=patches) as url:
        said = ask(url)

    assert said.status == 1
    assert "problem chat failed: no OpenAIServingChat -> use a release" in said.text
    assert "note completions pending" in said.text
    assert "note chat response not for this release: has one of its own" in said.text
    assert said.text.endswith("1 problem.")


def test_a_server_of_an_unknown_release_says_which_patch_sets_found_what_they_patch() -> None:
    patches = {
        "chat": {"state": "failed", "reason": "no OpenAIServingChat"},
        "completions": {"state": "applied", "reason": None},
    }
    with answering_status(vllm="0.99.0", patches=patches) as url:
        said = ask(url)

    assert "note release 0.99.0 is newer than any release that this agentlightning was tested with" in said.text
    assert "1 of 2 patch sets have found what they patch in it; not chat (failed)" in said.text


def test_a_server_that_was_told_to_answer_without_ids_is_a_note() -> None:
    with answering_status(switches={"AGL_INSTRUMENT": "on", "AGL_RETURN_TOKEN_IDS": "none"}) as url:
        said = ask(url)

    assert said.status == 0, said.stdout
    assert "note switches AGL_INSTRUMENT=on, AGL_RETURN_TOKEN_IDS=none" in said.text


@pytest.mark.parametrize(
    "changes", [{"switches": {}}, {"patches": {}}, {"patches": {"a" * 90: STATUS["patches"]["chat"]}}]
)
def test_a_status_of_another_version_is_shown_as_well_as_it_goes(changes: dict[str, Any]) -> None:
    with answering_status(**changes) as url:
        said = ask(url)

    assert said.status == 0, said.stdout + said.stderr
