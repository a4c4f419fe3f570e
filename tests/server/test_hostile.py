"""Hostile clients: bodies that expand, bodies that never arrive, and idle connections."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agentlightning.server.connections import SECONDS_TO_ASK, SECONDS_TO_SEND
from agentlightning.store.wire import MEDIA_TYPE
from tests.server.process import SECONDS, StoreServer
from tests.server.test_malformed import MIB, assert_refused, assert_works, most_memory_while
from tests.server.test_otlp import of_rollout, spans_of

PROTOBUF = {"Content-Type": "application/x-protobuf"}
JSON = {"Content-Type": "application/json"}
# The number of two-byte messages that fit into a body.
MANY = (63 * MIB) // 2
EMPTY = b"\x0a\x00"


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def field(number: int, *parts: bytes) -> bytes:
    """Encode a protobuf field that is a message or a string."""
    inside = b"".join(parts)
    return varint(number << 3 | 2) + varint(len(inside)) + inside


def a_span(*fields: bytes) -> bytes:
    """Encode a request with one span, with these fields and ids."""
    return field(1, field(2, field(2, field(1, b"\1" * 16), field(2, b"\1" * 8), *fields)))


def an_attribute(value: bytes) -> bytes:
    return field(9, field(1, b"key"), field(2, value))


def an_array(*elements: bytes) -> bytes:
    return field(5, *elements)


# Fields of OTLP by number; built on demand, since each takes 63 MiB.
BOMBS: dict[str, tuple[Callable[[], bytes], dict[str, str]]] = {
    "resources": (lambda: EMPTY * MANY, PROTOBUF),
    "scopes": (lambda: field(1, b"\x12\x00" * MANY), PROTOBUF),
    "spans": (lambda: field(1, field(2, b"\x12\x00" * MANY)), PROTOBUF),
    "attributes": (lambda: a_span(b"\x4a\x00" * MANY), PROTOBUF),
    "attributes of a resource": (lambda: field(1, field(1, EMPTY * MANY)), PROTOBUF),
    "array values": (lambda: a_span(an_attribute(an_array(EMPTY * MANY))), PROTOBUF),
    "arrays in arrays": (lambda: a_span(an_attribute(an_array(field(1, an_array(EMPTY)) * (MANY // 3)))), PROTOBUF),
    "values behind a value": (lambda: a_span(an_attribute(b"\x18\x01" + an_array(EMPTY * MANY))), PROTOBUF),
    "in a group": (lambda: b"\x7b" + EMPTY * MANY + b"\x7c", PROTOBUF),
    "JSON objects": (lambda: b'{"resourceSpans":[' + b"{}," * (MANY * 2 // 3) + b"{}]}", JSON),
    "JSON numbers": (lambda: b'{"resourceSpans":[' + b"0," * MANY + b"0]}", JSON),
    "JSON texts": (lambda: b'{"resourceSpans":[' + b'"",' * (MANY * 2 // 3) + b"0]}", JSON),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], str]) -> Iterator[StoreServer]:
    """A store for these tests alone, so that its memory is unaffected by others."""
    path = tmp_path_factory.mktemp("target") / "store.db"
    with StoreServer(path, store=new_store(path)) as server:
        yield server


@pytest.mark.parametrize("name", BOMBS)
def test_otlp_bomb_is_refused_before_it_is_decoded(name: str, target: StoreServer) -> None:
    make, headers = BOMBS[name]
    packed = gzip.compress(make(), 1)
    with target.client() as client:
        sending = {"content": packed, "headers": {**headers, "Content-Encoding": "gzip"}}
        answer, grown = most_memory_while(target, lambda: client.post("/v1/traces", **sending))
        assert "the body has more than" in assert_refused(answer, 400)
        # The compressed body and the body, but not what it would decode to.
        assert grown < 400
        assert_works(client)


def test_json_bomb_is_refused_before_it_is_decoded(target: StoreServer) -> None:
    body = gzip.compress(b'{"input":[' + b"[]," * (MANY * 2 // 3) + b"[]]}", 1)
    headers = {**JSON, "Content-Encoding": "gzip"}
    with target.client() as client:
        answer, grown = most_memory_while(
            target, lambda: client.post("/v1/agl/rollouts", content=body, headers=headers)
        )
        assert "values" in assert_refused(answer, 400)
        assert grown < 400


@pytest.mark.parametrize("each", [b"{}", b'{"a":0}', b"[[]]"])
def test_json_of_fewer_values_but_many_objects_is_refused_before_it_is_decoded(
    each: bytes, target: StoreServer
) -> None:
    """Regression test: such a body took forty times its size in memory."""
    body = b'{"input":[' + (each + b",") * 900_000 + b"0]}"
    with target.client() as client:
        answer, grown = most_memory_while(target, lambda: client.post("/v1/agl/rollouts", content=body, headers=JSON))
        assert "the body has more than 500000 objects and arrays" in assert_refused(answer, 400)
        # The body itself, as it arrives and in one piece.
        assert grown < 64
        assert_works(client)


def test_text_that_never_ends_is_refused_soon(target: StoreServer) -> None:
    """Regression test: it was searched for its end again from each quote in it."""
    body = b'{"input":["' + b'{\\"' * 700_000
    with target.client() as client:
        assert "the body is no JSON" in assert_refused(client.post("/v1/agl/rollouts", content=body, headers=JSON), 400)
        assert_works(client)


def test_brackets_in_a_text_are_no_objects(target: StoreServer) -> None:
    text = '{"[' * 400_000
    with target.client() as client:
        made = client.post("/v1/agl/rollouts", json={"input": text})
        assert made.status_code == 201
        assert made.json()["input"] == text


def test_message_of_too_many_generations_is_refused_before_it_is_decoded(target: StoreServer) -> None:
    body = b"\x81\xabgenerations\xdd" + MANY.to_bytes(4, "big") + b"\xc0" * MANY
    with target.client() as client:
        answer, grown = most_memory_while(
            target,
            lambda: client.post("/v1/agl/generations", content=body, headers={"Content-Type": MEDIA_TYPE}),
        )
        assert "10000 generations" in assert_refused(answer, 413)
        assert grown < 400


def test_long_arrays_and_texts_with_brackets_are_accepted(target: StoreServer) -> None:
    rollout_id = "long"
    ids = b"".join(field(1, b"\x18" + varint(number)) for number in (0, 127, 128, 151_643, 2**31, 2**62))
    named = field(9, field(1, b"agentlightning.rollout_id"), field(2, field(1, rollout_id.encode())))
    body = a_span(named, an_attribute(an_array(ids * 150_000)))
    text = "[{}," * 1_000_000
    sent = {
        "traceId": "ab" * 16,
        "spanId": "cd" * 8,
        "attributes": [*of_rollout(rollout_id), {"key": "text", "value": {"stringValue": text}}],
    }
    with target.client() as client:
        assert client.post("/v1/traces", content=body, headers=PROTOBUF).status_code == 200
        answer = client.post("/v1/traces", json={"resourceSpans": [{"scopeSpans": [{"spans": [sent]}]}]})
        assert answer.status_code == 200
        first, second = spans_of(client, rollout_id=rollout_id)
    assert first["attributes"]["key"] == [0, 127, 128, 151_643, 2**31, 2**62] * 150_000
    assert second["attributes"]["text"] == text


@contextmanager
def open_upload(server: StoreServer, declared: int, sent: int) -> Iterator[socket.socket]:
    """Send the beginning of a request's body."""
    head = "POST /v1/agl/rollouts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=SECONDS) as connection:
        connection.sendall(f"{head}Content-Length: {declared}\r\n\r\n".encode())
        # The server may refuse it, and close the connection, meanwhile.
        with suppress(OSError):
            connection.sendall(bytes(sent))
        yield connection


