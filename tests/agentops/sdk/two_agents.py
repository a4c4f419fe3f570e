"""Run two agents with a tool, a streamed call and a failing call, traced by AgentOps; print their results as JSON.

Arguments: vLLM's URL, and its model.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

# Installed in the SDK's environment, which type checkers do not see.
agentops: Any = importlib.import_module("agentops")
decorators: Any = importlib.import_module("agentops.sdk.decorators")
openai: Any = importlib.import_module("openai")

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
# A model with random weights would call no tool.
CALL = r'<tool_call>\n\{"name": "weather", "arguments": \{"city": "Paris"\}\}\n</tool_call>'


def main(url: str, model: str) -> None:
    agentops.init(auto_start_session=False)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    session = agentops.start_trace("two agents", tags=["tests", "<b>"])
    calls: list[dict[str, Any]] = []

    def ask(content: str, **options: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=120, **options)
        if not options.get("stream"):
            calls.append({"id": answer.id, "token_ids": answer.choices[0].model_extra["token_ids"]})
            return answer
        token_ids, answer_id = [], None
        for chunk in answer:
            answer_id = chunk.id
            for choice in chunk.choices:
                token_ids += (choice.model_extra or {}).get("token_ids") or []
        calls.append({"id": answer_id, "token_ids": token_ids})
        return answer

    @decorators.tool(name="weather")
    def weather(city: str) -> str:
        return f"sunny in {city}"

    @decorators.agent
    class Reporter:
        def report(self) -> str:
            answer = ask("What is the weather?", tools=[TOOL], extra_body={"structured_outputs": {"regex": CALL}})
            called = answer.choices[0].message.tool_calls[0].function
            return weather(**json.loads(called.arguments))

    @decorators.agent
    class Writer:
        def write(self, about: str) -> None:
            ask(f"Write of it: {about}", stream=True)
            ask("<script>alert(1)</script>")

        def fail(self) -> None:
            try:
                client.chat.completions.create(model="unknown", messages=[{"role": "user", "content": "?"}])
            except openai.NotFoundError as error:
                # The SDK uploads printed text.
                print(f"<i>{type(error).__name__}</i>")  # noqa: T201

    writer = Writer()
    writer.write(Reporter().report())
    writer.fail()
    agentops.end_trace(session, "Success")
    trace_id = format(session.span.context.trace_id, "032x")
    sys.stdout.write(json.dumps({"trace_id": trace_id, "calls": calls, "validated": validated(trace_id)}) + "\n")


def validated(trace_id: str) -> dict[str, Any]:
    """Run the SDK's own validation, redirected from its built-in host to this server."""
    import inspect
    import os
    import types

    validation: Any = importlib.import_module("agentops.validation")
    source = inspect.getsource(validation).replace("https://api.agentops.ai", os.environ["AGENTOPS_API_ENDPOINT"])
    redirected = types.ModuleType("validation")
    exec(compile(source, validation.__file__, "exec"), redirected.__dict__)
    found = redirected.validate_trace_spans(trace_id=trace_id, min_spans=7, max_retries=3)
    names = sorted(each["span_name"] for each in found["spans"])
    return {"names": names, "has_llm_spans": found["has_llm_spans"], "metrics": found["metrics"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
