"""Tests of a store over HTTP: failures that only a network has. `test_stores.py` has what all stores share."""

from __future__ import annotations

import json
import math
import random
import socketserver
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3

from agentlightning.errors import InvalidRecord, RolloutUnderWay, StoreError, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation, Loss
from agentlightning.recorder import Recorder
from agentlightning.rollout_records import Pruned
from agentlightning.store import Store, http_client, http_generations, open_database, open_store, wire
from tests.common.generations import FULL, generation
from tests.server.process import StoreServer
from tests.store.conftest import emptied
from tests.store.test_stores import ids

KILLS = 20
FEW_KILLS = 2
CLIENTS = 4
BATCH = 5


@pytest.fixture
def url(server: StoreServer) -> str:
    """Return the URL of an empty store."""
    return emptied(server)


class Between(ThreadingHTTPServer):
    """A proxy between a client and its server, or another server in its place.

    Attributes:
        connections: number of connections so far.
        answered: answers in the place of the server; None to forward requests.
    """

    daemon_threads = True

    def __init__(self, server: StoreServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.there = server
        self.connections = 0
        self.answered: Callable[[_Handler, bytes], None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.answered is not None:
            self.server.answered(self, body)
            return
        status, headers, answer = self.forwarded(body)
        self.answer(status, answer, **headers)

    def forwarded(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return the answer of the server behind the proxy."""
        host, port = self.server.there.url.removeprefix("http://").split(":")
        with closing(HTTPConnection(host, int(port))) as connection:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            headers = {"Content-Type": response.headers["Content-Type"]}
            for name in ("Retry-After", "X-AGL-Error"):
                if name in response.headers:
                    headers[name] = response.headers[name]
            return response.status, headers, response.read()

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def between(server: StoreServer, url: str) -> Iterator[Between]:
    with Between(server) as between:
        thread = threading.Thread(target=between.serve_forever, args=(0.01,))
        thread.start()
        yield between
        between.shutdown()
        thread.join()


@contextmanager
def answers(between: Between, answer: Callable[[_Handler, bytes], None]) -> Iterator[None]:
    between.answered = answer
    yield
    between.answered = None


def test_add_of_more_bytes_than_a_message_holds_is_split(store: Store) -> None:
    kept = [generation(number, prompt=500_000) for number in range(20)]

    assert store.add(kept) == 20

    assert [*store.generations()] == kept


def test_add_of_an_oversized_generation_names_it_and_the_option(store: Store) -> None:
    kept, large = generation(1), generation(2, prompt=6_000_000)

    reason = rf"^{large.id}: the body is larger than 16 MiB \(agl store --max-body-mb\)"
    with pytest.raises(InvalidRecord, match=reason):
        store.add([large, kept])

    assert [*store.generations()] == [kept]


def test_add_that_is_refused_as_a_whole_names_every_generation(between: Between) -> None:
    def refuse(handler: _Handler, body: bytes) -> None:
        handler.answer(422, b'{"detail": "the body is of another version"}', **{"X-AGL-Error": "1"})

    sent = [generation(number) for number in range(3)]
    with open_store(between.url) as store, answers(between, refuse), pytest.raises(InvalidRecord) as refused:
        store.add(sent)

    assert refused.value.reasons == dict.fromkeys((each.id for each in sent), "the body is of another version")


class _Slow(socketserver.StreamRequestHandler):
    """A healthy server that looks at a body late, or never."""

    server: Any

    def handle(self) -> None:
        while (line := self.rfile.readline()) != b"":
            length = 0
            while (header := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = header.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            if line.startswith(b"GET"):
                self._answer(b"200 OK", b'{"status": "ok"}')
            elif self.server.refuses:
                # Bytes that were not read make the kernel reset the connection.
                self._answer(b"413 Too Large", b"")
                return
            else:
                time.sleep(0.5)
                self.rfile.read(length)
                self._answer(b"201 Created", b'{"new": 1, "refused": []}')

    def _answer(self, status: bytes, body: bytes) -> None:
        self.wfile.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))


@contextmanager
def slow_server(*, refuses: bool) -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Slow) as slow:
        slow.daemon_threads = True
        slow.refuses = refuses  # type: ignore[attr-defined]
        thread = threading.Thread(target=slow.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{slow.server_address[1]}"
        slow.shutdown()
        thread.join()


def test_a_refusal_that_comes_before_the_body_is_sent_is_read() -> None:
    sent = generation(1, prompt=4_000_000)
    with slow_server(refuses=True) as url, open_store(url) as store, pytest.raises(InvalidRecord) as refused:
        store.add([sent])

    assert list(refused.value.reasons) == [sent.id]


def test_a_large_body_may_take_longer_than_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "SECONDS_TO_CONNECT", 0.2)

    with slow_server(refuses=False) as url, open_store(url) as store:
        assert store.add([generation(1, prompt=4_000_000)]) == 1


def test_add_of_more_generations_than_a_message_holds_is_split(store: Store) -> None:
    kept = [generation(number, prompt=1, output=1) for number in range(10_001)]

    assert store.add(kept) == len(kept)

    assert store.tally()["finished"] == len(kept)


def test_requests_reuse_one_connection(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "SECONDS_KEPT", math.inf)
    with open_store(between.url) as store:
        for number in range(50):
            store.add([generation(number)])
        assert len(ids(store)) == 50
        with pytest.raises(InvalidRecord, match="UUID"):
            store.add([generation(1, id="1")])
        assert store.tally()["finished"] == 50

    assert between.connections == 1


def test_idle_connection_is_replaced_before_the_server_closes_it(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "SECONDS_KEPT", -1.0)
    with open_store(between.url) as store:
        before = between.connections
        assert [store.add([generation(number)]) for number in range(5)] == [1] * 5

    assert between.connections == before + 5


def test_connection_that_is_made_before_the_request_is_made_once(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As urllib3 makes those over TLS.
    monkeypatch.setattr(urllib3.HTTPConnectionPool, "_validate_conn", lambda _, made: made.is_closed and made.connect())

    with open_store(between.url) as store:
        assert store.tally()["finished"] == 0

    assert between.connections == 1


def test_connection_of_an_answer_that_took_long_is_kept(between: Between, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def answer_late(handler: _Handler, body: bytes) -> None:
        nonlocal now
        now += 10 * http_client.SECONDS_KEPT
        status, headers, answer = handler.forwarded(body)
        handler.answer(status, answer, **headers)

    monkeypatch.setattr(http_client, "time", SimpleNamespace(monotonic=lambda: now))
    with answers(between, answer_late), open_store(between.url) as store:
        assert [store.add([generation(number)]) for number in range(5)] == [1] * 5

    assert between.connections == 1


def test_a_server_that_does_not_answer_is_waited_for_as_long_as_its_reader_says(between: Between) -> None:
    given_up = threading.Event()

    def answer_late(handler: _Handler, body: bytes) -> None:
        # Whoever waits for half a minute gets it.
        given_up.wait(20)
        status, headers, answer = handler.forwarded(body)
        with suppress(OSError):
            handler.answer(status, answer, **headers)

    with open_store(between.url, seconds=1.0) as store:
        with answers(between, answer_late), pytest.raises(StoreUnavailable, match="timed out"):
            store.tally()
        given_up.set()
        assert store.tally()["finished"] == 0


@pytest.mark.parametrize("kind", [RolloutUnderWay, StoreRefused, StoreUnavailable])
def test_prune_that_fails_midway_raises_the_error_that_a_file_does(between: Between, kind: type[StoreError]) -> None:
    def fail(handler: _Handler, _: bytes) -> None:
        told = [asdict(Pruned(1)), {"detail": "it runs again", "error": kind.__name__}]
        handler.answer(200, b"".join(json.dumps(each).encode() + b"\n" for each in told))

    with open_store(between.url) as store:
        steps = store.prune(status_in=["failed"])
        with answers(between, fail):
            assert next(steps) == Pruned(1)
            with pytest.raises(kind, match=r"it runs again$"):
                next(steps)


def test_connection_closed_by_the_server_is_replaced(between: Between) -> None:
    def hang_up(handler: _Handler, body: bytes) -> None:
        status, headers, answer = handler.forwarded(body)
        handler.answer(status, answer, **headers)
        # Without a Connection header that announces it.
        handler.close_connection = True

    with answers(between, hang_up), open_store(between.url) as store:
        assert [store.add([generation(number)]) for number in range(5)] == [1] * 5

    assert between.connections == 6


def test_batch_repeated_after_a_lost_answer_is_stored_once(between: Between) -> None:
    kept = [generation(number) for number in range(10)]

    def lose(handler: _Handler, body: bytes) -> None:
        handler.forwarded(body)
        handler.close_connection = True

    with open_store(between.url) as store:
        with answers(between, lose), pytest.raises(StoreUnavailable, match="cannot be reached"):
            store.add(kept)
        assert store.add(kept) == 0
        assert [*store.generations()] == kept


def test_truncated_answer_is_an_error(between: Between) -> None:
    kept = [generation(number) for number in range(10)]

    def cut(handler: _Handler, body: bytes) -> None:
        status, _, answer = handler.forwarded(body)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer[:-1])
        handler.close_connection = True

    with open_store(between.url) as store:
        with answers(between, cut):
            for ask in (lambda: store.add(kept), lambda: ids(store), store.tally, lambda: [*store.losses()]):
                with pytest.raises(StoreUnavailable, match="cannot be reached"):
                    ask()
        assert [*store.generations()] == kept


@pytest.mark.parametrize(
    ("status", "headers", "retry_after"),
    [
        (400, {}, None),
        (502, {}, None),
        (503, {"Retry-After": "7"}, 7.0),
        (429, {"Retry-After": "1"}, 1.0),
        (504, {"Retry-After": "100000"}, 60.0),
        (500, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, None),
    ],
)
def test_proxy_error_is_temporary_and_gives_retry_after(
    between: Between, status: int, headers: dict[str, str], retry_after: float | None
) -> None:
    def away(handler: _Handler, _: bytes) -> None:
        handler.answer(status, b"<html>Bad Gateway</html>", **{"Content-Type": "text/html"}, **headers)

    with open_store(between.url) as store:
        with answers(between, away), pytest.raises(StoreUnavailable, match=f"cannot be used now: {status} ") as told:
            store.add([generation(1)])
        assert told.value.retry_after == retry_after
        assert store.add([generation(1)]) == 1


GATEWAY = b'{"detail": "no upstream"}'
"""Error of a gateway that was made with FastAPI: it has the format of the store's own errors."""


def loss(count: int) -> Loss:
    return Loss(count=count, reason="queue full", first_at=1, last_at=1, host="host", pid=1)


@pytest.mark.parametrize("status", [400, 422])
def test_gateway_error_in_the_stores_format_is_temporary(between: Between, status: int) -> None:
    with open_store(between.url) as store:
        with answers(between, lambda handler, _: handler.answer(status, GATEWAY)):
            for ask in (
                lambda: store.add([generation(1), generation(2)]),
                lambda: store.add([generation(1)]),
                lambda: store.add_losses([loss(1)]),
                store.tally,
            ):
                with pytest.raises(StoreUnavailable, match="cannot be used now: no upstream"):
                    ask()
        assert store.add([generation(1), generation(2)]) == 2


def test_refusal_of_the_store_passes_through_a_proxy(between: Between) -> None:
    with open_store(between.url) as store, pytest.raises(InvalidRecord, match="cannot keep a value"):
        store.add_losses([loss(2**63)])


def test_gateway_without_its_store_loses_no_generation(between: Between, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[str] = []

    def no_upstream(handler: _Handler, body: bytes) -> None:
        if handler.command == "GET":
            status, headers, answer = handler.forwarded(body)
            handler.answer(status, answer, **headers)
            return
        asked.append(handler.path)
        handler.answer(400, GATEWAY)

    generations = [generation(number) for number in range(20)]
    recorder = Recorder(between.url, 1 << 30)
    with answers(between, no_upstream):
        for each in generations:
            recorder.record(lambda each=each: each, 1_000)
        deadline = time.monotonic() + 60
        while len(asked) < 3:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)
    recorder.close()

    assert recorder.counters().generations == len(generations)
    assert not any(recorder.counters().lost.values())
    assert "cannot be used now: no upstream" in caplog.text
    with open_store(between.url) as store:
        assert ids(store) == [each.id for each in generations]


@pytest.mark.parametrize("body", [b"<html>Request Entity Too Large</html>", b'{"detail": "too large"}'])
def test_proxy_with_a_body_limit_gets_parts_and_refuses_only_the_oversized(between: Between, body: bytes) -> None:
    def narrow(handler: _Handler, sent: bytes) -> None:
        if len(sent) > 100_000:
            handler.answer(413, body, **{"Content-Type": "text/html"})
            return
        status, headers, answer = handler.forwarded(sent)
        handler.answer(status, answer, **headers)

    small, large = [generation(number, prompt=5_000) for number in range(20)], generation(20, prompt=50_000)
    with open_store(between.url) as store:
        with (
            answers(between, narrow),
            pytest.raises(
                InvalidRecord, match=rf"^{large.id}: a proxy before http://127.* does not accept such a large body: "
            ),
        ):
            store.add([*small[:7], large, *small[7:]])
        assert [*store.generations()] == small


@pytest.mark.parametrize("whole", [True, False], ids=["after a line", "within a line"])
def test_truncated_lines_are_an_error(between: Between, whole: bool) -> None:
    """A server that is killed while it sends: the lines that arrived are valid, but not all."""

    def cut(handler: _Handler, body: bytes) -> None:
        _, _, answer = handler.forwarded(body)
        part = answer[: answer.index(b"\n") + 1] if whole else answer[:-1]
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.close_connection = True

    with open_store(between.url) as store:
        store.add([generation(number) for number in range(10)])
        with answers(between, cut), pytest.raises(StoreUnavailable, match="cannot be reached"):
            list(store.triplets())
        assert len(list(store.triplets())) == 10


def test_answer_of_another_server_is_an_error(between: Between) -> None:
    def welcome(handler: _Handler, _: bytes) -> None:
        handler.answer(200, b"<html>Log in first</html>", **{"Content-Type": "text/html"})

    with open_store(between.url) as store, answers(between, welcome):
        for ask in (
            lambda: store.add([generation(1)]),
            lambda: ids(store),
            store.tally,
            lambda: [*store.losses()],
            lambda: [*store.triplets()],
        ):
            with pytest.raises(StoreUnavailable, match="does not answer as an agl store does"):
                ask()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b"<html>Welcome</html>", "is not an agl store"),
        (200, b'{"status": "fine"}', "is not an agl store"),
        (
            404,
            b"<html>Not found</html>",
            "does not accept this version's requests .404 Not Found.: give the URL of an agl",
        ),
        (405, b"", "does not accept this version's requests"),
        (403, b"", "does not accept this key: set AGL_STORE_KEY"),
        (302, b"", "redirects to another URL: give the URL of the store itself"),
    ],
)
def test_open_of_another_server_gives_the_reason(between: Between, status: int, body: bytes, reason: str) -> None:
    with answers(between, lambda handler, _: handler.answer(status, body)), pytest.raises(StoreRefused, match=reason):
        open_store(between.url)


