"""Malformed requests: the answer is documented, the reason is one sentence, and the store keeps working."""

from __future__ import annotations

import functools
import gzip
import json
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import psutil
import pytest

from tests.server.process import SECONDS, StoreServer

MIB = 1 << 20
JSON = {"Content-Type": "application/json"}
T = TypeVar("T")


@pytest.fixture(scope="module")
def careful(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], str]) -> Iterator[StoreServer]:
    """A store that accepts bodies up to 8 MiB, and must log no traceback."""
    path = tmp_path_factory.mktemp("careful") / "store.db"
    with StoreServer(path, "--max-body-mb=8", store=new_store(path)) as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.fixture
def client(careful: StoreServer) -> Iterator[httpx.Client]:
    """A client of that store, which must work afterwards."""
    with careful.client() as client:
        yield client
        assert_works(client)


def assert_works(client: httpx.Client) -> None:
    made = client.post("/v1/agl/rollouts", json={"input": "does it work?"}).json()
    assert client.get(f"/v1/agl/rollouts/{made['rollout_id']}").json()["input"] == "does it work?"


def assert_refused(answer: httpx.Response, *statuses: int) -> str:
    """Assert that a request was refused with one sentence; return the sentence."""
    assert answer.status_code in statuses, f"{answer.status_code}: {answer.text[:500]}"
    assert answer.headers["content-type"] == "application/json"
    is_missing = answer.status_code == 404 and "no such route" not in answer.text
    assert answer.headers["x-agl-error"] == ("not-found" if is_missing else "1")
    body = answer.json()
    assert list(body) == ["detail"]
    detail = body["detail"]
    assert isinstance(detail, str)
    assert 0 < len(detail) < 2000
    assert "Traceback" not in detail
    assert "\n" not in detail
    return detail


@pytest.mark.tier("all")
def test_server_matches_its_openapi_document(careful: StoreServer, lightning: Path, tmp_path: Path) -> None:
    config = Path(__file__).with_name("schemathesis.toml")
    limits = ("--seed=1", "--max-examples=3", "--no-shrink", "--generation-database=none")
    command = [lightning / "schemathesis", f"--config-file={config}", "run", f"{careful.url}/openapi.json", *limits]
    done = subprocess.run(
        [*command, "--workers=2", "--no-color"], capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with careful.client() as client:
        assert_works(client)


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """1 GiB of zeros, compressed to 1 MiB."""
    zeros = bytes(MIB)
    packer = zlib.compressobj(wbits=31)
    first, again = (packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    # After a full flush, the same piece unpacks to the same bytes: packed one by one, they take eleven seconds.
    packed = first + again * 1023 + b"\x03\x00"
    checksum = functools.reduce(lambda so_far, _: zlib.crc32(zeros, so_far), range(1024), 0)
    return packed + checksum.to_bytes(4, "little") + (1024 * MIB).to_bytes(4, "little")


def most_memory_while(server: StoreServer, work: Callable[[], T]) -> tuple[T, int]:
    """Return the result of `work`, and the peak growth of the server's memory meanwhile, in MiB."""
    process = psutil.Process(server.process.pid)
    before = most = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return work(), (most - before) // MIB
    finally:
        done.set()
        watcher.join()


def test_gzip_bomb_is_refused_before_it_is_large(careful: StoreServer, client: httpx.Client, bomb: bytes) -> None:
    headers = {**JSON, "Content-Encoding": "gzip"}
    answer, grown = most_memory_while(
        careful, lambda: client.post("/v1/agl/queues/rollouts/enqueue", content=bomb, headers=headers)
    )
    assert "8 MiB" in assert_refused(answer, 413)
    assert grown < 64


def test_gzip_bombs_are_decompressed_one_at_a_time(tmp_path: Path, bomb: bytes, thorough: bool) -> None:
    headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}

    def send(_: int) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/traces", content=bomb, headers=headers, timeout=SECONDS)

    # With the default limit of 64 MiB.
    with StoreServer(tmp_path / "store.db") as server, ThreadPoolExecutor(12) as pool, server.client() as client:
        answers, grown = most_memory_while(server, lambda: list(pool.map(send, range(24 if thorough else 12))))
        for answer in answers:
            assert_refused(answer, 413)
        assert grown < 256
        assert_works(client)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"\x1f\x8b",
        gzip.compress(b"{}")[:-1],
        gzip.compress(b"{}") + b"{}",
        gzip.compress(b"{}") + gzip.compress(b"{}")[:-1],
        gzip.compress(b"") * 10_001,
        gzip.compress(b"{}" * 2 * MIB)[:-9],
    ],
    ids=["none", "its beginning", "cut off", "something behind it", "two, cut off", "too many", "much, cut off"],
)
@pytest.mark.parametrize("path", ["/v1/agl/spans", "/v1/traces", "/v1/agl/rollouts"])
def test_malformed_gzip_is_refused(path: str, body: bytes, client: httpx.Client) -> None:
    detail = assert_refused(client.post(path, content=body, headers={**JSON, "Content-Encoding": "gzip"}), 400)
    assert "gzip" in detail


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
@pytest.mark.parametrize("cuts", [(), (5,), (1, 2, 3, 4), tuple(range(1, 200))], ids=len)
def test_gzip_aliases_and_several_members_are_accepted(
    encoding: str, cuts: tuple[int, ...], client: httpx.Client
) -> None:
    text = json.dumps({"input": "x" * 200}).encode()
    parts = [text[start:end] for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True)]
    packed = b"".join(gzip.compress(part) for part in parts)
    answer = client.post("/v1/agl/rollouts", content=packed, headers={**JSON, "Content-Encoding": encoding})
    assert answer.status_code == 201, answer.text
    assert answer.json()["input"] == "x" * 200


