"""The whole loop of `make demo-rollout`: a queue, two runners, an agent with a tool, triplets, and the page."""

from __future__ import annotations

import ast
import os
import pty
import re
import sys
from copy import deepcopy
from pathlib import Path

import httpx
import pytest

import agentlightning as agl
from agentlightning.cli.drift import lines_of
from agentlightning.drift import Report
from examples import demo_rollout, loop, servers
from examples.demo_rollout import SHOWS, drift, is_exact, table
from examples.loop import ROLLOUTS, TOOLS, Run, run
from examples.servers import show
from tests.common.environments import CHECKOUT
from tests.common.reference import tokenizer
from tests.common.vllm import RemoteOpenAIServer
from tests.recording.nursery import Nursery
from tests.server.process import StoreServer
from tools.drift_report import BEGIN, END, PAGE

AT_A_TERMINAL = """\
import pathlib, sys
from examples.servers import show
from tests.server.process import StoreServer
with StoreServer(pathlib.Path(sys.argv[1])) as store:
    show(store.process.wait, store.url, store.path, ())
"""
FEWER_ROLLOUTS = 6
CALLS = 2
CTRL_C = b"\x03"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the loop's store."""
    return tmp_path_factory.mktemp("loop") / "store.db"


@pytest.fixture(scope="module")
def rollouts(thorough: bool) -> int:
    return ROLLOUTS if thorough else FEWER_ROLLOUTS


@pytest.fixture(scope="module")
def runs(file: Path, nursery: Nursery, rollouts: int, thorough: bool) -> list[tuple[Run, list[agl.Triplet]]]:
    """Each run with its triplets, read while the store was served."""
    with StoreServer(file) as server, agl.open_store(server.url) as store:
        env = {"AGL_INSTRUMENT": "1", "AGL_STORE": server.url, "AGL_LOGPROBS": "on"}
        forked = nursery.server(file, *TOOLS, store=server.url, env={"AGL_LOGPROBS": "on"})
        with RemoteOpenAIServer(*TOOLS, env=env) if thorough else forked as vllm:
            done = run(store, vllm.url, vllm.model, rollouts)
        found = [(each, list(each.rollout.triplets())) for each in done]
        assert all(triplet.model == vllm.model for _, kept in found for triplet in kept)
        return found


def modules_of(path: str) -> set[str]:
    """Return the packages that a file imports from."""
    tree = ast.parse(Path(path).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    return {name.split(".")[0] for name in imported}


def test_the_loop_is_copied_and_needs_no_other_file() -> None:
    assert modules_of(loop.__file__) - {*sys.stdlib_module_names} == {"agentlightning", "openai"}
    assert "tests" not in modules_of(demo_rollout.__file__) | modules_of(servers.__file__)


def test_every_rollout_is_run_once_and_succeeds(runs: list[tuple[Run, list[agl.Triplet]]], rollouts: int) -> None:
    assert len(runs) == len({each.rollout.rollout_id for each, _ in runs}) == rollouts
    for each, _ in runs:
        attempt = each.rollout.attempt
        assert attempt is not None
        assert (each.rollout.status, attempt.status) == ("succeeded", "succeeded")
        assert (attempt.sequence_id, attempt.worker_id) == (1, each.worker_id)


def test_every_id_is_the_one_that_vllm_returned_in_the_order_of_the_calls(
    runs: list[tuple[Run, list[agl.Triplet]]],
) -> None:
    for each, found in runs:
        assert len(found) == CALLS
        assert all(triplet.prompt_token_ids and triplet.response_token_ids for triplet in found)
        assert [triplet.response_id for triplet in found] == [answer.id for answer in each.answers]
        assert is_exact(each, found)


def test_a_triplet_names_its_rollout_and_attempt(runs: list[tuple[Run, list[agl.Triplet]]]) -> None:
    for each, found in runs:
        assert each.rollout.attempt is not None
        for triplet in found:
            assert triplet.status == "finished"
            assert (triplet.rollout_id, triplet.attempt_id) == (
                each.rollout.rollout_id,
                each.rollout.attempt.attempt_id,
            )


def test_the_last_call_has_the_reward(runs: list[tuple[Run, list[agl.Triplet]]]) -> None:
    for each, found in runs:
        assert [triplet.reward for triplet in found] == [None, each.reward]


def test_both_prompts_have_the_question_and_the_second_has_the_result_of_the_tool(
    runs: list[tuple[Run, list[agl.Triplet]]],
) -> None:
    for each, found in runs:
        first, second = (tokenizer().decode(list(triplet.prompt_token_ids or ())) for triplet in found)
        question, result = f"user\n{each.rollout.input['question']}", f"tool\n{each.result}"
        assert question in first
        assert question in second
        assert result not in first
        assert result in second


def test_one_other_id_is_noticed(runs: list[tuple[Run, list[agl.Triplet]]]) -> None:
    each, found = runs[0]
    other = deepcopy(found)
    ids = other[1].response_token_ids
    assert ids is not None
    ids[-1] += 1

    assert not is_exact(each, other)


def test_the_table_fits_into_80_columns(
    runs: list[tuple[Run, list[agl.Triplet]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {each.rollout.rollout_id: found for each, found in runs}
    monkeypatch.setattr(agl.Rollout, "triplets", lambda rollout: iter(kept[rollout.rollout_id]))

    assert table([each for each, _ in runs])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > len(runs)
    assert max(map(len, lines)) <= 80


def test_each_rollout_breaks_at_its_tool_call_and_the_report_has_eight_lines(
    runs: list[tuple[Run, list[agl.Triplet]]], file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The template of the tiny model puts tools behind the messages, and writes the forced arguments as a call."""
    with agl.open_store(str(file)) as store:
        breaks = [each for attempt in store.drift() for each in attempt.breaks]

    drift(str(file))

    printed = capfd.readouterr().out.splitlines()
    assert len(printed) <= 2 + 8
    assert max(map(len, printed[2:])) <= 80
    assert f"{len(runs)} broke (100.0%)" in printed[2]
    assert [(each.cause, each.is_certain, each.also) for each in breaks] == [("template", True, ["tool_call"])] * len(
        runs
    )


def without_numbers(report: str) -> list[str]:
    """Return the lines of a report up to what is unfit besides, without numbers, ids and the tokens of examples."""
    lines = report.partition("\n\nbesides")[0].splitlines()
    return [re.sub(r"\S*\d\S*", "#", re.sub(r"(before|now):.*", r"\1", line)).strip() for line in lines]


def test_the_page_on_drift_has_such_a_report(runs: list[tuple[Run, list[agl.Triplet]]], file: Path) -> None:
    report = Report()
    with agl.open_store(str(file)) as store:
        for attempt in store.drift():
            report.add(attempt)

    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    shown = written.partition("```text\n")[2].partition("\n```")[0]
    assert without_numbers(shown) == without_numbers("\n".join(lines_of(report, brief=False)))


def test_without_a_terminal_it_says_how_to_serve_the_file_again(
    runs: list[tuple[Run, list[agl.Triplet]]], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StoreServer(file) as store:
        show(store.process.wait, store.url, file, SHOWS)

    printed = capsys.readouterr().out
    [path] = re.findall(r"agl store --store (\S+)", printed)
    # The path of a test is long.
    assert max(len(line) for line in printed.splitlines() if path not in line) <= 80
    with StoreServer(Path(path).absolute()) as again:
        page = httpx.get(f"{again.url}/rollouts").text
    assert all(each.rollout.rollout_id in page for each, _ in runs)


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
