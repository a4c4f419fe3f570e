"""`DELETE /v1/agl/rollouts/{id}`, `POST /v1/agl/prune`, and what the server deletes afterwards."""

from __future__ import annotations

import asyncio
import json
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, func, select

from agentlightning.cli import main
from agentlightning.rollout_records import Pruned
from agentlightning.server import transactions
from agentlightning.server.transactions import Transactions
from agentlightning.store import open_database, open_store, pruning, tables
from agentlightning.store.chains import FIRST
from tests.common.generations import generation
from tests.common.processes import SECONDS
from tests.server.process import StoreServer


def test_rollout_is_deleted_once_it_has_ended(store: StoreServer, client: httpx.Client) -> None:
    with open_store(store.url) as opened:
        rollout = opened.start_rollout("a task")
        opened.add([generation(n, rollout_id=rollout.rollout_id) for n in range(100)])
        route = f"/v1/agl/rollouts/{rollout.rollout_id}"

        refused = client.delete(route)
        rollout.finish("succeeded")
        deleted = client.delete(route)
        again = client.delete(route)

        assert refused.status_code == 409
        assert f"'{rollout.rollout_id}' is preparing; wait until it has ended" in refused.json()["detail"]
        assert (deleted.status_code, deleted.content) == (204, b"")
        assert again.status_code == 404
        assert opened.get_rollout_by_id(rollout.rollout_id) is None
        assert [*opened.generations(rollout_id=rollout.rollout_id)] == []


def test_agl_prune_works_on_a_server_with_its_filters(store: StoreServer, capsys: pytest.CaptureFixture[str]) -> None:
    with open_store(store.url) as opened:
        ended, kept = opened.start_rollout("a task"), opened.start_rollout("another")
        for each, status in ((ended, "failed"), (kept, "succeeded")):
            opened.add([generation(n, rollout_id=each.rollout_id) for n in range(10)])
            each.finish(status)  # type: ignore[arg-type]
        command = ["prune", "--store", store.url, "--status", "failed", "--rollout", ended.rollout_id]

        assert main([*command, "--dry-run"]) == 0
        assert capsys.readouterr().out.startswith("Would delete 1 rollouts, 1 attempts, 10 generations: about ")
        assert main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)

        assert (found["dry_run"], found["rollouts"], found["generations"]) == (False, 1, 10)
        assert found["size_before"] > 0
        assert found["size_after"] > 0
        assert opened.get_rollout_by_id(ended.rollout_id) is None
        assert len([*kept.generations()]) == 10


def test_agl_prune_says_where_a_servers_database_is_written_anew(
    store: StoreServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "--store", store.url, "--vacuum"]) == 1

    assert "run it on the store's own host" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        {"older_than": -1},
        {"older_than": "7d"},
        {"status_in": ["running"]},
        {"rollout_ids": [""]},
        {"dry_run": 1},
        {"dryRun": True},
    ],
)
def test_senseless_filters_are_refused_and_delete_nothing(client: httpx.Client, body: dict[str, Any]) -> None:
    refused = client.post("/v1/agl/prune", json=body)

    assert refused.status_code == 422
    assert next(iter(body)) in refused.json()["detail"]


def test_a_long_step_is_not_taken_for_a_server_that_is_gone(
    new_store: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_store(tmp_path / "store.db")
    goes_on = threading.Event()

    def steps(*_: Any, **__: Any) -> Iterator[Pruned]:
        yield Pruned(1)
        assert goes_on.wait(SECONDS)
        yield Pruned(1, {"rollouts": 1})

    monkeypatch.setattr(pruning, "prune", steps)
    monkeypatch.setattr(transactions, "SECONDS_OF_SILENCE", 0.01)

    async def script() -> list[Pruned]:
        with closing(open_database(url)) as database:
            running = Transactions(database)
            found: list[Pruned] = []
            async for each in running.prune({}, dry_run=False):
                found.append(each)
                if len(found) == 3:
                    goes_on.set()
            await running.close()
        return found

    found = asyncio.run(script())
    assert found[:3] == [Pruned(1)] * 3
    assert found[-1] == Pruned(1, {"rollouts": 1})


def test_texts_of_a_deleted_rollout_go_later(
    new_store: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_store(tmp_path / "store.db")
    monkeypatch.setattr(transactions, "SECONDS_BETWEEN_SEARCHES", 0.01)
    with open_store(url) as store:
        store.add([generation(n, rollout_id=f"ro-{n}", prompt_token_ids=array("i", range(FIRST))) for n in range(2)])

    def count(connection: Connection) -> int:
        return connection.execute(select(func.count()).select_from(tables.texts)).scalar_one()

    async def script() -> None:
        with closing(open_database(url)) as database:
            running = Transactions(database)
            before = await running.read(count)
            assert await running.delete("ro-1")
            # Its id; its attempt, model and the rest are those of the other.
            while await running.read(count) > before - 1:
                await asyncio.sleep(0.01)
            await running.close()

    asyncio.run(script())
    with open_store(url) as store:
        assert [each.rollout_id for each in store.generations()] == ["ro-0"]