def test_large_gzip_members_are_joined(client: httpx.Client) -> None:
    text = json.dumps({"input": "0123456789abcdef" * 300_000}).encode()
    packed = b"".join(gzip.compress(text[start : start + MIB]) for start in range(0, len(text), MIB))
    answer = client.post("/v1/agl/rollouts", content=packed, headers={**JSON, "Content-Encoding": "gzip"})
    assert answer.status_code == 201, answer.text
    assert len(answer.json()["input"]) == 4_800_000


def test_other_content_encodings_are_refused(client: httpx.Client) -> None:
    for encoding in ("br", "deflate", "gzip, gzip", "zstd"):
        answer = client.post("/v1/agl/spans", content=b"{}", headers={**JSON, "Content-Encoding": encoding})
        assert encoding in assert_refused(answer, 415)


def test_too_large_body_is_refused(client: httpx.Client) -> None:
    body = b'{"input": "' + b"x" * 8 * MIB + b'"}'
    for content in (body, (body[start : start + MIB] for start in range(0, len(body), MIB))):
        assert "8 MiB" in assert_refused(client.post("/v1/agl/rollouts", content=content, headers=JSON), 413)
    fits = b'{"input": "' + b"x" * (8 * MIB - 13) + b'"}'
    assert client.post("/v1/agl/rollouts", content=fits, headers=JSON).status_code == 201
    packed = gzip.compress(body)
    answer = client.post("/v1/agl/rollouts", content=packed, headers={**JSON, "Content-Encoding": "gzip"})
    assert "8 MiB" in assert_refused(answer, 413)


def test_too_large_content_length_is_refused_at_once(careful: StoreServer, client: httpx.Client) -> None:
    port = int(careful.url.rpartition(":")[2])
    head = "POST /v1/agl/spans HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(f"{head}Content-Length: {10**15}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(64)
    # A client that disconnects in the middle of a body causes no error.
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + b'{"rollout_id"')


UNREADABLE = {
    "nothing": b"",
    "garbage": b"\xde\xad\xbe\xef",
    "no UTF-8": b'{"input": "\xff"}',
    "UTF-16": '{"input": 1}'.encode("utf-16"),
    "cut off": b'{"input": ',
    "two of them": b'{"input": 1} {"input": 2}',
    "NaN in a name": b"{NaN: 1}",
    "half of NaN": b'{"input": Na}',
    "no number of 64 bits": b'{"input": 1e400}',
    "half a surrogate pair": b'{"input": "\\ud83d"}',
    "the other half": b'{"input": "\\ude00"}',
    "a NUL outside of a text": b'{"input": \x00}',
    "deep": b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep and cut off": b"[" * 100_000,
    "deep objects": b'{"input":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": b'{"input": 1' + b"0" * 5_000 + b"}",
}
PATHS_WITH_BODIES = (
    "/v1/agl/rollouts",
    "/v1/agl/queues/rollouts/enqueue",
    "/v1/agl/spans",
    "/v1/agl/spans/search",
    "/v1/agl/resources",
    "/v1/agl/workers/worker-1",
)


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("path", PATHS_WITH_BODIES)
def test_malformed_json_is_refused(path: str, body: bytes, client: httpx.Client) -> None:
    if not body and "workers" in path:
        # A heartbeat may be empty.
        assert client.post(path, content=body, headers=JSON).status_code == 200
        return
    assert_refused(client.post(path, content=body, headers=JSON), 400, 422)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "json", "\xff/\xfe"])
