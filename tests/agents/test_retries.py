"""Real coding agents whose first call fails: their SDKs ask again, and say so, which is recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentlightning.store import open_store
from tests.common.agents import ANSWER, STORIES, run
from tests.common.failing_proxy import Failure, failing_once
from tests.conftest import ScriptedServer
from tests.recording.server import until
from tools.agents import MISSING_NPM, commands_of

NEEDS_NPM = pytest.mark.tier("all")
CALLS = {"mini": 2, "claude": 4, "qwen": 4}
"""The number of calls that each agent has in its story."""


@pytest.mark.parametrize(
    ("agent", "failure"),
    [
        ("mini", "answer lost"),
        *(pytest.param(agent, failure, marks=NEEDS_NPM) for agent in ("claude", "qwen") for failure in ("500", "429")),
    ],
)
@pytest.mark.takes_long("installs the agent the first time")
def test_a_call_that_failed_is_recorded_as_the_retry_that_it_is(
    scripted: ScriptedServer, tmp_path: Path, agent: str, failure: Failure
) -> None:
    if commands_of(agent) is None:
        pytest.skip(MISSING_NPM)
    server, rollout = scripted.server, f"ro-{agent}-{failure.replace(' ', '-')}"
    scripted.follows(STORIES[agent])
    is_lost = failure == "answer lost"

    with failing_once(server.url, failure) as url:
        output = run(agent, f"{url}/rollout/{rollout}/attempt/at-1/v1", tmp_path / agent)

    assert ANSWER in output
    calls = CALLS[agent] + is_lost
    until(lambda: len(server.kept(rollout_id=rollout)) >= calls, f"{calls} calls of {agent}")
    tries = [each.retry for each in server.kept(rollout_id=rollout)]
    # Claude Code tries again by itself, and its SDK says each time that it is the first.
    again = 0 if agent == "claude" else 1
    assert tries == [*([0] if is_lost else []), again, *([0] * (CALLS[agent] - 1))]
    with open_store(server.store, read_only=True) as store:
        [attempt] = store.drift(rollout)
        rows = [*store.trajectories(rollout)]
    # The agent never saw the first answer: what it says next goes on from the second.
    retries = [(each.generation_id, each.is_certain) for each in attempt.breaks if each.cause == "retry"]
    assert retries == ([(server.kept(rollout_id=rollout)[1].id, True)] if is_lost else [])
    assert all(server.kept(rollout_id=rollout)[0].id != span.generation_id for row in rows for span in row.spans) or (
        not is_lost
    )
