"""Many sessions of the AgentOps SDK at once: none lost, mixed up or duplicated."""

from __future__ import annotations

import os
import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.agentops.client import SdkClient
from tests.agentops.conftest import Run
from tests.recording.server import until
from tests.server.process import StoreServer
from tests.server.test_otlp import a_span

PROCESSES = 4
SESSIONS = (13, 13, 12, 12)


def test_fifty_sessions_from_four_processes_stay_apart(store: StoreServer, client: httpx.Client, run_sdk: Run) -> None:
    with ThreadPoolExecutor(PROCESSES) as processes:
        made = processes.map(
            lambda number: run_sdk(store, "many_sessions.py", f"p{number}", str(SESSIONS[number]), "5"),
            range(PROCESSES),
        )
        sessions = {trace_id: names for some in made for trace_id, names in some.items()}

    assert len(sessions) == sum(SESSIONS)
    rollouts = set()
    for trace_id, names in sessions.items():
        found = client.get("/v1/agl/spans", params={"trace_id": trace_id}).json()["items"]
        [(rollout_id, attempt_id)] = {(each["rollout_id"], each["attempt_id"]) for each in found}
        rollouts.add(rollout_id)
        name, number, _ = names[0].split("-")
        assert sorted(each["name"] for each in found) == sorted(
            [*(f"{each}.task" for each in names), f"{name}-{number}.session"]
        )
        kept = client.get(f"/v1/agl/rollouts/{rollout_id}").json()
        assert kept["status"] == ("failed" if int(number) % 5 == 0 else "succeeded")
        assert kept["attempt"]["attempt_id"] == attempt_id
    assert len(rollouts) == sum(SESSIONS)


def test_killed_server_keeps_acknowledged_spans(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", "--agentops") as server:
        with server.client() as client:
            sdk = SdkClient(client)
            acknowledged = []
            trace_id = uuid.uuid4().hex
            for _ in range(50):
                span = a_span(traceId=trace_id, parentSpanId="00000000000000ff")
                sdk.send(span)
                acknowledged.append(span)
            place = sdk.place(trace_id)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        server.start()
        with server.client() as client:
            sdk.http = client
            # A client without an answer sends again.
            sdk.send(*acknowledged[-3:], sdk.session(trace_id))
            found = client.get("/v1/agl/spans", params={"trace_id": trace_id}).json()["items"]

            assert sdk.place(trace_id) == place
            assert {each["spanId"] for each in acknowledged} < {each["span_id"] for each in found}
            assert len(found) == len(acknowledged) + 1
            assert sdk.rollout(place[0])["status"] == "succeeded"


@pytest.mark.parametrize("sessions", [12])
def test_restarted_server_keeps_resent_spans_once(tmp_path: Path, run_sdk: Run, sessions: int) -> None:
    with (
        StoreServer(tmp_path / "store.db", "--agentops") as server,
        ThreadPoolExecutor(1) as thread,
    ):
        running = thread.submit(run_sdk, server, "many_sessions.py", "p", str(sessions), "3")
        with server.client() as client:
            until(lambda: client.get("/v1/agl/statistics").json()["total_spans"] >= 5, "spans")
        server.kill()
        server.start()
        made = running.result()
        with server.client() as client:
            statistics = client.get("/v1/agl/statistics").json()
            assert statistics["total_rollouts"] == len(made) == sessions
            for trace_id, names in made.items():
                found = client.get("/v1/agl/spans", params={"trace_id": trace_id}).json()["items"]
                assert len({each["rollout_id"] for each in found}) == 1
                assert len(found) == len(names) + 1