def test_store_below_a_path_is_found(between: Between) -> None:
    def below(handler: _Handler, body: bytes) -> None:
        assert handler.path.startswith("/team/store/v1/agl/")
        handler.path = handler.path.removeprefix("/team/store")
        status, headers, answer = handler.forwarded(body)
        handler.answer(status, answer, **headers)

    with answers(between, below), open_store(f"{between.url}/team/store/") as store:
        assert store.add([FULL]) == 1
        assert [*store.generations()] == [FULL]


def test_open_of_an_unreachable_store_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable, match=r"^http://\*\*\*@127\.0\.0\.1:1 cannot be reached: "):
        open_store("http://agl:s3cret@127.0.0.1:1")


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///path",
        "http://agl:s3cret@",
        "http://agl:s3cret@host:port",
        "http://agl:s3/cret@host",
        "http://agl:s3?cret@host",
        "http://agl:s3#cret@host",
        "http://agl:s3cret@[host",
        "http://agl:s3cret@..",
    ],
)
def test_open_of_an_invalid_url_is_refused_and_hides_the_key(url: str) -> None:
    with pytest.raises(StoreRefused, match="is not the URL of an agl store: write") as refused:
        open_store(url)

    assert "s3" not in str(refused.value)


def test_open_database_refuses_the_url_of_a_store() -> None:
    with pytest.raises(StoreRefused, match=r"^http://\*\*\*@host is already an agl store") as refused:
        open_database("http://agl:s3cret@host")

    assert "s3cret" not in str(refused.value)