@pytest.mark.parametrize("path", PATHS_WITH_BODIES)
def test_json_needs_its_content_type(path: str, content_type: str | None, client: httpx.Client) -> None:
    headers = {} if content_type is None else {b"Content-Type": content_type.encode("latin-1")}
    answer = client.post(path, content=b'{"input": 1}', headers=headers)
    assert "application/json" in assert_refused(answer, 415)


def test_malformed_protobuf_is_refused(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/x-protobuf"}
    # Deeply nested messages; a length beyond the end; text that is not UTF-8, without any span; an endless number.
    deep = b""
    for _ in range(2_000):
        deep = b"\x0a" + _varint(len(deep)) + deep
    for body in (b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x03\x1a\x01\xff", b"\x08" + b"\xff" * 20, b"{}"):
        assert_refused(client.post("/v1/traces", content=body, headers=headers), 400)
    # Unknown fields are skipped, however deep they are.
    assert client.post("/v1/traces", content=deep, headers=headers).status_code in (200, 400)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def test_deep_attributes_of_a_span_are_kept_or_refused(client: httpx.Client) -> None:
    value: dict[str, Any] = {"stringValue": "x"}
    for depth in range(1, 200):
        value = {"arrayValue": {"values": [value]}}
        if depth % 20:
            continue
        span = {"traceId": "ab" * 16, "spanId": f"{depth:016x}", "attributes": [{"key": "deep", "value": value}]}
        body = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}
        answer = client.post("/v1/traces", json=body)
        if answer.status_code != 200:
            assert_refused(answer, 400)


@pytest.mark.parametrize(
    "number", ["18446744073709551617", "1" + "0" * 400, "-1" + "0" * 400, "0.1e-400", "1.0", "-0.0"]
)
def test_numbers_of_any_size_are_returned(number: str, client: httpx.Client) -> None:
    answer = client.post("/v1/agl/rollouts", content=f'{{"input": {number}}}', headers=JSON)
    assert answer.status_code == 201, answer.text
    found = client.get(f"/v1/agl/rollouts/{answer.json()['rollout_id']}").json()["input"]
    assert found == json.loads(number)
    assert type(found) is type(json.loads(number))


NAN, INFINITY = float("nan"), float("inf")
A_SPAN = {
    "rollout_id": "ro-1",
    "attempt_id": "at-1",
    "sequence_id": 1,
    "trace_id": "0123456789abcdef0123456789abcdef",
    "span_id": "0123456789abcdef",
    "parent_id": None,
    "name": "chat",
    "status": {"status_code": "OK"},
    "attributes": {},
    "events": [],
    "links": [],
    "start_time": 1.5,
    "end_time": None,
    "context": None,
    "parent": None,
    "resource": {"attributes": {}, "schema_url": ""},
}


@pytest.mark.parametrize("number", [str(2**53), str(2**64 + 1), "1" + "0" * 400, "-1", "1.5", "true", '"1"', "1e300"])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/agl/spans", "sequence_id"),
        ("/v1/agl/spans/search", "offset"),
        ("/v1/agl/queues/rollouts/enqueue", "rollouts.0.config.max_attempts"),
    ],
)
def test_numbers_out_of_range_are_refused(path: str, name: str, number: str, client: httpx.Client) -> None:
    sent = {
        "sequence_id": A_SPAN | {"sequence_id": "NUMBER"},
        "offset": {"rollout_id": "ro-1", "offset": "NUMBER"},
        "rollouts.0.config.max_attempts": {"rollouts": [{"input": 1, "config": {"max_attempts": "NUMBER"}}]},
    }[name]
    answer = client.post(path, content=json.dumps(sent).replace('"NUMBER"', number), headers=JSON)
    if (name, number) == ("sequence_id", "-1"):
        # Agent Lightning 0.3 accepts negative numbers; the attempt does not exist.
        assert_refused(answer, 404)
        return
    if (name, number) == ("offset", '"1"'):
        # The same fields may come in a URL, where numbers are text.
        assert answer.status_code == 200
        return
    assert name in assert_refused(answer, 422)


