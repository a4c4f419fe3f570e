"""Tests of the routes of generations, without the client of this package."""

from __future__ import annotations

import gzip
import json
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import uvicorn

from agentlightning.errors import StoreUnavailable
from agentlightning.generation import Choice, Generation, Loss, new_id
from agentlightning.server import app as application
from agentlightning.store import open_database, open_store, wire
from agentlightning.store.chains import FIRST, NEXT, Recent
from tests.common.generations import EMPTY, FULL, SECOND, START, generation
from tests.server.process import SECONDS, StoreServer

ROUTE = "/v1/agl/generations"
MESSAGE = {"Content-Type": wire.MEDIA_TYPE}
MIB = 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StoreServer]:
    """Run a store for one test, which must log no traceback."""
    with StoreServer(tmp_path / "store.db") as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.fixture
def client(server: StoreServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def post(client: httpx.Client, body: bytes, **headers: str) -> httpx.Response:
    return client.post(ROUTE, content=body, headers={**MESSAGE, **headers})


def test_post_counts_new_generations_and_keeps_known_ones(client: httpx.Client) -> None:
    first = post(client, wire.encode([FULL, EMPTY]))
    again = post(client, wire.encode([FULL, generation(1)]))
    known = post(client, wire.encode([FULL]))

    assert (first.status_code, first.json()) == (201, {"new": 2, "refused": []})
    assert (again.status_code, again.json()) == (201, {"new": 1, "refused": []})
    assert (known.status_code, known.json()) == (200, {"new": 0, "refused": []})
    assert post(client, wire.encode([])).json() == {"new": 0, "refused": []}
    assert client.get("/v1/agl/statistics").json()["total_generations"] == 3


def test_post_of_a_gzipped_message_is_stored(client: httpx.Client) -> None:
    answer = post(client, gzip.compress(wire.encode([FULL])), **{"Content-Encoding": "gzip"})

    assert answer.json() == {"new": 1, "refused": []}
    assert client.get(f"{ROUTE}/{FULL.id}").status_code == 200


@pytest.mark.parametrize("content_type", [None, "application/json", "application/msgpack", "application/octet-stream"])
def test_post_without_the_media_type_is_refused(client: httpx.Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}

    answer = client.post(ROUTE, content=wire.encode([FULL]), headers=headers)

    assert answer.status_code == 415
    assert wire.MEDIA_TYPE in answer.json()["detail"]


@pytest.mark.parametrize("number", [1, 2])
def test_post_by_a_server_of_an_earlier_release_is_stored(client: httpx.Client, number: int) -> None:
    kind = f"application/vnd.agl.generations.v{number}+msgpack"
    body = (Path(__file__).parents[1] / "store" / "messages" / f"v{number}.msgpack").read_bytes()

    answer = client.post(ROUTE, content=body, headers={"Content-Type": kind})

    assert (answer.status_code, answer.json()["new"], answer.json()["refused"]) == (201, 2, [])
    [full] = client.get(ROUTE, params={"rollout_id": "rollout"}).json()["items"]
    assert (full["prompt_text"], full["prompt_token_ids"]) == (FULL.prompt_text, list(FULL.prompt_token_ids or ()))
    assert (full["agent_id"], full["via"]) == (None, None)
    if number == 1:
        page = client.get(ROUTE, headers={"Accept": f"{kind}, application/json"})
        assert page.headers["content-type"] == kind
        assert [each.session_id for each in wire.decode(page.content, kind).generations] == [None, "session"]


def test_post_of_an_invalid_message_stores_nothing(client: httpx.Client) -> None:
    body = wire.encode([FULL, EMPTY])
    cut_off = [body[:end] for end in range(0, len(body), 7)]

    for wrong in (*cut_off, b"<html>", b"\xc1", b"\x91" * 100_000, body + b"\0"):
        answer = post(client, wrong)
        assert answer.status_code == 400, wrong
        assert answer.json()["detail"].startswith("the body cannot be read: ")

    assert client.get(f"{ROUTE}/tally").json() == {"finished": 0, "aborted": 0, "error": 0}


def test_post_of_too_many_generations_is_refused(client: httpx.Client) -> None:
    many = wire.encode([generation(number, prompt=1, output=1) for number in range(10_001)])

    answer = post(client, many)

    assert (answer.status_code, answer.json()) == (
        413,
        {"detail": "the body has more than 10000 generations and losses"},
    )


def test_post_names_invalid_generations_and_stores_the_others(client: httpx.Client) -> None:
    kept = [generation(number) for number in range(250)]
    twice = generation(250, choices=[Choice(), Choice()])
    message = msgspec.msgpack.decode(wire.encode([generation(1, id="no-uuid"), twice, *kept, generation(251)]))
    unreadable = message["generations"][-1]
    unreadable[14] = b"1234567"

    answer = post(client, msgspec.msgpack.encode(message))

    assert answer.status_code == 201
    assert answer.json()["new"] == 250
    assert [each["id"] for each in answer.json()["refused"]] == [unreadable[0], "no-uuid", twice.id]
    assert all(each["reason"] for each in answer.json()["refused"])
    lines = client.get(ROUTE, headers={"Accept": "application/jsonl"}).text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [each.id for each in kept]


def test_get_by_id_returns_json(client: httpx.Client) -> None:
    post(client, wire.encode([FULL]))

    found = client.get(f"{ROUTE}/{FULL.id}").json()

    wanted = FULL.as_dict()
    wanted["choices"][0]["logprobs"][1] = None
    wanted["choices"][0]["weight_versions"] = [["v1", 0, 1], ["v2", 1, 2]]
    wanted["choices"][0]["top_logprobs"][1][0]["logprob"] = None
    assert found["choices"][0]["logprobs"] == pytest.approx([-0.1, None])
    found["choices"][0]["logprobs"] = wanted["choices"][0]["logprobs"]
    assert found == wanted


@pytest.mark.parametrize("generation_id", ["01a20c2a-865d-7b56-9503-9601311bea6e", "no-uuid", "%2E%2E"])
def test_get_of_an_unknown_id_is_not_found(client: httpx.Client, generation_id: str) -> None:
    answer = client.get(f"{ROUTE}/{generation_id}")

    assert answer.status_code == 404
    assert answer.json()["detail"].startswith("there is no generation ")


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"rollout_id": "rollout-1"},
        {"rollout_id": None},
        {"rollout_id": None, "session_id": None, "model": "tiny-model"},
        {"attempt_id": "attempt-2", "status": "aborted"},
        {"since": START + 5 * SECOND, "until": START + 17 * SECOND},
        {"response_id": "chatcmpl-00000000000000000000000000000005"},
        {"model": "a\0b"},
    ],
)
def test_query_filters_select_what_the_stores_filters_do(
    server: StoreServer, client: httpx.Client, filters: dict[str, Any]
) -> None:
    kept = [generation(number) for number in range(30)]
    kept[7].rollout_id = kept[8].rollout_id = None
    kept[8].session_id = "a session"
    kept[9].model = "a\0b"
    kept[21].status = "aborted"
    post(client, wire.encode(kept))
    without = [name for name, value in filters.items() if value is None]
    asked = {name: value for name, value in filters.items() if value is not None} | {"without": without}

    page = client.get(ROUTE, params=asked).json()
    lines = client.get(ROUTE, params=asked, headers={"Accept": "application/x-ndjson"})
    message = client.get(ROUTE, params=asked, headers={"Accept": wire.MEDIA_TYPE})
    tally = client.get(f"{ROUTE}/tally", params=asked).json()

    with open_store(str(server.path)) as file:
        wanted = [*file.generations(**filters)]
        assert tally == file.tally(**filters)
    assert wanted
    assert [each["id"] for each in page["items"]] == [each.id for each in wanted]
    assert page["next"] is None
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in lines.text.splitlines()] == page["items"]
    assert message.headers["content-type"] == wire.MEDIA_TYPE
    assert wire.decode(message.content) == wire.Envelope(wanted, [], None)


