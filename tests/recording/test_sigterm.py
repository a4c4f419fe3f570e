"""SIGTERM under load: unfinished requests end with the server, and are recorded."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from agentlightning.store import open_store
from tests.recording.load import Load, checked, endless
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until

TOKENS_UNTIL_THE_END = 900
AT_ONCE = 16


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), id="one API server"),
        pytest.param(("--api-server-count=2",), id="two API servers", marks=pytest.mark.tier("all")),
    ],
)
def test_unfinished_requests_are_recorded_while_clients_stay(
    nursery: Nursery, tmp_path: Path, rollout: str, arguments: tuple[str, ...]
) -> None:
    with nursery.server(tmp_path / "generations.db", *arguments) as server:
        with Load(server, rollout, endless(TOKENS_UNTIL_THE_END), AT_ONCE) as load:
            until(lambda: len(load.begun) == AT_ONCE, "answers that have begun")
            server.process.send_signal(signal.SIGTERM)
            # vLLM waits for its clients, or kills the process that they wait for.
            until(lambda: len(server.kept(rollout_id=rollout)) >= AT_ONCE, "all of them")
        server.process.wait(60)

        kept = checked(server.kept(rollout_id=rollout), load.streams)
        # A client that was told the end comes with its next request, which the server may not take any more.
        assert kept.keys() >= {stream.number for stream in load.begun}
        # Where vLLM tells its clients that its engine is gone, an error, and where it does not, aborted.
        assert {each.status for each in kept.values()} <= {"aborted", "error"}
        assert losses(server) == 0


def test_queued_generations_are_recorded(nursery: Nursery, tmp_path: Path, rollout: str) -> None:
    with nursery.server(tmp_path / "generations.db") as server:
        with Load(server, rollout, endless(1), 64) as load:
            until(lambda: len(load.answered) > 200, "answers")
            server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)

        kept = checked(server.kept(rollout_id=rollout), load.streams)
        assert {stream.number for stream in load.answered} <= kept.keys()
        assert losses(server) == 0


def losses(server: RecordingServer) -> int:
    with open_store(str(server.path)) as store:
        return sum(loss.count for loss in store.losses())