NULLS = {
    "/v1/agl/rollouts": {
        "input": [NAN, INFINITY, -INFINITY, "NaN"],
        "metadata": {"a": NAN},
        "config": {"timeout_seconds": NAN},
    },
    "/v1/agl/workers/nan": {"heartbeat_stats": {"cpu": NAN, "text": 'an "Infinity" \\'}},
    "/v1/agl/resources": {
        "main": {
            "resource_type": "llm",
            "endpoint": "NaN",
            "model": "m",
            "sampling_parameters": {"temperature": INFINITY},
        }
    },
}


@pytest.mark.parametrize("path", NULLS)
def test_nan_and_infinity_become_null(path: str, client: httpx.Client) -> None:
    sent = NULLS[path]
    answer = client.post(path, content=json.dumps(sent), headers=JSON)
    assert answer.is_success, answer.text
    found = answer.json()
    if path.endswith("rollouts"):
        assert found["input"] == [None, None, None, "NaN"]
        assert (found["metadata"], found["config"]["timeout_seconds"]) == ({"a": None}, None)
    elif path.endswith("nan"):
        assert found["heartbeat_stats"] == {"cpu": None, "text": 'an "Infinity" \\'}
    else:
        main = found["resources"]["main"]
        assert (main["endpoint"], main["sampling_parameters"]) == ("NaN", {"temperature": None})


def test_empty_id_names_nothing_and_is_returned_as_sent(client: httpx.Client) -> None:
    """Agent Lightning 0.3 behaves the same way."""
    made = client.post("/v1/agl/rollouts", json={"input": 1, "worker_id": "", "resources_id": ""}).json()
    assert (made["attempt"]["worker_id"], made["resources_id"]) == ("", "")
    path = f"/v1/agl/rollouts/{made['rollout_id']}"
    assert client.post(f"{path}/attempts/latest", json={"worker_id": "w"}).json()["worker_id"] == "w"
    assert client.post(f"{path}/attempts/latest", json={"worker_id": ""}).json()["worker_id"] == ""
    assert client.post(path, json={"resources_id": "r"}).json()["resources_id"] == "r"
    assert client.post(path, json={"resources_id": ""}).json()["resources_id"] == ""
    again = client.post(f"{path}/attempts", json={"worker_id": ""}).json()
    assert again["attempt"]["worker_id"] == ""
    client.post("/v1/agl/queues/rollouts/enqueue", json={"rollouts": [{"input": 1, "resources_id": ""}]})
    taken = client.post("/v1/agl/queues/rollouts/dequeue", json={"limit": 100, "worker_id": ""}).json()
    assert {each["attempt"]["worker_id"] for each in taken} == {""}
    # No worker has this name.
    assert "" not in {each["worker_id"] for each in client.get("/v1/agl/workers").json()["items"]}


@pytest.mark.parametrize("parent_id", [None, "", "0" * 16])
def test_spans_with_empty_parent_or_negative_number_are_accepted(parent_id: str | None, client: httpx.Client) -> None:
    made = client.post("/v1/agl/rollouts", json={"input": 1}).json()
    ids = {"rollout_id": made["rollout_id"], "attempt_id": made["attempt"]["attempt_id"]}
    sent = A_SPAN | ids | {"sequence_id": -3, "parent_id": parent_id, "attributes": {"share": NAN, "half": "\ud83d!"}}
    answer = client.post("/v1/agl/spans", content=json.dumps(sent), headers=JSON)
    assert answer.status_code == 201, answer.text
    found = client.get("/v1/agl/spans", params={"rollout_id": made["rollout_id"]}).json()["items"]
    assert found == [answer.json()]
    assert (found[0]["sequence_id"], found[0]["parent_id"]) == (-3, parent_id)
    query = {"rollout_id": made["rollout_id"], "parent_id": "0" * 16}
    assert client.get("/v1/agl/spans", params=query).json()["items"] == []
    assert found[0]["attributes"] == {"share": None, "half": "?!"}
    query = {"rollout_id": made["rollout_id"], "attempt_id": ids["attempt_id"]}
    assert client.post("/v1/agl/spans/next", json=query).json() == {"sequence_id": 1}