@pytest.mark.parametrize(
    "query",
    [
        "rollout=1",
        "status=asleep",
        "since=yesterday",
        f"until={2**63}",
        "without=status",
        "without=model&model=m",
        "limit=0",
        "limit=1001",
        "cursor=1",
        f"cursor={'f' * 32}",
        f"cursor={'0' * 31}%0A",
    ],
)
def test_query_with_an_invalid_parameter_is_refused(client: httpx.Client, query: str) -> None:
    answer = client.get(f"{ROUTE}?{query}")

    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("query")


@pytest.mark.parametrize("accept", ["application/json", wire.MEDIA_TYPE])
def test_pages_read_during_writes_have_each_generation_once(client: httpx.Client, accept: str) -> None:
    kept = [generation(1_000 + number) for number in range(100)]
    for same in kept[30:50]:
        same.finished_at = kept[30].finished_at
    post(client, wire.encode(kept))
    found: list[str] = []
    asked: dict[str, Any] = {"limit": 7}
    before, behind = iter(range(1_000)), iter(range(2_000, 3_000))

    while True:
        # Add one before all others and one after, between pages.
        post(client, wire.encode([generation(next(before)), generation(next(behind))]))
        answer = client.get(ROUTE, params=asked, headers={"Accept": accept})
        if accept == wire.MEDIA_TYPE:
            page = wire.decode(answer.content)
            found += [each.id for each in page.generations]
            cursor = page.next
        else:
            found += [each["id"] for each in answer.json()["items"]]
            cursor = answer.json()["next"]
        if len(found) > len(kept) or cursor is None:
            break
        asked["cursor"] = cursor

    assert len(set(found)) == len(found)
    wanted = {each.id for each in kept}
    assert [each for each in found if each in wanted] == [each.id for each in kept]


