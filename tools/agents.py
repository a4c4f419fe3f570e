"""Coding agents, and the frameworks that people write agents with: unmodified, each in a folder of its own.

`python -m tools.agents claude` installs Claude Code into `.cache/agents`, once, and prints the folder of its command.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tools.make_env import CHECKOUT, run, say
from tools.peer import environment, make_once

__all__ = ["FRAMEWORKS", "MISSING_NPM", "TITLES", "commands_of", "python_of"]

# The tests say what these versions send and ask for; Qwen Code 0.15 is the last one for Node.js 20.
NPM = {
    "claude": "@anthropic-ai/claude-code@2.1.332",
    "codex": "@openai/codex@0.171.0",
    "opencode": "opencode-ai@1.18.33",
    "qwen": "@qwen-code/qwen-code@0.15.10",
}
PIP = {"mini": "mini-swe-agent==2.4.6"}
TITLES = {
    "claude": "Claude Code",
    "codex": "Codex",
    "opencode": "opencode",
    "qwen": "Qwen Code",
    "mini": "mini-SWE-agent",
}
"""The name that each agent has for itself, by the name that this project has for it."""
FRAMEWORKS = {
    "OpenAI Agents SDK": ("openai-agents==0.24.*",),
    "LangGraph": ("langchain==1.*", "langchain-openai==1.*", "langchain-anthropic==1.*", "langgraph==1.*"),
    "pydantic-ai": ("pydantic-ai-slim[openai,anthropic]==2.68.*",),
    "smolagents": ("smolagents[openai]==1.26.*",),
    "AutoGen": ("autogen-agentchat==0.7.*", "autogen-ext[openai]==0.7.*"),
    "DSPy": ("dspy==3.4.*",),
    "LiteLLM": ("litellm==1.*",),
}
"""The packages that are installed for each framework, by its heading in `docs/agents.md`."""
DATE = "2026-11-30"
"""Nothing that PyPI got later is installed."""
MISSING_NPM = "npm is missing: install Node.js 20 or later (apt-get install nodejs npm)"


def commands_of(agent: str) -> Path | None:
    """Install an agent where it is not there yet; return the folder of its command, or None where npm is missing."""
    if agent in PIP:
        return environment(f"agents/{agent}", PIP[agent], (PIP[agent],), date=DATE)
    npm = shutil.which("npm")
    if npm is None:
        return None
    package = NPM[agent]
    folder = CHECKOUT / ".cache" / "agents" / agent

    def install(log: Path) -> None:
        quietly = ("--no-audit", "--no-fund", "--loglevel=error")
        run(f"{package} (half a minute)", [npm, "install", "--prefix", folder, *quietly, package], log)

    make_once(folder, package, install)
    return folder / "node_modules" / ".bin"


def python_of(framework: str) -> Path:
    """Install a framework where it is not there yet; return its interpreter."""
    name = framework.lower().replace(" ", "-")
    return environment(f"frameworks/{name}", framework, FRAMEWORKS[framework], date=DATE) / "python"


if __name__ == "__main__":
    if sys.argv[1:] not in [[agent] for agent in TITLES]:
        sys.exit(f"usage: python -m tools.agents {'|'.join(TITLES)}")
    say(f"{commands_of(sys.argv[1]) or MISSING_NPM}")
