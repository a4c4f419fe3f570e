"""A program that calls vLLM in its own process: what names the rollout of each call, and the apps that it serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentlightning.generation import Generation
from agentlightning.store import open_store
from tests.common.tiny_model import tiny_model
from tests.common.vllm import LITTLE_CACHE, NO_WORKER, SMALL
from tests.processes import in_process_program
from tests.recording.nursery import Nursery


class Ran:
    """Return what the program was told, and what was recorded."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        store, told = folder / "generations.db", folder / "told.json"
        options = ("--model", str(tiny_model()), *SMALL, *LITTLE_CACHE, *NO_WORKER, "--api-key=secret")
        program = Path(in_process_program.__file__).read_text()
        self.log = nursery.run(program, str(told), *options, folder=folder, env={"AGL_STORE": str(store)})
        self.told: dict[str, Any] = json.loads(told.read_text())
        with open_store(str(store), read_only=True) as opened:
            self.recorded = [*opened.generations()]

    def by_request(self) -> dict[str, Generation]:
        return {each.request_id: each for each in self.recorded}


@pytest.fixture(scope="module")
def ran(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(nursery, tmp_path_factory.mktemp("in-process"))


@pytest.mark.parametrize(
    ("request_id", "rollout_id"),
    [
        ("in a task", "ro-block"),
        ("iterated later", "ro-block"),
        ("inner", "ro-inner"),
        ("baggage", "ro-baggage"),
        ("agl/ro-id/at-id/critic/1", "ro-id"),
        ("agl/ro-third/2", "ro-first"),
        ("agl/ro-third/3", "ro-second"),
        ("agl/../4", None),
        ("nameless", None),
        ("left", "ro-left"),
        ("handler", "ro-handler"),
    ],
)
def test_the_first_that_names_a_rollout_counts(ran: Ran, request_id: str, rollout_id: str | None) -> None:
    assert ran.by_request()[request_id].rollout_id == rollout_id


def test_a_call_has_the_attempt_and_the_agent_beside_its_rollout(ran: Ran) -> None:
    found = ran.by_request()
    in_block, by_id, by_headers = found["in a task"], found["agl/ro-id/at-id/critic/1"], found["baggage"]

    assert (in_block.attempt_id, in_block.agent_id) == ("at-1", "planner")
    assert (by_id.attempt_id, by_id.agent_id) == ("at-id", "critic")
    assert (by_headers.attempt_id, by_headers.purpose) == (None, "review")


def test_a_call_in_the_process_says_that_it_is_one(ran: Ran) -> None:
    call = ran.by_request()["nameless"]

    assert (call.via, call.endpoint, call.model) == ("process", "AsyncLLM.generate", str(tiny_model()))
    assert call.call_id is not None


def test_choices_of_one_call_are_one_generation(ran: Ran) -> None:
    assert [len(each.token_ids or ()) for each in ran.by_request()["inner"].choices] == [2, 2]


def test_a_call_whose_caller_leaves_is_aborted(ran: Ran) -> None:
    assert ran.by_request()["left"].status == "aborted"


def test_names_for_a_batch_are_an_error_for_a_single_request(ran: Ran) -> None:
    assert ran.told["errors"]["rollouts"] == (
        "agl.rollouts has names for 2 prompts of one call of vLLM's LLM, but this is a single request: use agl.rollout "
        "for each"
    )
    assert "refused" not in ran.by_request()


def test_an_app_that_the_program_builds_takes_prefix_header_and_key(ran: Ran) -> None:
    statuses = ran.told["statuses"]
    over_http = [each for each in ran.recorded if each.via == "http"]

    own = {"own app": 200, "own prefix": 200, "own key": 200}
    assert statuses == {"prefix": 200, "header": 200, "key": 200, "wrong key": 401, "handler": 200, **own}
    assert [(each.rollout_id, each.endpoint) for each in over_http] == [
        ("ro-prefix", "/v1/chat/completions"),
        ("ro-header", "/v1/chat/completions"),
        ("ro-key", "/v1/chat/completions"),
        ("ro-handler", "/ask"),
        ("ro-own", "/rollouts/chat"),
        ("ro-own-prefix", "/rollouts/chat"),
        ("ro-own-key", "/rollouts/chat"),
    ]