def test_json_lines_are_streamed_page_by_page(server: StoreServer, client: httpx.Client) -> None:
    with open_store(str(server.path)) as file:
        for first in range(0, 600, 100):
            file.add([generation(first + number, prompt=50_000) for number in range(100)])
    process = psutil.Process(server.process.pid)
    client.get(ROUTE, params={"limit": 64})
    before, most, lines = process.memory_info().rss, 0, 0

    with client.stream("GET", ROUTE, headers={"Accept": "application/jsonl"}) as answer:
        for line in answer.iter_lines():
            lines += 1
            if lines % 50 == 0:
                most = max(most, process.memory_info().rss)
                assert json.loads(line)["prompt_token_ids"][0] == lines - 1

    assert lines == 600
    # The whole answer is 170 MiB of text, and 1 GiB as lists.
    assert most - before < 160 * MIB


def test_half_a_surrogate_pair_is_sent_as_a_question_mark(server: StoreServer, client: httpx.Client) -> None:
    kept = generation(1, choices=[Choice(stop_reason="\ud800")])
    with open_store(str(server.path)) as file:
        file.add([kept])

    assert client.get(f"{ROUTE}/{kept.id}").json()["choices"][0]["stop_reason"] == "?"
    assert client.get(ROUTE).json()["items"][0]["choices"][0]["stop_reason"] == "?"
    with open_store(server.url) as store:
        assert [each.choices[0].stop_reason for each in store.generations()] == ["?"]


def test_get_losses_returns_what_was_posted(client: httpx.Client) -> None:
    losses = [Loss(count=n, reason="queue full", first_at=START, last_at=START, host="host", pid=7) for n in (1, 2)]

    for _ in range(2):
        assert post(client, wire.encode([FULL], losses)).is_success

    assert client.get("/v1/agl/losses").json() == {"items": [msgspec.to_builtins(loss) for loss in losses]}


class Served(uvicorn.Server):
    """An `agl store` in a thread of this process."""

    def __init__(self, path: Path) -> None:
        database = open_database(str(path), patience=SECONDS)
        app = application.create_app(database, body_limit=64 * MIB)
        super().__init__(uvicorn.Config(app, port=0, log_config=None))

    @contextmanager
    def running(self) -> Iterator[str]:
        """Run the server and yield its URL."""
        thread = threading.Thread(target=self.run)
        thread.start()
        while not self.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"
        finally:
            self.should_exit = True
            thread.join()


