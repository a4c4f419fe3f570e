"""Real coding agents on a server whose prompts go on from exact ids: none of their calls breaks the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agentlightning.continuation import CONTINUED, OTHER_OPTIONS
from agentlightning.instrumentation.vllm._status import STATUS_ROUTE
from agentlightning.store import open_store
from tests.agents import test_frameworks as frameworks
from tests.common.agents import ANSWER, STORIES, blocks, run
from tests.common.answers import fetch
from tests.common.oracle import check_logprobs
from tests.common.script import arguments, compact_call, environment
from tests.conftest import ScriptedServer
from tests.recording.nursery import Nursery
from tests.recording.server import until
from tools.agents import MISSING_NPM, commands_of

NEEDS_NPM = pytest.mark.tier("all")
CALLS = {"mini": (2, 1), "claude": (4, 2), "codex": (5, 2), "opencode": (5, 3), "qwen": (4, 2)}
"""The number of calls that each agent has in its story, and of those that begin a conversation."""


@pytest.fixture(scope="module")
def exact(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """A scripted server, on which prompts go on."""
    folder = tmp_path_factory.mktemp("exact")
    script = folder / "script.json"
    env = {"AGL_CONTINUE": "on", "AGL_LOGPROBS": "on", **environment(script)}
    with nursery.server(folder / "generations.db", *arguments(), env=env) as server:
        yield ScriptedServer(server, script)


@pytest.mark.parametrize("agent", [pytest.param(name, marks=() if name == "mini" else NEEDS_NPM) for name in CALLS])
def test_no_call_breaks_the_one_before_and_the_agent_notices_nothing(
    exact: ScriptedServer, agent: str, tmp_path: Path
) -> None:
    if commands_of(agent) is None:
        pytest.skip(MISSING_NPM)
    server, rollout = exact.server, f"ro-{agent}"
    calls, first = CALLS[agent]
    before = fetch(server, STATUS_ROUTE)["continuation"]["results"][CONTINUED]
    exact.follows(STORIES[agent])

    output = run(agent, f"{server.url}/rollout/{rollout}/attempt/at-1/v1", tmp_path / agent)

    assert ANSWER in output
    until(lambda: len(server.kept(rollout_id=rollout)) >= calls, f"{calls} calls of {agent}")
    with open_store(server.store, read_only=True) as store:
        rows = [*store.trajectories(rollout)]
    status = fetch(server, STATUS_ROUTE)
    assert status["continuation"]["results"][CONTINUED] - before == calls - first
    assert not any("drifted" in row.flags for row in rows)
    assert len(rows) == first
    check_logprobs(rows, server.kept(rollout_id=rollout))
    assert status["counters"]["failures"] == {}


TOOL = {"Count the planets": compact_call("count", things="planets"), "There are 8 planets": frameworks.ANSWER}
STORIES_THAT_BREAK = {"smolagents": {cue: f"\n{line}" for cue, line in frameworks.STORIES["smolagents"].items()}}
"""smolagents takes white space off the ends of what it sends back."""
RUN, ITS_STREAM = (
    'print(Runner.run_sync(agent, "Count the planets.").final_output)',
    """
import asyncio

async def count_planets():
    done = Runner.run_streamed(agent, "Count the planets.")
    async for _ in done.stream_events():
        pass
    print(done.final_output)

asyncio.run(count_planets())
""",
)
RESPONSES = ("OpenAIChatCompletionsModel", "OpenAIResponsesModel")
WAYS: dict[str, tuple[str, int, Sequence[tuple[str, str]]]] = {
    "OpenAI Agents SDK": ("OpenAI Agents SDK", 0, ()),
    "OpenAI Agents SDK, streamed": ("OpenAI Agents SDK", 0, [(RUN, ITS_STREAM)]),
    "OpenAI Agents SDK over Responses": ("OpenAI Agents SDK", 0, [RESPONSES]),
    "OpenAI Agents SDK over Responses, streamed": ("OpenAI Agents SDK", 0, [RESPONSES, (RUN, ITS_STREAM)]),
    "LangGraph": ("LangGraph", 0, ()),
    "LangGraph, streamed": ("LangGraph", 0, [("ChatOpenAI(", "ChatOpenAI(streaming=True, ")]),
    "LangGraph over Messages": ("LangGraph", 1, ()),
    "LangGraph over Messages, streamed": ("LangGraph", 1, [("ChatAnthropic(", "ChatAnthropic(streaming=True, ")]),
    "pydantic-ai": ("pydantic-ai", 0, ()),
    "pydantic-ai, streamed": (
        *("pydantic-ai", 0),
        [('.run_sync("Count the planets.").output', '.run_stream_sync("Count the planets.").get_output()')],
    ),
    "pydantic-ai over Messages": ("pydantic-ai", 1, ()),
    "smolagents": ("smolagents", 0, ()),
    "smolagents, streamed": ("smolagents", 0, [("CodeAgent(", "CodeAgent(stream_outputs=True, ")]),
    "AutoGen": ("AutoGen", 0, ()),
    "AutoGen, streamed": ("AutoGen", 0, [("tools=[count],", "tools=[count], model_client_stream=True,")]),
}
"""A framework, the number of its block in `docs/agents.md`, and what is replaced in that, for each way to call vLLM."""
STRICT = {"OpenAI Agents SDK", "pydantic-ai"}
"""Frameworks with strict tools: their grammar lets the model write a call in one way alone, which is the template's."""


@pytest.mark.tier("all")
@pytest.mark.takes_long("installs a framework the first time")
@pytest.mark.parametrize("name", WAYS)
def test_no_call_of_a_framework_breaks_the_one_before(
    exact: ScriptedServer, scripted: ScriptedServer, name: str, tmp_path: Path
) -> None:
    framework, block, changes = WAYS[name]
    text = blocks(framework, "python")[block]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    is_free = framework not in STRICT
    story = STORIES_THAT_BREAK.get(framework, TOOL) if is_free else frameworks.STORIES[framework]
    rollout = f"ro-{[*WAYS].index(name)}-exact"
    before = fetch(exact.server, STATUS_ROUTE)["continuation"]["results"][CONTINUED]

    for served in (exact, scripted):
        frameworks.run(framework, text, rollout, served, tmp_path, story)

    assert fetch(exact.server, STATUS_ROUTE)["continuation"]["results"][CONTINUED] - before == len(story) - 1
    assert fetch(exact.server, STATUS_ROUTE)["counters"]["failures"] == {}
    rows: list[int] = []
    for served in (exact, scripted):
        with open_store(served.server.store, read_only=True) as store:
            rows.append(len([*store.trajectories(rollout)]))
    assert rows == [1, 2 if is_free else 1]


@pytest.mark.tier("all")
@pytest.mark.takes_long("installs a framework the first time")
def test_a_call_of_autogen_that_leaves_out_the_tools_has_vllms_own_prompt_and_is_counted(
    exact: ScriptedServer, tmp_path: Path
) -> None:
    """Reflect on the use of a tool, for which AutoGen offers none: the beginning of the prompt has them no more."""
    [text, *_] = blocks("AutoGen", "python")
    text = text.replace("max_tool_iterations=4", "reflect_on_tool_use=True")
    assert "reflect_on_tool_use" in text
    before = fetch(exact.server, STATUS_ROUTE)["continuation"]["results"][OTHER_OPTIONS]

    frameworks.run("AutoGen", text, "ro-reflection", exact, tmp_path, TOOL)

    assert fetch(exact.server, STATUS_ROUTE)["continuation"]["results"][OTHER_OPTIONS] == before + 1
