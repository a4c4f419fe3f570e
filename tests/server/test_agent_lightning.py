"""Tests of Agent Lightning 0.3 against `agl store`: its client, its tracer, its trainer.

`lightning/interface.py` asks what the store tests of 0.3.0 ask (`tests/store` in its repository, not in its packages):
each question goes through its client to its own server and to `agl store`, and the answers are compared. Intended
differences are listed below with the reason, in `REFUSALS`, `CHOSEN` and `WITHOUT_END`. These of its tests pass through
its client with its own server, but not with `agl store`:

- tests that expect resource ids of 15 characters: `agl store` makes UUIDs, so that several servers never make the same;
- tests that expect a status of 500 or 400 in a refusal: `agl store` sends 404 and 422, which its client does not retry;
- tests that set the clock of the store, or look for a line in its log: `agl store` is another process, and logs no span
  that was sent twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.common.vllm import without_agl
from tests.server.process import StoreServer

SCRIPTS = Path(__file__).parent / "lightning"
SECONDS = 240
SECTIONS = (
    "resources",
    "queue",
    "changes",
    "attempts",
    "rollouts",
    "workers",
    "spans",
    "waits",
    "deadlines",
    "revivals",
    "errors",
    "statistics",
    "leniences",
)

REFUSALS = {500: 404, 400: 422}
"""Status of Agent Lightning's server for an unknown id and for an invalid value, and that of `agl store`.

Its client retries after the first for seconds.
"""

CHOSEN: dict[str, dict[str, tuple[Any, Any]]] = {
    # Cancelling a rollout removes it from the queue, so it is queued again at the end, not in its former place.
    "changes": {
        "one that was cancelled in the queue and is queued again": ([["d", 1], ["e", 1]], [["e", 1], ["d", 1]])
    },
    "spans": {
        # An "or" of no conditions: `agl store` finds all spans, as both stores do for rollouts and workers.
        "found of one of nothing": (
            [[], -1, 0, 0],
            [["s", "many 3", "low", "many 5", "high", "child", "second try", "parent"], -1, 0, 8],
        ),
        # A client that sends a span again, because the answer was lost, is alive.
        "added again is no sign of life": (True, False),
    },
    # A span of an attempt that has ended does not revive it, so its rollout cannot be running. In Agent Lightning's
    # store the rollout is, with no runner, until it times out again.
    "revivals": {
        f"{status}, {what}": found
        for status in ("timeout", "failed")
        for what, found in {
            "rollout after a span": ("running", "requeuing"),
            "queue after a span": ([], [[f"gone, {status}", 2]]),
        }.items()
    },
}
"""Intended differences: what is found in Agent Lightning's store, and in `agl store`."""


WITHOUT_END = {
    "attempts": ["one that ended may be tried again"],
    "changes": [
        *(f"input=together, mode=val, metadata={{}}, status=requeuing{again}" for again in ("", ", read again")),
        "queued again",
    ],
}
"""Facts of a rollout that had ended and runs, or waits, again: Agent Lightning's store keeps the former end time."""


class Script:
    """A script in the environment of Agent Lightning, which ends with the context."""

    def __init__(self, lightning: Path, log: Path, name: str, *arguments: str) -> None:
        # Otherwise LiteLLM, which it imports, would fetch the prices of models over the network.
        env = {**without_agl(os.environ), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        env.pop("PYTHONPATH", None)
        command = [lightning / "python", SCRIPTS / name, *arguments]
        self._log = log
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8"
            )
        self._timer = threading.Timer(SECONDS, self._process.kill)

    def __enter__(self) -> Script:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.wait()

    def wait_for(self, number: int) -> None:
        """Wait until the script prints this number or a higher one."""
        while line := self._line():
            if int(line) >= number:
                return
        self.outcome()

    def outcome(self) -> Any:
        """Wait for the end of the script, and parse the JSON that it prints last."""
        printed = list(iter(self._line, ""))
        status = self._process.wait()
        assert status == 0, self._log.read_text(encoding="utf-8")
        return json.loads(printed[-1])

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def found(
    lightning: Path, tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what the client found in Agent Lightning's store, `reference`, and in `agl store`, `actual`."""
    folder = tmp_path_factory.mktemp("interface")
    path = folder / "store.db"
    with (
        StoreServer(path, store=new_store(path)) as server,
        Script(lightning, folder / "script.log", "interface.py", server.url) as script,
    ):
        return script.outcome()


def test_script_covers_every_section_of_the_interface(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    assert tuple(found["actual"]) == tuple(found["reference"]) == SECTIONS
    assert sum(len(facts) for facts in found["actual"].values()) > 250


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in ("errors", "queue", "statistics")])
def test_client_finds_the_same_as_in_agent_lightnings_own_store(
    section: str, found: dict[str, dict[str, dict[str, Any]]]
) -> None:
    reference, actual = found["reference"][section], found["actual"][section]
    chosen = CHOSEN.get(section, {})
    without_end = {name: {**reference[name], "end_time": None} for name in WITHOUT_END.get(section, ())}
    assert actual == {**reference, **{name: here for name, (_, here) in chosen.items()}, **without_end}
    assert all(reference[name]["end_time"] == "now" for name in without_end)
    assert {name: reference[name] for name in chosen} == {name: there for name, (there, _) in chosen.items()}


