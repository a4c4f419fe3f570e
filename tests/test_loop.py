"""The whole loop, as `make demo-rollout` runs it: a queue, two runners, an agent with a tool, what is learnt from, and
the page.
"""

from __future__ import annotations

import os
import pty
import re
import sys
from copy import deepcopy
from pathlib import Path

import httpx
import pytest

from examples.loop import ARGUMENTS, CALLS, ROLLOUTS, RUNNERS, Outcome, run, show, vllm_for
from tests.common.environments import CHECKOUT
from tests.common.reference import tokenizer
from tests.common.vllm import RemoteOpenAIServer
from tests.recording.nursery import Nursery
from tests.server.process import StoreServer

FEWER_ROLLOUTS = 6
AT_A_TERMINAL = """\
import pathlib, sys
from examples.loop import show
from tests.server.process import StoreServer
with StoreServer(pathlib.Path(sys.argv[1])) as store:
    show(store)
"""
CTRL_C = b"\x03"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the store of the loop is."""
    return tmp_path_factory.mktemp("loop") / "store.db"


@pytest.fixture(scope="module")
def rollouts(thorough: bool) -> int:
    return ROLLOUTS if thorough else FEWER_ROLLOUTS


@pytest.fixture(scope="module")
def loop(file: Path, nursery: Nursery, rollouts: int, thorough: bool) -> tuple[RemoteOpenAIServer, list[Outcome]]:
    """The vLLM, which has been stopped, and what became of each run."""
    with StoreServer(file) as store:
        forked = nursery.server(file, *ARGUMENTS, store=store.url, env={"AGL_LOGPROBS": "on"})
        with vllm_for(store) if thorough else forked as vllm:
            return vllm, run(store, vllm, rollouts, RUNNERS)


@pytest.fixture(scope="module")
def outcomes(loop: tuple[RemoteOpenAIServer, list[Outcome]]) -> list[Outcome]:
    return loop[1]


def test_every_rollout_is_run_once_and_succeeds(outcomes: list[Outcome], rollouts: int) -> None:
    assert len(outcomes) == len({each.run.rollout_id for each in outcomes}) == rollouts
    for each in outcomes:
        latest = each.rollout["attempt"]
        assert (each.rollout["status"], latest["status"]) == ("succeeded", "succeeded")
        assert (latest["attempt_id"], latest["worker_id"]) == (each.run.attempt_id, each.run.worker_id)
        assert latest["sequence_id"] == 1


def test_every_id_is_the_one_that_vllm_itself_returned_in_the_order_of_the_calls(outcomes: list[Outcome]) -> None:
    for each in outcomes:
        kept = [
            (triplet["response_id"], triplet["prompt_token_ids"], triplet["response_token_ids"])
            for triplet in each.triplets
        ]
        assert len(kept) == CALLS
        assert all(prompt and response for _, prompt, response in kept)
        assert kept == [(call.response_id, call.prompt_token_ids, call.response_token_ids) for call in each.run.calls]
        assert each.is_exact


def test_a_triplet_says_whose_it_is(loop: tuple[RemoteOpenAIServer, list[Outcome]]) -> None:
    vllm, outcomes = loop
    for each in outcomes:
        for triplet in each.triplets:
            assert (triplet["rollout_id"], triplet["attempt_id"]) == (each.run.rollout_id, each.run.attempt_id)
            assert (triplet["model"], triplet["status"]) == (vllm.model, "finished")


def test_the_last_call_has_the_reward(outcomes: list[Outcome]) -> None:
    for each in outcomes:
        assert [triplet["reward"] for triplet in each.triplets] == [None, each.run.reward]


def test_both_prompts_have_the_question_and_the_second_what_the_tool_said(outcomes: list[Outcome]) -> None:
    for each in outcomes:
        first, second = (tokenizer().decode(triplet["prompt_token_ids"]) for triplet in each.triplets)
        question, said = f"user\n{each.run.task['question']}", f"tool\n{each.run.result}"
        assert question in first
        assert question in second
        assert said not in first
        assert said in second


def test_one_other_id_is_noticed(outcomes: list[Outcome]) -> None:
    other = deepcopy(outcomes[0])
    other.triplets[1]["response_token_ids"][-1] += 1

    assert not other.is_exact


def test_where_nobody_is_at_a_terminal_it_says_how_to_serve_the_file_again(
    outcomes: list[Outcome], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StoreServer(file) as store:
        show(store)
        assert store.process.poll() is not None

    said = capsys.readouterr().out
    [path] = re.findall(r"agl store --store (\S+)", said)
    with StoreServer(Path(path).absolute()) as again:
        page = httpx.get(f"{again.url}/").text
    assert all(each.run.rollout_id in page for each in outcomes)


def test_at_a_terminal_the_page_is_served_until_ctrl_c(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(CHECKOUT)
        os.execv(sys.executable, [sys.executable, "-c", AT_A_TERMINAL, str(tmp_path / "store.db")])
    said = b""
    while b"Ctrl-C ends it" not in said:
        said += os.read(terminal, 1024)
    [url] = re.findall(rb"http://127\.0\.0\.1:\d+", said)
    assert httpx.get(url.decode()).status_code == 200

    os.write(terminal, CTRL_C)

    _, status = os.waitpid(pid, 0)
    assert status == 0
    os.close(terminal)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url.decode())
