"""Run with verl: the guide's agent loop returns all rows of a rollout, and ends the rollout of an agent that fails."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import agentlightning as agl
from tests.test_docs import blocks
from tests.trainers.test_trl import answered


class ServerManager:
    """Stands for verl's client of its servers, which needs Ray: it has one server."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.released: list[str] = []

    async def _acquire_server(self, request_id: str) -> tuple[str, None]:
        self.taken.append(request_id)
        return "10.0.0.1:8000", None

    def _release_server(self, server_id: str, request_id: str) -> None:
        assert server_id == "10.0.0.1:8000"
        self.released.append(request_id)


def the_guides_loop(store: Path) -> dict[str, Any]:
    """Execute the guide's block up to its loop, over this store."""
    [block] = [each for each in blocks("python") if "class Recorded(AgentLoopBase)" in each.text]
    code = block.text.replace("http://127.0.0.1:4747", str(store)).partition("rows = list(store.trajectories")[0]
    # The block's own functions would run an agent of the reader's.
    found: dict[str, Any] = {"__name__": "my_loops"}
    exec(code, found)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        guide = the_guides_loop(Path(folder) / "store.db")
        store: agl.Store = guide["store"]
        loop = object.__new__(guide["Recorded"])
        loop.server_manager = ServerManager()
        loop.rollout_config = SimpleNamespace(prompt_length=8, response_length=7)

        def agent(base_url: str, messages: list[Any], sampling_params: dict[str, Any]) -> float:
            found = re.fullmatch(r"http://10\.0\.0\.1:8000/rollout/([^/]+)/attempt/[^/]+/v1", base_url)
            assert found is not None
            assert (messages, sampling_params) == (["a task"], {"temperature": 1.0})
            rollout = store.get_rollout_by_id(found[1])
            assert rollout is not None
            # The second prompt has another id than the first answer: two rows.
            answered(rollout, ([1, 2], [3, 4]), ([1, 2, 3, 9], [5, 6, 7]))
            return 0.5

        guide["run_my_agent"] = agent
        outputs = asyncio.run(loop.run({"temperature": 1.0}, raw_prompt=["a task"]))
        assert [each.response_ids for each in outputs] == [[3, 4], [5, 6, 7]]
        assert [each.reward_score for each in outputs] == [0.5, 0.5]

        def failing(*_: object) -> float:
            raise RuntimeError("no network")

        guide["run_my_agent"] = failing
        with pytest.raises(RuntimeError, match="no network"):
            asyncio.run(loop.run({}, raw_prompt=["another task"]))
        assert [(each.status, each.mode) for each in store.query_rollouts()] == [
            ("succeeded", "train"),
            ("failed", "train"),
        ]
        assert loop.server_manager.taken == loop.server_manager.released
        store.close()


if __name__ == "__main__":
    main()