@pytest.mark.parametrize("wrong", [None, True, "1.5", [], {}, -(10**30)], ids=str)
def test_span_fields_of_a_wrong_type_are_refused(wrong: Any, client: httpx.Client) -> None:
    may_be_null = ("sequence_id", "parent_id", "start_time", "end_time", "context", "parent")
    may_be_any_number = ("start_time", "end_time")
    for name, right in A_SPAN.items():
        if type(wrong) is type(right) or (wrong is None and name in may_be_null):
            continue
        if isinstance(wrong, int) and wrong is not True and name in may_be_any_number:
            continue
        if isinstance(wrong, str) and name == "parent_id":
            continue
        answer = client.post("/v1/agl/spans", json=A_SPAN | {name: wrong})
        assert name in assert_refused(answer, 422)


def test_deepest_allowed_json_is_returned_unchanged(client: httpx.Client) -> None:
    # The surrounding object adds one level.
    for depth, kept in ((100, True), (199, True), (200, False), (1_000, False), (2_000, False)):
        text = b'{"input": ' + b"[" * depth + b"]" * depth + b"}"
        answer = client.post("/v1/agl/rollouts", content=text, headers=JSON)
        if not kept:
            assert "nested more than 200 deep" in assert_refused(answer, 400)
            continue
        assert answer.status_code == 201
        found = client.get(f"/v1/agl/rollouts/{answer.json()['rollout_id']}").json()["input"]
        assert str(found) == "[" * depth + "]" * depth
    assert client.get("/v1/agl/rollouts").status_code == 200


def test_duplicate_json_field_uses_the_last(client: httpx.Client) -> None:
    answer = client.post("/v1/agl/rollouts", content=b'{"input": 1, "input": 2}', headers=JSON)
    assert answer.json()["input"] == 2
    assert answer.text.count('"input"') == 1


FINE_IDS = {
    "emoji": "👩‍🚀-🦙",
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd-\u0645\u0631\u062d\u0628\u0627",
    "quotes": "'\"`",
    "SQL": "x'; DROP TABLE rollouts; --",
    "upwards": "..",
    "percents": "%00%2F%%",
    "spaces": " a b ",
    "lines": "a\nb\r\tc",
    "patterns": "a?b#c&d=e+f;g:h@i",
    "backslash": "a\\b",
    "combined": "e\u0301",
    "of the supplementary planes": "\U0010ffff\ufeff",
    "long": "ü" * 512,
    "control": "\x01\x7f\x85",
}


@pytest.mark.parametrize("name", FINE_IDS.values(), ids=FINE_IDS)
def test_ids_of_any_text_are_returned_exactly(name: str, client: httpx.Client) -> None:
    """Ids in paths, queries and bodies; another Unicode normal form is another id."""
    worker = client.post(_in_path("/v1/agl/workers/", name), json={"heartbeat_stats": {name: name}})
    assert worker.json()["worker_id"] == name, worker.text
    assert client.get(_in_path("/v1/agl/workers/", name)).json()["heartbeat_stats"] == {name: name}
    found = client.get("/v1/agl/workers", params={"worker_id_contains": name}).json()
    assert name in [each["worker_id"] for each in found["items"]]
    prompt = {name: {"resource_type": "prompt_template", "template": name, "engine": "jinja"}}
    assert client.post(_in_path("/v1/agl/resources/", name), json=prompt).json()["resources"] == prompt
    assert client.get(_in_path("/v1/agl/resources/", name)).json()["resources_id"] == name


