"""The AgentOps SDK, in an environment of its own: it wants an OpenTelemetry that vLLM may not.

`python -m tools.agentops` makes it in `.cache/agentops`, once; with OpenTelemetry 1.44, the last one that it works
with, and with the clients of OpenAI that it follows.
"""

from __future__ import annotations

from pathlib import Path

from tools.make_env import say
from tools.peer import environment

__all__ = ["agentops"]

REQUIREMENTS = (
    "agentops==0.4.21",
    "openai==2.54.0",
    "openai-agents==0.20.0",
    "opentelemetry-exporter-otlp-proto-http==1.44.*",
    "opentelemetry-sdk==1.44.*",
)


def agentops() -> Path:
    """The folder of its interpreter and commands; made where it is not there yet, in a minute."""
    return environment("agentops", "the AgentOps SDK", REQUIREMENTS)


if __name__ == "__main__":
    say(f"{agentops()}")