def port_of(server: StoreServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_arriving_bodies_stay_within_their_memory_budget(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client, ExitStack() as uploads:

        def upload() -> list[socket.socket]:
            return [uploads.enter_context(open_upload(server, 60 * MIB, 50 * MIB)) for _ in range(20)]

        connections, grown = most_memory_while(server, upload)
        assert grown < 600
        # Small requests are still accepted.
        assert_works(client)
        refused = [connection for connection in connections if has_answered(connection)]
        assert len(refused) >= 14
        assert b" 503 " in refused[0].recv(64)
        uploads.close()
        large = {"input": "x" * 50 * MIB}
        deadline = time.monotonic() + SECONDS
        while (answer := client.post("/v1/agl/rollouts", json=large)).status_code == 503:
            assert time.monotonic() < deadline
        assert answer.status_code == 201


def has_answered(connection: socket.socket) -> bool:
    connection.settimeout(0.1)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    except OSError:
        return True


def test_idle_connections_are_closed_to_admit_others(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", files=(256, 256)) as server, ExitStack() as idle:
        for number in range(400):
            connection = idle.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), timeout=SECONDS))
            if number % 2:
                connection.sendall(b"POST /v1/agl/rollouts HTTP/1.1\r\nHost: local")
        for _ in range(20):
            with server.client() as client:
                assert_works(client)
        assert "connections: closing idle ones; raise the limit of open files (ulimit -n)" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_limit_of_open_files_is_raised_to_the_hard_limit(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", files=(256, 900)) as server:
        assert psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE) == (900, 900)
        assert "raised the limit of open files and connections from 256 to 900" in server.log.read_text()


