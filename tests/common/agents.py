"""Real coding agents, run by the blocks of `docs/agents.md`: what readers are told to paste is what runs here."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.common.environments import CHECKOUT
from tests.common.script import call, compact_call
from tools.agents import MISSING_NPM, TITLES, commands_of

TASK = "Count the planets."
"""The task of each agent's story: it uses a tool, asks a sub-agent if it has any, and answers."""
LOOK, LIST = "Let me look.\n", "echo Planets: 8"
QUESTION, REPLY, ANSWER, TITLE = "Is Pluto one?", "Pluto is a dwarf.", "There are eight.", "Planets"

STORIES: Mapping[str, Mapping[str, str]] = {
    "claude": {
        "Count the planets": LOOK + compact_call("Bash", command=LIST, description="List"),
        "Planets: 8": call(
            "Agent", description="Ask", prompt=QUESTION, subagent_type="general-purpose", run_in_background=False
        ),
        "Is Pluto": REPLY,
        "is a dwarf": ANSWER,
    },
    "codex": {
        "Count the planets": LOOK + compact_call("exec_command", cmd=LIST),
        "Planets: 8": call("multi_agent_v1__spawn_agent", message=QUESTION),
        "Is Pluto": REPLY,
        r'"agent_id": ?"(?P<agent>[^"]+)"': call("multi_agent_v1__wait_agent", targets=["$agent"], timeout_ms=600_000),
        '"timed_out":false': ANSWER,
    },
    "opencode": {
        "Count the planets": LOOK + compact_call("bash", command=LIST, description="List"),
        "Planets: 8": call("task", description="Ask", prompt=QUESTION, subagent_type="general"),
        "Is Pluto": REPLY,
        "is a dwarf": ANSWER,
        "You are a title generator": TITLE,
    },
    "qwen": {
        "Count the planets": LOOK
        + compact_call("run_shell_command", command=LIST, description="List", is_background=False),
        "Planets: 8": call("agent", description="Ask", prompt=QUESTION, subagent_type="general-purpose"),
        "Is Pluto": REPLY,
        "is a dwarf": ANSWER,
    },
    "mini": {
        "Count the planets": LOOK + compact_call("bash", command=LIST),
        "Planets: 8": call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo There are eight."),
    },
}
"""The script that leads each agent through its task."""

PAGE = CHECKOUT / "docs" / "agents.md"
PAGES_URL, PAGES_TASK = "http://localhost:8000/rollout/ro-1", "'Make the tests pass.'"
SECONDS = 240


def blocks(title: str, language: str) -> list[str]:
    """Return the blocks of this language below this heading of the page."""
    below = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    found = re.findall(rf"^```{language}\n(.*?)^```$", below[1] if below else "", re.DOTALL | re.MULTILINE)
    assert found, f"{PAGE.name} has no {language} block for {title}"
    return found


def run(agent: str, base_url: str, folder: Path) -> str:
    """Run an agent on its task; return its output.

    Args:
        base_url: that of a rollout, such as `http://localhost:8000/rollout/ro-1/v1`.
        folder: is made, and has the agent's home and the empty folder that it works in.

    Raises:
        RuntimeError: npm is missing, or the agent failed; says all that it had printed.
    """
    commands = commands_of(agent)
    if commands is None:
        raise RuntimeError(MISSING_NPM)
    script = (
        blocks(TITLES[agent], "bash")[0].replace(PAGES_URL, base_url.removesuffix("/v1")).replace(PAGES_TASK, '"$TASK"')
    )
    home, work = folder / "home", folder / "work"
    for each in (home, work):
        each.mkdir(parents=True)
    env = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "TASK": TASK,
        # Claude Code lets root skip permissions in a sandbox alone, and LiteLLM would fetch a list of prices.
        "IS_SANDBOX": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    done = subprocess.run(
        ["bash", "-euc", script],
        env=env,
        cwd=work,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{TITLES[agent]} ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout
