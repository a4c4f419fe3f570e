"""The drift of a served store: rollouts are compared beside the requests, and a damaged one harms no other."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from agentlightning.store import open_database, open_store
from tests.drift.conversations import conversation, record
from tests.server.process import StoreServer

NOT_YET = "not compared yet"
SECONDS = 60


@pytest.fixture
def store(new_store: Callable[[Path], str], tmp_path: Path) -> Iterator[StoreServer]:
    """`agl store` for one test, which damages what it has."""
    path = tmp_path / "store.db"
    with StoreServer(path, store=new_store(path)) as server:
        yield server


def until_compared(store: StoreServer) -> None:
    """Look at the page of drift until all rollouts are compared."""
    ends = time.monotonic() + SECONDS
    while NOT_YET in _page(store, "/drift"):
        assert time.monotonic() < ends, "rollouts are not compared"
        time.sleep(0.05)


def _page(store: StoreServer, path: str) -> str:
    answer = httpx.get(f"{store.url}{path}", headers={"Accept": "text/html"}, timeout=60)
    assert answer.status_code == 200
    return answer.text


def test_a_damaged_rollout_is_noted_in_the_log_and_the_others_are_compared(store: StoreServer) -> None:
    damaged, broken = uuid.uuid4().hex, uuid.uuid4().hex
    with open_store(store.store) as recorded:
        record(recorded, *conversation(damaged, "It is.\n\n"))
        record(recorded, *conversation(broken, "It is.\n\n", 11))
    _damage(store.store, damaged)

    until_compared(store)

    assert broken in _page(store, "/rollouts?breaks=1..")
    assert damaged not in _page(store, "/rollouts?breaks=1..")
    assert f"the prompts of rollout '{damaged}' cannot be compared" in store.log.read_text()
    for path in ("/", "/rollouts", "/drift", "/metrics"):
        assert _page(store, path)


def _damage(url: str, rollout: str) -> None:
    """Store ids of which one has too few bytes."""
    database = open_database(url)
    with database.writing() as connection:
        ids = "X'0102030405'" if "://" not in url else "'\\x0102030405'::bytea"
        connection.exec_driver_sql(
            f"UPDATE choices SET token_ids = {ids} WHERE generation_key IN (SELECT generations.key FROM generations "
            f"JOIN texts ON texts.key = rollout_key WHERE text = '{rollout}')"
        )
    database.close()
