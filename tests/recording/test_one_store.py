"""Two vLLM servers and one store, over HTTP and in PostgreSQL: nothing is mixed up or lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentlightning.store import open_store
from tests.common.postgresql import PostgresServer
from tests.recording.load import Load, checked, endless
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until
from tests.server.process import StoreServer

ANSWERS = 30


@pytest.fixture(
    params=[
        *("over HTTP", "in PostgreSQL"),
        pytest.param("over HTTP in PostgreSQL", marks=pytest.mark.tier("all")),
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The store of both servers."""
    kept = None
    if "PostgreSQL" in request.param:
        postgresql: PostgresServer = request.getfixturevalue("postgresql")
        kept = postgresql.new_database()
    if kept is not None and "HTTP" not in request.param:
        yield kept
        return
    with StoreServer(tmp_path / "store.db", store=kept) as server:
        yield server.url


@pytest.fixture
def servers(nursery: Nursery, tmp_path: Path, store: str) -> Iterator[tuple[RecordingServer, RecordingServer]]:
    with (
        nursery.server(tmp_path / "one.db", store=store) as one,
        nursery.server(tmp_path / "other.db", store=store) as other,
    ):
        yield one, other


def test_each_generation_is_under_its_own_rollout(
    servers: tuple[RecordingServer, RecordingServer], store: str, rollout: str
) -> None:
    rollouts = (f"{rollout} of one", f"{rollout} of the other")
    with Load(servers[0], rollouts[0], endless()) as one, Load(servers[1], rollouts[1], endless()) as other:
        until(lambda: min(len(one.answered), len(other.answered)) >= ANSWERS, "answers")

    for load, name in zip((one, other), rollouts, strict=True):
        answered = {stream.number for stream in load.answered}
        until(lambda name=name, answered=answered: answered <= numbers(store, name), "what was answered")
        with open_store(store) as opened:
            checked(opened.generations(rollout_id=name), load.streams)
    with open_store(store) as opened:
        assert [*opened.losses()] == []


def numbers(store: str, rollout: str) -> set[int]:
    with open_store(store) as opened:
        return {int(str(each.attempt_id)) for each in opened.generations(rollout_id=rollout)}