def test_incomplete_requests_are_closed_and_logged(tmp_path: Path) -> None:
    head = b"POST /v1/agl/rollouts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    halves = [b"", b"POST /v1/agl", head, head + b'Content-Length: 100\r\n\r\n{"input"']
    with StoreServer(tmp_path / "store.db") as server, ExitStack() as opened, server.client() as client:
        connections = [
            opened.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), timeout=SECONDS))
            for _ in halves
        ]
        for connection, half in zip(connections, halves, strict=True):
            connection.sendall(half)
        [rollout] = client.post("/v1/agl/queues/rollouts/enqueue", json={"rollouts": [{"input": 1}]}).json()
        # A client with a complete request may wait long for its answer.
        found: list[Any] = []
        query = {"rollout_ids": [rollout["rollout_id"]], "timeout": None}
        waiting = threading.Thread(
            target=lambda: found.append(server.client().post("/v1/agl/waits/rollouts", json=query).json())
        )
        waiting.start()
        for connection in connections:
            connection.settimeout(SECONDS_TO_ASK + SECONDS_TO_SEND + SECONDS)
            assert connection.recv(1) == b""
        assert "that sent no complete request in time" in server.log.read_text()
        client.post(f"/v1/agl/rollouts/{rollout['rollout_id']}", json={"status": "cancelled"})
        waiting.join(SECONDS)
        assert [each["status"] for each in found[0]] == ["cancelled"]


def test_slow_but_steady_upload_is_accepted(tmp_path: Path) -> None:
    text = json.dumps({"input": "x" * 200_000}).encode()
    head = (
        b"POST /v1/agl/rollouts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    with StoreServer(tmp_path / "store.db") as server, httpx.Client() as client:
        with socket.create_connection(("127.0.0.1", port_of(server)), timeout=SECONDS) as connection:
            connection.sendall(head + f"Content-Length: {len(text)}\r\n\r\n".encode())
            for start in range(0, len(text), 10_000):
                connection.sendall(text[start : start + 10_000])
                time.sleep(0.2)
            assert b" 201 " in connection.recv(64)
        assert client.get(f"{server.url}/readyz").status_code == 200