KEY = "s3cret/k@y?#%:ü"
IN_URL = "s3cret%2Fk%40y%3F%23%25%3A%C3%BC"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with StoreServer(tmp_path_factory.mktemp("locked") / "store.db", key=KEY) as server:
        yield server


@pytest.mark.parametrize("user", [f"agl:{IN_URL}", IN_URL, f":{IN_URL}", f"{IN_URL}:"])
def test_key_in_the_url_takes_precedence(locked: StoreServer, monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    monkeypatch.setenv("AGL_STORE_KEY", "another")

    with open_store(locked.url.replace("//", f"//{user}@")) as store:
        store.add([FULL])
        assert [*store.generations()] == [FULL]


def test_key_in_the_environment_is_used_where_the_url_has_none(
    locked: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGL_STORE_KEY", KEY)

    with open_store(locked.url) as store:
        store.add([FULL])
        assert [*store.generations()] == [FULL]


@pytest.mark.parametrize("user", ["", "agl:wr0ng@", "wr0ng@"])
def test_missing_or_wrong_key_is_refused_and_hidden(
    locked: StoreServer, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.delenv("AGL_STORE_KEY", raising=False)

    with pytest.raises(StoreRefused, match="does not accept this key: set AGL_STORE_KEY") as refused:
        open_store(locked.url.replace("//", f"//{user}"))

    assert "wr0ng" not in str(refused.value)


def test_key_with_a_control_character_is_refused_and_hidden(
    locked: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGL_STORE_KEY", "wr0ng\nkey")

    with pytest.raises(StoreRefused, match="contains a line break or another control character") as refused:
        open_store(locked.url)

    assert "wr0ng" not in str(refused.value)


def test_doctor_and_export_take_the_url_with_its_key(locked: StoreServer) -> None:
    url = locked.url.replace("//", f"//agl:{IN_URL}@")
    with open_store(url) as store:
        store.add([FULL])
    agl = [sys.executable, "-m", "agentlightning"]

    said = subprocess.run([*agl, "doctor", "--store", url], capture_output=True, text=True, check=False)
    exported = subprocess.run([*agl, "export", "--store", url], capture_output=True, text=True, check=True)

    assert said.returncode == 0, said.stdout
    assert "the store at http://***@127.0.0.1" in said.stdout
    assert "1: 1 aborted" in said.stdout
    assert [json.loads(line)["id"] for line in exported.stdout.splitlines()] == [FULL.id]
    assert "s3cret" not in said.stdout + said.stderr + exported.stderr


def test_open_without_msgspec_gives_the_install_command(tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise ImportError\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import agentlightning.store as s; s.open_store('http://a')"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    install = f"{sys.executable} -m pip install 'msgspec>=0.18' 'urllib3>=1.26'"
    reason = f"StoreRefused: a store over HTTP needs msgspec and urllib3: {install}"
    assert result.stderr.splitlines()[-1].endswith(reason)


def test_threads_that_share_a_store_store_each_generation_once(store: Store) -> None:
    kept = [generation(number) for number in range(200)]

    with ThreadPoolExecutor(8) as pool:
        new = list(pool.map(lambda each: store.add([each]), kept * 2))

    assert sum(new) == len(kept)
    assert [*store.generations()] == kept


class Client(threading.Thread):
    """Adds batches, repeating each until it is acknowledged."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__()
        self._store = open_store(url)
        self._first = number * 1_000_000
        self.done = threading.Event()
        self.acknowledged: list[Generation] = []
        self.failures = 0

    def run(self) -> None:
        with self._store:
            while not self.done.is_set():
                first = self._first + len(self.acknowledged)
                batch = [generation(first + number, prompt=500) for number in range(BATCH)]
                while not self._has_added(batch):
                    time.sleep(0.01)
                self.acknowledged += batch

    def _has_added(self, batch: list[Generation]) -> bool:
        try:
            self._store.add(batch)
        except StoreUnavailable:
            self.failures += 1
            return False
        return True


def test_server_killed_often_keeps_acknowledged_generations_once_and_complete(tmp_path: Path, thorough: bool) -> None:
    moments = random.Random(9)
    with StoreServer(tmp_path / "store.db") as server:
        clients = [Client(server.url, number) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        for _ in range(KILLS if thorough else FEW_KILLS):
            enough = [len(client.acknowledged) + 2 * BATCH for client in clients]
            while any(len(client.acknowledged) < least for client, least in zip(clients, enough, strict=True)):
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.1))
            server.kill()
            server.start()
        for client in clients:
            client.done.set()
        for client in clients:
            client.join()

        acknowledged = {each.id: each for client in clients for each in client.acknowledged}
        with open_store(server.url) as store:
            kept = [*store.generations()]
    assert {each.id: each for each in kept} == acknowledged
    assert set(Counter(each.id for each in kept).values()) == {1}
    assert all(client.failures for client in clients)


def growing(calls: int, growth: int) -> list[Generation]:
    """Make the calls of a conversation, each with its text."""
    return [
        generation(n, prompt_token_ids=array("i", range(growth * (n + 1))), prompt_text="word " * growth * (n + 1))
        for n in range(calls)
    ]


def counted(between: Between) -> list[int]:
    """Count the bytes of each message of generations that passes."""
    lengths: list[int] = []

    def forward(handler: _Handler, body: bytes) -> None:
        if handler.path.endswith("/generations") and handler.command == "POST":
            lengths.append(len(body))
        status, headers, answer = handler.forwarded(body)
        handler.answer(status, answer, **headers)

    between.answered = forward
    return lengths


def test_conversation_sends_what_is_new_in_each_call(between: Between) -> None:
    kept = growing(calls=40, growth=512)
    lengths = counted(between)
    with open_store(between.url) as store:
        for each in kept:
            store.add([each])

        assert [*store.generations()] == kept
    # A call has two blocks of ids that are new, packed, and some three of text; the whole of the last one is 184 kB.
    assert len(lengths) == len(kept)
    assert max(lengths) < 12_000


def test_calls_of_one_message_share_what_is_new(between: Between) -> None:
    kept = growing(calls=40, growth=512)
    lengths = counted(between)
    with open_store(between.url) as store:
        store.add(kept)

        assert [*store.generations()] == kept
    assert sum(lengths) < 40 * 12_000


def test_store_that_lost_its_blocks_gets_them_again(between: Between, server: StoreServer) -> None:
    first, *others = growing(calls=4, growth=2048)
    lengths = counted(between)
    with open_store(between.url) as store:
        store.add([first])
        emptied(server)
        store.add(others)

        assert [*store.generations()] == others
        # The blocks are sent once more, and not again.
        assert len(lengths) == 3
        store.add([generation(9, prompt_token_ids=others[-1].prompt_token_ids)])
        assert lengths[3] < 2_000


def test_conversation_goes_on_after_the_store_was_restarted(tmp_path: Path) -> None:
    first, *others = growing(calls=4, growth=2048)
    with StoreServer(tmp_path / "store.db") as server, Between(server) as between:
        thread = threading.Thread(target=between.serve_forever)
        thread.start()
        lengths = counted(between)
        with open_store(between.url) as store:
            store.add([first])
            server.stop()
            server.start()
            store.add(others)

            assert [*store.generations()] == [first, *others]
        between.shutdown()
        thread.join()
    assert len(lengths) == 2


def of_an_earlier_release(newest: int, posted: list[str]) -> Callable[[_Handler, bytes], None]:
    """Answer as a server that knows versions of the message up to this one, and list those that it gets."""

    def answer_or_refuse(handler: _Handler, body: bytes) -> None:
        content_type = handler.headers["Content-Type"]
        is_message = (handler.command, handler.path) == ("POST", "/v1/agl/generations")
        if is_message:
            posted.append(content_type)
        if is_message and content_type in wire.VERSIONS[:-newest]:
            handler.answer(415, b'{"detail": "generations have another content type"}', **{"X-AGL-Error": "415"})
            return
        status, headers, answer = handler.forwarded(body)
        handler.answer(status, answer, **headers)

    return answer_or_refuse


@pytest.mark.parametrize("newest", [4, 3, 2, 1])
def test_server_of_an_earlier_release_gets_messages_that_it_knows(
    between: Between, newest: int, caplog: pytest.LogCaptureFixture
) -> None:
    kept = growing(calls=3, growth=2048)
    kept[0].agent_id = "an agent"
    kept[0].served_model, kept[0].choices = "tiny", FULL.choices
    posted: list[str] = []

    between.answered = of_an_earlier_release(newest, posted)
    with open_store(between.url) as store:
        store.add_losses([Loss(count=1, reason="full", first_at=1, last_at=2, host="a", pid=1)])
        store.add(kept[:2])
        store.add(kept[2:])

        kept[0].agent_id = "an agent" if newest > 2 else None
        kept[0].served_model = None
        kept[0].choices = [replace(choice, sampling_mask=None, top_logprobs=None) for choice in FULL.choices]
        assert [*store.generations()] == kept
        assert [loss.reason for loss in store.losses()] == ["full"]
    assert posted == [*wire.VERSIONS[: 7 - newest], *[wire.VERSIONS[6 - newest]] * 2]
    missing = "served_model, requested_params, prompt_logprobs, "
    missing += "agent_id, parent_agent_id, purpose, retry, via, " if newest <= 2 else ""
    [told] = [each.getMessage() for each in caplog.records if "earlier release" in each.getMessage()]
    assert f"does not keep {missing}sampling_mask, top_logprobs: these are not recorded" in told


@pytest.mark.parametrize("was_away", [True, False], ids=["away", "after a while"])
def test_server_that_is_updated_gets_all_again(
    between: Between, was_away: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = growing(calls=3, growth=2048)
    for each in kept:
        each.served_model = "tiny"
    posted: list[str] = []
    with open_store(between.url) as store:
        between.answered = of_an_earlier_release(4, posted)
        monkeypatch.setattr(http_generations, "SECONDS_OF_AN_OLDER_VERSION", math.inf if was_away else -1.0)
        store.add(kept[:1])
        if was_away:
            between.answered = lambda handler, body: handler.answer(503, b"")
            with pytest.raises(StoreUnavailable):
                store.add(kept[1:2])
        between.answered = of_an_earlier_release(6, posted)
        store.add(kept[1:])

        assert [each.served_model for each in store.generations()] == [None, "tiny", "tiny"]
    assert posted == [*wire.VERSIONS[:3], wire.VERSIONS[0]]
    assert len([each for each in caplog.records if "earlier release" in each.getMessage()]) == 1


def test_refused_generation_takes_no_block_of_others_with_it(store: Store) -> None:
    first, second, third = growing(calls=3, growth=2048)
    first.id = "not a UUID"

    with pytest.raises(InvalidRecord) as refused:
        store.add([first, second, third])

    assert [*refused.value.reasons] == [first.id]
    assert [*store.generations()] == [second, third]


def test_generation_that_is_in_a_batch_twice_is_stored_once(store: Store) -> None:
    [kept] = growing(calls=1, growth=2048)

    assert store.add([kept, kept]) == 1

    assert [*store.generations()] == [kept]


def test_generation_after_a_refused_one_of_its_conversation_is_stored_though_the_store_lost_its_blocks(
    store: Store, server: StoreServer
) -> None:
    first, second, third = growing(calls=3, growth=2048)
    store.add([first])
    emptied(server)
    second.cached_tokens = 1 << 63

    with pytest.raises(InvalidRecord) as refused:
        store.add([second, third])

    assert [*refused.value.reasons] == [second.id]
    assert [*store.generations()] == [third]