def test_write_backlog_makes_clients_send_generations_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "WAITING_LIMIT", MIB)
    path = tmp_path / "store.db"
    kept = [generation(number, prompt=100_000) for number in range(8)]
    waits: list[tuple[str, float | None]] = []

    def add(each: int) -> None:
        with open_store(url) as store:
            while True:
                try:
                    store.add([kept[each]])
                    return
                except StoreUnavailable as error:
                    waits.append((str(error), error.retry_after))
                    time.sleep(0.01)

    with Served(path).running() as url, closing(open_database(str(path))) as database, ThreadPoolExecutor(8) as pool:
        with database.writing():
            done = [pool.submit(add, number) for number in range(8)]
            while len(waits) < 20:
                time.sleep(0.01)
            answer = httpx.post(f"{url}{ROUTE}", content=wire.encode([kept[0]]), headers=MESSAGE)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        for each in done:
            each.result()
        with open_store(url) as store:
            assert [*store.generations()] == kept
    for why, retry_after in waits:
        assert "wait for the disk already" in why
        assert retry_after == 1.0


def test_write_backlog_answers_other_routes_with_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "WAITING_LIMIT", MIB)
    path = tmp_path / "store.db"
    body = {"input": "x" * MIB}

    with Served(path).running() as url, closing(open_database(str(path))) as database, ThreadPoolExecutor(2) as pool:
        with database.writing():
            done = [pool.submit(httpx.post, f"{url}/v1/agl/rollouts", json=body, timeout=SECONDS) for _ in range(2)]
            [refused] = wait(done, return_when=FIRST_COMPLETED).done
        assert (refused.result().status_code, refused.result().headers["retry-after"]) == (503, "1")
        assert "wait for the disk already" in refused.result().json()["detail"]
        assert sorted(each.result().status_code for each in done) == [201, 503]


def test_body_larger_than_the_backlog_limit_is_stored_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "WAITING_LIMIT", MIB)
    kept = generation(1, prompt=10, prompt_text="x" * 2 * MIB, choices=[Choice(token_ids=array("i", [1]))])

    with Served(tmp_path / "store.db").running() as url, open_store(url) as store:
        assert store.add([kept]) == 1
        assert [*store.generations()] == [kept]


IN_BLOCKS = {"Content-Type": wire.IN_BLOCKS}
LONG = generation(1, prompt_token_ids=array("i", range(2000)), prompt_text="größe " * 2000)
WRONG = {
    "another name": (lambda cut: cut.__setitem__(3, b"sixteen bytes..."), "is not that of its content"),
    "another content": (lambda cut: cut[2].__setitem__(0, bytes(3073)), "is not that of its content"),
    "a short block": (lambda cut: cut[2].__setitem__(1, cut[2][1][:-4]), "block 1 has a length of "),
    "a long block": (lambda cut: cut[2].__setitem__(1, bytes(1 << 16)), "block 1 has a length of "),
    "a long rest": (lambda cut: cut.__setitem__(4, bytes(1024)), "which makes another block"),
    "half an id": (lambda cut: cut.__setitem__(4, bytes(3)), "3 bytes are no token ids"),
    "a key that is none": (lambda cut: cut.__setitem__(0, -1), "cannot be read"),
}


def in_blocks(*kept: Generation) -> Any:
    """Return the message as the lists that MessagePack makes of it."""
    return msgspec.msgpack.decode(wire.encode_in_blocks(kept, None, Recent())[0])


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=[*WRONG])
def test_prompt_whose_blocks_are_wrong_is_refused_and_the_rest_kept(
    client: httpx.Client, change: Callable[[list[Any]], object], reason: str
) -> None:
    message = in_blocks(LONG, generation(2))
    prompt_token_ids = [*Generation.__slots__].index("prompt_token_ids")
    change(message["generations"][0][prompt_token_ids])

    answer = client.post(ROUTE, content=msgspec.msgpack.encode(message), headers=IN_BLOCKS).json()

    assert answer["new"] == 1
    ((refused,),) = [[each for each in answer["refused"] if each["id"] == LONG.id]]
    assert reason in refused["reason"]


