"""Real coding agents, unmodified, on a real vLLM: who called is recorded, and their rows are as written by hand.

A script leads each of them through a tool and a sub-agent; what stands around that is the agent's own. The first tool
call is said as no template writes it, so that the next prompt breaks off there; all others as the template does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from agentlightning.drift import AttemptDrift
from agentlightning.generation import Generation
from agentlightning.server.page.agents import guess_purpose
from agentlightning.store import open_store
from agentlightning.trajectory import Trajectory
from tests.common.agents import ANSWER, REPLY, STORIES, TITLE, run
from tests.common.oracle import check_logprobs
from tests.common.reference import tokenizer
from tests.conftest import ScriptedServer
from tests.recording.server import until
from tools.agents import MISSING_NPM, commands_of

ROWS = Path(__file__).parent / "rows"
"""A file for each agent: its rows from the first answer on, of the row that it leaves if it leaves one. What is trained
is in brackets, and a … stands for what differs from run to run."""
NEEDS_NPM = pytest.mark.tier("all")


@dataclass(frozen=True)
class Played:
    """A run of an agent: its output, its calls by their answers, its rows, and why they end."""

    output: str
    calls: dict[str, Generation]
    rows: list[Trajectory]
    drift: AttemptDrift


Play = Callable[[str, int], Played]


@pytest.fixture
def play(scripted: ScriptedServer, tmp_path: Path) -> Play:
    """Run an agent through its story, which takes so many calls."""

    def play(agent: str, calls: int) -> Played:
        if commands_of(agent) is None:
            pytest.skip(MISSING_NPM)
        server, rollout = scripted.server, f"ro-{agent}"
        scripted.follows(STORIES[agent])
        output = run(agent, f"{server.url}/rollout/{rollout}/attempt/at-1/v1", tmp_path / agent)
        until(lambda: len(server.kept(rollout_id=rollout)) >= calls, f"{calls} calls of {agent}")
        found = server.kept(rollout_id=rollout)
        assert [(each.attempt_id, each.status) for each in found] == [("at-1", "finished")] * calls
        with open_store(server.store, read_only=True) as store:
            [drift] = store.drift(rollout)
            by_answer = {str(each.choices[0].text): each for each in found}
            return Played(output, by_answer, [*store.trajectories(rollout)], drift)

    return play


def shown(rows: Sequence[Trajectory]) -> Iterator[str]:
    """Yield the lines of a file of `ROWS`."""
    for row in rows:
        title, begins, leaves = [f"--- row {row.index}"], row.prompt_length, None
        if row.parent is not None:
            title.append(f"leaves row {row.parent.index} at |")
            begins, leaves = rows[row.parent.index].prompt_length, row.parent.position
        yield ", ".join((*title, *row.flags))
        mask = row.response_mask
        assert not any(mask[:begins])
        changes = {place for place in range(begins + 1, len(mask)) if mask[place] != mask[place - 1]}
        text = ""
        for start, end in pairwise(sorted({begins, *changes, len(mask)} | {leaves or begins})):
            part = tokenizer().decode(row.token_ids[start:end])
            text += ("|" if start == leaves else "") + (f"[{part}]" if mask[start] else part)
        yield text


def check(agent: str, done: Played) -> None:
    """Compare the rows with those that are expected of an agent, and their logprobs with the model's."""
    expected, found = (ROWS / f"{agent}.txt").read_text(), "\n".join((*shown(done.rows), ""))
    pattern = "[^\n]*".join(map(re.escape, expected.split("…")))
    assert re.fullmatch(pattern, found), f"{found}\nis not\n\n{expected}"
    check_logprobs(done.rows, done.calls.values())


def check_causes(found: AttemptDrift) -> None:
    """Check that one tool call, which no template writes so, is all that breaks; other agents' calls are meant."""
    causes = [(each.cause, each.is_certain) for each in found.breaks if each.cause != "sub_agent"]
    assert causes == [("tool_call", True)]


@pytest.mark.takes_long("installs the agent the first time")
def test_mini_swe_agent_is_recorded_under_its_rollout(play: Play) -> None:
    done = play("mini", 2)

    assert ANSWER in done.output
    assert {(each.endpoint, each.retry) for each in done.calls.values()} == {("/v1/chat/completions", 0)}
    assert {(each.session_id, each.agent_id, each.purpose) for each in done.calls.values()} == {(None, None, None)}
    check("mini", done)
    check_causes(done.drift)


@NEEDS_NPM
def test_claude_code_and_its_sub_agent_are_recorded_apart(play: Play) -> None:
    done = play("claude", 4)
    sub = done.calls[REPLY]
    main = [each for each in done.calls.values() if each is not sub]

    assert ANSWER in done.output
    assert {(each.endpoint, each.retry) for each in done.calls.values()} == {("/v1/messages", 0)}
    assert sub.session_id is not None
    assert {(each.session_id, each.agent_id) for each in main} == {(sub.session_id, None)}
    assert sub.agent_id is not None
    check("claude", done)
    check_causes(done.drift)


@NEEDS_NPM
def test_codex_and_its_sub_agent_are_recorded_apart(play: Play) -> None:
    done = play("codex", 5)
    sub = done.calls[REPLY]
    main = [each for each in done.calls.values() if each is not sub]

    assert ANSWER in done.output
    assert {each.endpoint for each in done.calls.values()} == {"/v1/responses"}
    # The session is that of the main agent's thread.
    assert sub.session_id is not None
    assert {(each.session_id, each.agent_id) for each in main} == {(sub.session_id, sub.session_id)}
    assert {(each.parent_agent_id, each.purpose) for each in main} == {(None, "main")}
    assert sub.agent_id not in (None, sub.session_id)
    assert (sub.parent_agent_id, sub.purpose) == (sub.session_id, "sub-agent")
    check("codex", done)
    check_causes(done.drift)


@NEEDS_NPM
def test_opencode_its_title_and_its_sub_agent_are_recorded_apart(play: Play) -> None:
    done = play("opencode", 5)
    sub, title = done.calls[REPLY], done.calls[TITLE]
    main = [each for each in done.calls.values() if each is not sub]

    assert ANSWER in done.output
    assert {each.endpoint for each in done.calls.values()} == {"/v1/chat/completions"}
    assert title.session_id is not None
    assert (title.purpose, guess_purpose(title.prompt_text)) == (None, "title")
    assert {guess_purpose(each.prompt_text) for each in (*main, sub) if each is not title} == {None}
    assert {(each.session_id, each.agent_id) for each in main} == {(title.session_id, None)}
    # A sub-agent is a session of its own.
    assert sub.session_id not in (None, title.session_id)
    assert (sub.agent_id, sub.parent_agent_id) == (sub.session_id, title.session_id)
    check("opencode", done)
    check_causes(done.drift)


@NEEDS_NPM
def test_qwen_code_and_its_unnamed_sub_agent_are_recorded(play: Play) -> None:
    done = play("qwen", 4)

    assert ANSWER in done.output
    assert {(each.endpoint, each.retry) for each in done.calls.values()} == {("/v1/chat/completions", 0)}
    assert {(each.session_id, each.agent_id, each.purpose) for each in done.calls.values()} == {(None, None, None)}
    check("qwen", done)
    check_causes(done.drift)
