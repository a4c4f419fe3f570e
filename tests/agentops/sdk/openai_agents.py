"""Run an agent of the OpenAI Agents SDK, traced by the AgentOps SDK, and print its session as JSON.

Arguments: vLLM's URL, and its model.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

# Installed in the SDK's environment, which type checkers do not see.
agentops: Any = importlib.import_module("agentops")
agents: Any = importlib.import_module("agents")
openai: Any = importlib.import_module("openai")


def main(url: str, model: str) -> None:
    agentops.init(auto_start_session=False)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    session = agentops.start_trace("openai agents")
    agent = agents.Agent(
        name="writer",
        instructions="Write.",
        model=agents.OpenAIChatCompletionsModel(model=model, openai_client=client),
        model_settings=agents.ModelSettings(max_tokens=16, temperature=0),
    )
    answers = [agents.Runner.run_sync(agent, text) for text in ("one", "two")]
    agentops.end_trace(session, "Success")
    trace_id = format(session.span.context.trace_id, "032x")
    texts = [str(answer.final_output) for answer in answers]
    sys.stdout.write(json.dumps({"trace_id": trace_id, "texts": texts}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