def test_queue_is_the_same_except_that_an_idle_worker_has_no_rollout(
    found: dict[str, dict[str, dict[str, Any]]],
) -> None:
    reference, actual = found["reference"]["queue"], found["actual"]["queue"]
    was_busy = "worker that was busy and finds it empty"
    assert reference[was_busy]["status"] == "idle"
    assert reference[was_busy]["current_attempt_id"]
    nothing = {"current_rollout_id": None, "current_attempt_id": None}
    assert actual == {**reference, was_busy: {**reference[was_busy], **nothing}}


def test_invalid_request_is_refused_with_a_status_that_is_not_retried(
    found: dict[str, dict[str, dict[str, Any]]],
) -> None:
    reference, actual = found["reference"]["errors"], found["actual"]["errors"]
    assert actual == {name: REFUSALS.get(there, there) for name, there in reference.items()}
    assert {404, 422} <= set(actual.values())


def test_statistics_count_the_same(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    reference, actual = found["reference"]["statistics"], found["actual"]["statistics"]
    assert (reference["name"], actual["name"]) == ("InMemoryLightningStore", "agl store")
    # Plus the two attempts that were queued again despite a late span.
    totals = {
        **reference["totals"],
        "total_attempts": reference["totals"]["total_attempts"] + 2,
        "total_generations": 0,
    }
    assert actual == {**reference, "name": "agl store", "totals": totals}


def test_trainer_with_runner_and_tracer_needs_only_the_url_with_the_key(lightning: Path, tmp_path: Path) -> None:
    key = "s3cret/ü:@%"
    with StoreServer(tmp_path / "store.db", key=key) as server:
        url = server.url.replace("//", f"//agl:{quote(key, safe='')}@")
        with Script(lightning, tmp_path / "script.log", "training.py", url) as script:
            found = script.outcome()
    assert {task: each["status"] for task, each in found["rollouts"].items()} == {
        "1": "succeeded",
        "13": "failed",
        "2": "succeeded",
        "3": "succeeded",
    }
    assert {task: each["mode"] for task, each in found["rollouts"].items()} == {
        "1": "train",
        "13": "train",
        "2": "train",
        "3": "val",
    }
    assert {task: each["reward"] for task, each in found["rollouts"].items()} == {
        "1": 0.5,
        "13": None,
        "2": 1.0,
        "3": 1.5,
    }
    for task, each in found["rollouts"].items():
        # The message came by OTLP, to the same URL.
        assert each["messages"] == [f"task {task} ü"]
        assert each["numbered"] == sorted(set(each["numbered"]))
        assert each["is_of_latest"]
    [(status, stats)] = found["workers"]
    assert status == "idle"
    assert stats


def test_runners_continue_after_the_server_was_restarted(lightning: Path, tmp_path: Path, thorough: bool) -> None:
    rollouts = 60 if thorough else 20
    with (
        StoreServer(tmp_path / "store.db") as server,
        Script(lightning, tmp_path / "script.log", "runners.py", server.url, str(rollouts)) as script,
    ):
        for finished in (10, 35) if thorough else (3, 9):
            script.wait_for(finished)
            server.stop()
            server.start()
        found = script.outcome()
    assert len(found) == rollouts
    for each in found:
        assert each["status"] == "succeeded"
        assert each["attempts"].count("succeeded") == 1, each
        assert set(each["attempts"]) <= {"succeeded", "unresponsive"}, each
        assert each["spans"] == ["span 0", "span 1", "span 2"]
