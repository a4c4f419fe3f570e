"""The blocks of `docs/agents.md` for frameworks, each in an environment of its own: all of their calls are recorded."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.common.agents import PAGES_URL, blocks
from tests.common.script import call
from tests.common.vllm import without_agl
from tests.conftest import ScriptedServer
from tests.recording.server import until
from tools.agents import FRAMEWORKS, python_of

pytestmark = [pytest.mark.tier("all"), pytest.mark.takes_long("installs a framework the first time")]

SECONDS = 240
ANSWER = "Eight."
TOOL = {"Count the planets": call("count", things="planets"), "There are 8 planets": ANSWER}


def fields(**values: str) -> str:
    """Return the line that fills in fields, as DSPy writes them."""
    return "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in (*values.items(), ("completed", "")))


STORIES: Mapping[str, Mapping[str, str]] = {
    "OpenAI Agents SDK": TOOL,
    "LangGraph": TOOL,
    "pydantic-ai": TOOL,
    "smolagents": {
        "Count the planets": 'Thought: I count.\n<code>\nprint(count("planets"))\n</code>',
        "There are 8 planets": f'Thought: Done.\n<code>\nfinal_answer("{ANSWER}")\n</code>',
    },
    "AutoGen": TOOL,
    "DSPy": {
        "Count the planets": fields(
            next_thought="I count.", next_tool_name="count", next_tool_args='{"things": "planets"}'
        ),
        "There are 8 planets": fields(next_thought="Done.", next_tool_name="finish", next_tool_args="{}"),
        r"\[\[ ## reasoning ## \]\]": fields(reasoning="The tool says so.", answer=ANSWER),
    },
    "LiteLLM": {"Count the planets": ANSWER},
}
"""The model's lines in each block; as many calls as lines are made."""


def run(
    framework: str,
    text: str,
    rollout: str,
    scripted: ScriptedServer,
    folder: Path,
    story: Mapping[str, str] | None = None,
) -> None:
    """Run a block under a rollout, and check its answer and that each of its calls is recorded.

    Args:
        story: what the model says, in the place of the framework's story.
    """
    server, story = scripted.server, story or STORIES[framework]
    scripted.follows(story)
    (folder / "block.py").write_text(text.replace(PAGES_URL, f"{server.url}/rollout/{rollout}"))
    done = subprocess.run(
        [python_of(framework), folder / "block.py"],
        cwd=folder,
        # LiteLLM would fetch a list of prices.
        env={**without_agl(os.environ), "HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ANSWER, done.stdout
    until(lambda: len(server.kept(rollout_id=rollout)) >= len(story), f"the calls of {framework}")
    # Where smolagents lets the model stop, which is not a part of the answer.
    said = [line.removesuffix("</code>") for line in story.values()]
    assert [each.choices[0].text for each in server.kept(rollout_id=rollout)] == said


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_block_of_a_framework_is_recorded(framework: str, scripted: ScriptedServer, tmp_path: Path) -> None:
    run(framework, blocks(framework, "python")[0], f"ro-{framework.replace(' ', '-')}", scripted, tmp_path)


@pytest.mark.parametrize("framework", ["LangGraph", "pydantic-ai"])
def test_the_block_of_a_framework_over_messages_is_recorded(
    framework: str, scripted: ScriptedServer, tmp_path: Path
) -> None:
    rollout = f"ro-{framework}-messages"
    run(framework, blocks(framework, "python")[1], rollout, scripted, tmp_path)

    assert {each.endpoint for each in scripted.server.kept(rollout_id=rollout)} == {"/v1/messages"}


def test_the_openai_agents_sdk_is_recorded_by_responses_too(scripted: ScriptedServer, tmp_path: Path) -> None:
    text = blocks("OpenAI Agents SDK", "python")[0].replace("OpenAIChatCompletionsModel", "OpenAIResponsesModel")
    run("OpenAI Agents SDK", text, "ro-responses", scripted, tmp_path)

    assert {each.endpoint for each in scripted.server.kept(rollout_id="ro-responses")} == {"/v1/responses"}
