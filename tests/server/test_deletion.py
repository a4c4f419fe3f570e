"""`DELETE /v1/agl/rollouts/{id}`, and what the server deletes afterwards."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Connection, func, select

from agentlightning.server import transactions
from agentlightning.server.transactions import Transactions
from agentlightning.store import open_database, open_store, tables
from agentlightning.store.chains import FIRST
from tests.common.generations import generation
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