@pytest.mark.parametrize("name", [*FINE_IDS.values(), "a/b", "../../etc/passwd", "/"], ids=str)
def test_exporters_may_use_any_rollout_id(name: str, client: httpx.Client) -> None:
    attributes = [{"key": "agentlightning.rollout_id", "value": {"stringValue": name}}]
    span = {"traceId": "cd" * 16, "spanId": "ef" * 8, "name": name, "attributes": attributes}
    assert client.post("/v1/traces", json={"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).json() == {}
    for answer in (
        client.get("/v1/agl/spans", params={"rollout_id": name, "name": name}),
        client.post("/v1/agl/spans/search", json={"rollout_id": name, "name_contains": name}),
    ):
        [found] = answer.json()["items"]
        assert (found["rollout_id"], found["name"]) == (name, name)


def _in_path(path: str, name: str) -> str:
    # Fully quoted: httpx resolves `..`.
    return path + quote(name, safe="").replace(".", "%2E")


@pytest.mark.parametrize("name", ["a\0b", "\0", "x" * 513, "x" * 10_000, "🦙" * 10_000], ids=lambda name: name[:3])
def test_invalid_ids_are_refused(name: str, client: httpx.Client) -> None:
    search = {"rollout_id": name}
    assert_refused(client.post("/v1/agl/spans/search", json=search), 422)
    assert_refused(client.post("/v1/agl/waits/rollouts", json={"rollout_ids": [name]}), 422)
    assert_refused(client.post("/v1/agl/rollouts", json={"input": 1, "worker_id": name}), 422)
    assert_refused(client.post("/v1/agl/spans/next", json={"rollout_id": name, "attempt_id": "1"}), 422)
    if name.isascii():
        # Quoted, ten thousand other characters exceed the length of a URL.
        assert_refused(client.post(_in_path("/v1/agl/workers/", name)), 422)
        assert_refused(client.get(_in_path("/v1/agl/rollouts/", name)), 422)
        assert_refused(client.get("/v1/agl/spans", params=search), 422)


def test_slash_in_an_id_is_another_path(client: httpx.Client) -> None:
    for path in ("/v1/agl/workers/a%2Fb", "/v1/agl/workers/..%2F..%2Fhealthz", "/v1/agl/workers/", "/no", "/no/"):
        assert "/openapi.json" in assert_refused(client.post(path), 404)


def test_wrong_method_answers_405_with_allowed_methods(client: httpx.Client) -> None:
    answer = client.delete("/v1/agl/spans")
    assert "DELETE" in assert_refused(answer, 405)
    assert answer.headers["allow"] == "GET, HEAD, POST"
    assert client.options("/v1/agl/spans/search").headers["allow"] == "POST"


def test_thousands_of_bad_requests_leave_no_memory_behind(careful: StoreServer, client: httpx.Client) -> None:
    process = psutil.Process(careful.process.pid)
    packed = {**JSON, "Content-Encoding": "gzip"}
    bodies = [body for body in UNREADABLE.values() if 0 < len(body) < 1_000]

    def send(times: int) -> None:
        for number in range(times):
            for body in bodies:
                assert client.post("/v1/agl/spans", content=body, headers=JSON).is_client_error
            assert client.post("/v1/traces", content=b"\xff" * 100, headers=packed).is_client_error
            # Nothing may remember paths that never come again, not even the metrics.
            assert client.get(f"/nothing/{number}-{time.monotonic_ns()}").is_client_error
            assert client.get(f"/v1/agl/spans?limit={number}&n={time.monotonic_ns()}").is_client_error

    send(60)
    before = process.memory_info().rss
    send(240)
    assert process.memory_info().rss - before < 16 * MIB


def test_sampling_that_cannot_be_pinned_is_refused(client: httpx.Client) -> None:
    def enqueue(sampling: Any) -> httpx.Response:
        return client.post("/v1/agl/rollouts", json={"input": 1, "config": {"sampling": sampling}})

    assert "sampling: 'heat' is not one of temperature" in assert_refused(enqueue({"heat": 1}), 422)
    assert "temperature=9 is not 0, or a number" in assert_refused(enqueue({"temperature": 9}), 422)
    assert "top_p=0 is not" in assert_refused(enqueue({"top_p": 0}), 422)
    assert "'mine' is neither" in assert_refused(enqueue("mine"), 422)
    assert "'heat' stands beside modes" in assert_refused(enqueue({"train": "client", "heat": 1}), 422)

    for valid in ({"temperature": 0.7}, {"train": {"top_k": 4}, "val": "client"}, "client"):
        assert enqueue(valid).json()["config"]["sampling"] == valid