def test_prompt_that_continues_an_unknown_block_is_named(client: httpx.Client) -> None:
    message = in_blocks(LONG, generation(2))
    for name, block in (("prompt_token_ids", b"i: sixteen bytes"), ("prompt_text", b"t: sixteen bytes")):
        cut = message["generations"][0][[*Generation.__slots__].index(name)]
        cut[:4] = [7, block, [], block]

    answer = client.post(ROUTE, content=msgspec.msgpack.encode(message), headers=IN_BLOCKS).json()

    assert (answer["new"], answer["refused"], answer["lacking"]) == (1, [], [LONG.id])
    assert client.get(f"{ROUTE}/{LONG.id}").status_code == 404


def test_message_that_names_very_many_blocks_is_answered(client: httpx.Client) -> None:
    """Name as many blocks as a message may have generations: the store has none of them."""
    prompt = [*Generation.__slots__].index("prompt_token_ids")
    kept = [generation(number) for number in range(1000)]
    message = in_blocks(*kept)
    for number, each in enumerate(message["generations"]):
        block = b"i" + number.to_bytes(15, "big")
        each[prompt] = [number + 1, block, [], block, b""]

    answer = client.post(ROUTE, content=msgspec.msgpack.encode(message), headers=IN_BLOCKS).json()

    assert (answer["new"], len(answer["lacking"])) == (0, 1000)


def test_text_that_continues_a_block_of_ids_is_refused(client: httpx.Client) -> None:
    message = in_blocks(LONG, replace(LONG, id=new_id()))
    fields = [[*Generation.__slots__].index(name) for name in ("prompt_token_ids", "prompt_text")]
    ids = message["generations"][0][fields[0]]
    message["generations"][1][fields[1]] = [0, ids[3], [], ids[3], "hello"]

    answer = client.post(ROUTE, content=msgspec.msgpack.encode(message), headers=IN_BLOCKS).json()

    assert (answer["new"], answer["lacking"]) == (1, [])
    assert "is one of another kind" in answer["refused"][0]["reason"]
    assert len(client.get(ROUTE).json()["items"]) == 1


def of_a_million_blocks() -> bytes:
    """Return a message with a prompt of a million empty blocks, and another generation."""
    message = in_blocks(generation(1), generation(2))
    message["generations"][0][[*Generation.__slots__].index("prompt_text")] = [0, b"", [b""] * 1_000_000, b"", ""]
    return msgspec.msgpack.encode(message)


def that_becomes_very_large() -> bytes:
    """Return a message of texts that are compressed to a hundredth: of 320 MiB in all."""
    text = "\N{GRINNING FACE}" * (FIRST + NEXT * 20_000)
    return wire.encode_in_blocks([generation(n, prompt_text=f"{n}{text}") for n in range(4)], None, Recent())[0]


def test_prompt_of_very_many_blocks_is_refused_and_the_rest_kept(client: httpx.Client) -> None:
    """Send a million empty blocks: none is unpacked."""
    answer = client.post(ROUTE, content=of_a_million_blocks(), headers=IN_BLOCKS).json()

    assert answer["new"] == 1
    assert "1000000 blocks, which is more than" in answer["refused"][0]["reason"]


def test_message_that_becomes_very_large_is_to_be_sent_in_parts(client: httpx.Client) -> None:
    body = that_becomes_very_large()

    answer = client.post(ROUTE, content=body, headers=IN_BLOCKS)

    assert len(body) < 8_000_000
    assert (answer.status_code, answer.json()["detail"]) == (413, "the prompts of this message are more than 256 MiB")


def test_refused_blocks_leave_no_memory_behind(server: StoreServer, client: httpx.Client) -> None:
    process = psutil.Process(server.process.pid)
    bodies = of_a_million_blocks(), that_becomes_very_large()

    def send(times: int) -> int:
        for body in bodies * times:
            client.post(ROUTE, content=body, headers=IN_BLOCKS)
        return process.memory_info().rss

    # What Python keeps for later is there after the first times.
    before = send(4)
    assert send(8) - before < 128 * MIB
