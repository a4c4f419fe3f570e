"""Tests of the routes of senders, without the client of this package and with it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentlightning.errors import InvalidRecord
from agentlightning.generation import Generation, Loss, new_id
from agentlightning.sender import PACKED_LIMIT, Sender, Vocabulary
from agentlightning.store import Store, open_database, open_store, senders, wire
from tests.common.generations import generation
from tests.server.process import StoreServer

STARTED = 1_790_000_000 * 10**9
BYTES = {"Content-Type": "application/octet-stream"}


def vocabulary() -> Vocabulary:
    """Make a vocabulary that no other test uses."""
    return Vocabulary(["<s>", "Ġthe", new_id(), None], frozenset({0}))


def sender(**fields: Any) -> Sender:
    usual: dict[str, Any] = {"host": f"gpu-{new_id()}", "pid": 7, "started_at": STARTED, "version": "0.1.0"}
    return Sender(**usual | {"vllm": "0.32.0", "model": "größe", "vocabulary": vocabulary()} | fields)


@pytest.fixture
def client_store(store: StoreServer) -> Iterator[Store]:
    """Open the store as a vLLM server does."""
    with open_store(store.url) as opened:
        yield opened


def fields_of(each: Sender) -> dict[str, Any]:
    """Return the JSON object that registers a sender."""
    fields = {name: getattr(each, name) for name in ("host", "pid", "started_at", "version", "vllm", "model")}
    return {**fields, "vocabulary": None if each.vocabulary is None else each.vocabulary.digest.hex()}


def put(client: httpx.Client, each: Sender) -> Any:
    answer = client.put(f"/v1/agl/senders/{each.id}", json=fields_of(each))
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(client: httpx.Client, sender_id: str, *generations: Generation) -> Any:
    message = wire.encode(generations, sender_id=sender_id)
    return client.post("/v1/agl/generations", content=message, headers={"Content-Type": wire.MEDIA_TYPE}).json()


def put_vocabulary(client: httpx.Client, digest: str, body: bytes, **headers: str) -> httpx.Response:
    return client.put(f"/v1/agl/vocabularies/{digest}", content=body, headers={**BYTES, **headers})


def report_of(client: httpx.Client, each: Sender) -> Any:
    [found] = [item for item in client.get("/v1/agl/senders").json()["items"] if item["id"] == each.id]
    return found


def test_register_asks_for_the_vocabulary_until_it_is_stored(client: httpx.Client, store: StoreServer) -> None:
    one, same = sender(), sender()
    same = dataclasses.replace(same, vocabulary=one.vocabulary)
    assert one.vocabulary is not None
    kept = generation(1)

    assert put(client, one) == put(client, one) == {"vocabulary": "wanted"}
    assert post(client, one.id, kept) == {"new": 1, "refused": [], "sender": "known"}
    first = put_vocabulary(client, one.vocabulary.digest.hex(), one.vocabulary.to_bytes())
    again = put_vocabulary(client, one.vocabulary.digest.hex(), one.vocabulary.to_bytes())

    assert first.json() == again.json() == {"tokens": 4}
    assert put(client, one) == put(client, same) == {"vocabulary": "known"}
    assert put(client, sender(vocabulary=None)) == {"vocabulary": None}
    with closing(open_database(store.store)) as database, database.reading() as connection:
        assert senders.vocabulary_of(connection, kept.id) == one.vocabulary


def test_client_registers_all_fields_and_sends_the_vocabulary_once(
    client_store: Store, store: StoreServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Vocabulary] = []
    pack = Vocabulary.to_bytes
    monkeypatch.setattr(Vocabulary, "to_bytes", lambda vocabulary: sent.append(vocabulary) or pack(vocabulary))
    one = sender(host="a host\0 of \ud800", model=None)
    other = sender(vocabulary=one.vocabulary)
    kept = [generation(number) for number in range(3)]
    for each in (one, one, other):
        client_store.register_sender(each)
    client_store.add(kept[:2], one.id)
    client_store.add(kept, other.id)

    assert sent == [one.vocabulary]
    assert report_of(client, one)["host"] == "a host\0 of ?"
    assert [report_of(client, each)["minutes"][0]["generations"] for each in (one, other)] == [2, 1]
    with closing(open_database(store.store)) as database, database.reading() as connection:
        assert {senders.vocabulary_digest_of(connection, each.id) for each in kept} == {
            one.vocabulary and one.vocabulary.digest
        }


def test_client_with_an_invalid_sender_is_refused(client_store: Store) -> None:
    for bad in (sender(id="me/../you"), sender(pid=2**63), sender(model="m" * 5_000)):
        with pytest.raises(InvalidRecord, match=r"UUID|pid|model"):
            client_store.register_sender(bad)


def test_senders_of_the_last_hour_are_listed_with_counts_and_lag(client_store: Store, client: httpx.Client) -> None:
    each = sender()
    client_store.register_sender(each)
    silent = report_of(client, each)
    client_store.add([generation(number, prompt=10, output=3) for number in range(4)], each.id)
    lost_at = silent["seen_at"]
    client_store.add_losses(
        [Loss(count=5, reason="queue full", first_at=lost_at, last_at=lost_at, host=each.host, pid=each.pid)]
    )

    found = report_of(client, each)
    assert {name: found[name] for name in fields_of(each)} == fields_of(each)
    assert (silent["minutes"], silent["lag_mean"], silent["lag_max"], silent["lost"]) == ([], None, None, 0)
    [minute] = found["minutes"]
    assert minute == {"minute": minute["minute"], "generations": 4, "prompt_tokens": 40, "output_tokens": 12}
    assert abs(minute["minute"] - found["seen_at"] // (60 * 10**9)) <= 1
    # The generations finished long ago, one second apart.
    assert found["lag_max"] - found["lag_mean"] == pytest.approx(1.5, abs=0.01)
    assert found["lost"] == 5


@pytest.mark.parametrize(
    ("path", "change", "reason"),
    [
        ("no-uuid", {}, "sender_id"),
        (new_id().upper(), {}, "sender_id"),
        (new_id(), {"vocabulary": "a" * 63}, "vocabulary"),
        (new_id(), {"vocabulary": "G" * 64}, "vocabulary"),
        (new_id(), {"pid": "7"}, "pid"),
        (new_id(), {"pid": 2**63}, "pid"),
        (new_id(), {"started_at": None}, "started_at"),
        (new_id(), {"host": 7}, "host"),
        (new_id(), {"model": "m" * 4_097}, "model"),
    ],
)
def test_put_of_an_invalid_sender_is_refused(
    client: httpx.Client, path: str, change: dict[str, Any], reason: str
) -> None:
    answer = client.put(f"/v1/agl/senders/{path}", json=fields_of(sender()) | change)

    assert answer.status_code == 422
    assert reason in answer.json()["detail"]


DIGEST = vocabulary().digest.hex()


@pytest.mark.parametrize(
    ("digest", "body", "status", "reason"),
    [
        (DIGEST, b"", 422, "truncated"),
        (DIGEST, b"a vocabulary", 422, "cannot be decompressed"),
        (DIGEST, zlib.compress(b"[]"), 422, "not an object"),
        (DIGEST, zlib.compress(bytes(100 << 20)), 422, "more than 64 MiB"),
        (DIGEST, Vocabulary(["another"]).to_bytes(), 422, "of another digest"),
        # With spaces in the JSON, equal vocabularies would have two digests.
        (DIGEST, zlib.compress(b'{"tokens": ["a"], "special": []}'), 422, "of another digest"),
        (DIGEST, bytes(PACKED_LIMIT + 1), 413, "larger than 16 MiB"),
        ("abc", vocabulary().to_bytes(), 422, "digest"),
    ],
)
def test_put_of_an_invalid_vocabulary_gives_the_reason(
    client: httpx.Client, store: StoreServer, digest: str, body: bytes, status: int, reason: str
) -> None:
    answer = put_vocabulary(client, digest, body)

    assert answer.status_code == status
    assert reason in answer.json()["detail"]
    with closing(open_database(store.store)) as database, database.reading() as connection:
        assert not senders.has_vocabulary(connection, bytes.fromhex(DIGEST))


def test_put_of_a_vocabulary_with_another_media_type_is_refused(client: httpx.Client) -> None:
    kept = vocabulary()

    answer = put_vocabulary(client, kept.digest.hex(), kept.to_bytes(), **{"Content-Type": "application/json"})

    assert answer.status_code == 415
    assert "application/octet-stream" in answer.json()["detail"]


@pytest.mark.parametrize("sender_id", ["no uuid", "", new_id()])
def test_generations_of_an_unregistered_sender_are_stored(client: httpx.Client, sender_id: str) -> None:
    assert post(client, sender_id, generation(1)) == {"new": 1, "refused": [], "sender": "unknown"}


def test_client_registers_again_after_the_database_was_replaced(tmp_path: Path) -> None:
    path, each, kept = tmp_path / "store.db", sender(), [generation(number) for number in range(3)]
    with StoreServer(path) as server, open_store(server.url) as client_store, server.client() as client:
        client_store.register_sender(each)
        client_store.add(kept[:1], each.id)
        server.kill()
        for file in tmp_path.glob("store.db*"):
            file.unlink()
        server.start()
        assert client.get("/v1/agl/senders").json()["items"] == []

        client_store.add(kept[1:2], each.id)
        client_store.add(kept[2:], each.id)

        assert report_of(client, each)["minutes"][0]["generations"] == 1
        with closing(open_database(str(path))) as database, database.reading() as connection:
            assert senders.vocabulary_of(connection, kept[2].id) == each.vocabulary


def test_client_registers_no_sender_but_its_own(client_store: Store, client: httpx.Client) -> None:
    client_store.register_sender(sender())
    stranger = new_id()

    assert client_store.add([generation(1)], stranger) == 1

    assert stranger not in {item["id"] for item in client.get("/v1/agl/senders").json()["items"]}


def progress(client: httpx.Client, sender_id: str, **fields: Any) -> httpx.Response:
    return client.put(f"/v1/agl/senders/{sender_id}/progress", json={"watermark": STARTED, **fields})


def test_reports_of_a_sender_show_its_state_and_the_difference_of_the_clocks(client: httpx.Client) -> None:
    each = sender()
    put(client, each)
    assert (report_of(client, each)["state"], report_of(client, each)["watermark"]) == ("live", None)

    first = progress(client, each.id).json()["time"]
    second = progress(
        client,
        each.id,
        watermark=STARTED + 7,
        store_time={"time": first, "received_at": STARTED + 5},
        under_way=[{"rollout_id": "r", "attempt_id": None, "count": 2}],
    )

    assert second.status_code == 200
    assert second.json()["time"] >= first
    found = report_of(client, each)
    assert (found["state"], found["watermark"], found["under_way"]) == ("live", STARTED + 7, 2)
    assert found["clock_difference"] == first - STARTED - 5
    progress(client, each.id, has_ended=True)
    assert (report_of(client, each)["state"], report_of(client, each)["under_way"]) == ("ended", 0)


def test_a_report_of_an_unknown_sender_is_not_found(client: httpx.Client) -> None:
    answer = progress(client, new_id())

    assert (answer.status_code, answer.headers[wire.ERROR_HEADER]) == (404, wire.NOT_FOUND)
    assert "not registered" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"watermark": None}, "watermark"),
        ({"watermark": 2**63}, "watermark"),
        ({"store_time": {"time": 1}}, "received_at"),
        ({"under_way": [{"rollout_id": 7, "attempt_id": None, "count": 1}]}, "rollout_id"),
        ({"under_way": [{"rollout_id": "a\0b", "attempt_id": None, "count": 1}]}, "rollout_id"),
        ({"under_way": [{"rollout_id": "r", "attempt_id": None, "count": 1}] * ((1 << 16) + 1)}, "under_way"),
        ({"under_way": [{"rollout_id": "r", "attempt_id": None, "count": 2**31}]}, "count"),
        ({"under_way": [{"rollout_id": "r", "attempt_id": None, "count": 0}]}, "count"),
        ({"lost": [{"id": "me", "rollout_id": None, "attempt_id": None, "count": 1, "reason": ""}]}, "id"),
        ({"has_ended": 1}, "has_ended"),
    ],
)
def test_an_invalid_report_is_refused(client: httpx.Client, change: dict[str, Any], reason: str) -> None:
    each = sender()
    put(client, each)

    answer = progress(client, each.id, **change)

    assert answer.status_code == 422
    assert reason in answer.json()["detail"]
    assert report_of(client, each)["watermark"] is None


def test_the_wait_for_recorded_rollouts_and_triplets_say_who_is_behind(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        each = sender()
        put(client, each)
        rollout = client.post("/v1/agl/rollouts", json={"input": 1}).json()
        rollout_id, attempt_id = rollout["rollout_id"], rollout["attempt"]["attempt_id"]
        client.post(f"/v1/agl/rollouts/{rollout_id}/attempts/{attempt_id}", json={"status": "succeeded"})

        def waited(recorded: bool) -> list[str]:
            body = {"rollout_ids": [rollout_id], "timeout": 0, "recorded": recorded}
            return [found["rollout_id"] for found in client.post("/v1/agl/waits/rollouts", json=body).json()]

        def triplets(**headers: str) -> httpx.Response:
            return client.get(f"/v1/agl/rollouts/{rollout_id}/attempts/{attempt_id}/triplets", headers=headers)

        assert (waited(False), waited(True)) == ([rollout_id], [])
        told = triplets().json()
        assert (told["items"], told["complete"], told["status"], told["ended"]) == ([], False, "succeeded", True)
        assert [(found["sender_id"], found["host"], found["seconds"]) for found in told["behind"]] == [
            (each.id, each.host, None)
        ]
        assert triplets(Accept="application/jsonl").headers["X-AGL-Complete"] == "false"

        progress(client, each.id, has_ended=True)

        assert waited(True) == [rollout_id]
        told = triplets().json()
        empty = ("items", "under_way", "behind", "silent", "lost", "unrecorded")
        assert told == {"complete": True, "status": "succeeded", "ended": True, **{name: [] for name in empty}}
        assert triplets(Accept="application/jsonl").headers["X-AGL-Complete"] == "true"
        asked = {"rollout_id": rollout_id}
        assert client.get("/v1/agl/completeness", params=asked).json()["complete"] is True
        assert client.get("/v1/agl/completeness").status_code == 422
