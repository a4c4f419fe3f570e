"""A real vLLM with a tiny model says the lines of a script, whatever else it is asked at the time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.common.answers import post
from tests.common.script import call
from tests.conftest import ScriptedServer

TOOL: Any = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}


def test_the_model_says_the_line_of_the_last_cue_in_its_prompt(scripted: ScriptedServer) -> None:
    scripted.follows({"Count": call("bash", command="echo 3 files"), "(?P<count>[0-9]) files": "There are $count."})
    client, model = scripted.server.client(), scripted.server.model
    messages: list[Any] = [{"role": "user", "content": "Count the files."}]

    first: Any = client.chat.completions.create(model=model, messages=messages, tools=[TOOL]).choices[0].message
    [asked] = first.tool_calls
    messages += [first.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": asked.id, "content": "3 files"}]
    second = client.chat.completions.create(model=model, messages=messages, tools=[TOOL]).choices[0]

    assert (asked.type, asked.function.name, json.loads(asked.function.arguments)) == (
        *("function", "bash"),
        {"command": "echo 3 files"},
    )
    assert (second.message.content, second.finish_reason) == ("There are 3.", "stop")


def test_calls_in_parallel_get_their_own_lines_beside_calls_without_a_cue(scripted: ScriptedServer) -> None:
    scripted.follows({f"<{number}>": f"This is {number}." * (number + 1) for number in range(8)})
    server = scripted.server

    def ask(prompt: str) -> str:
        answer = post(server, "/v1/completions", server.body(prompt=prompt, max_tokens=200))
        return str(answer["choices"][0]["text"])

    alone = ask("without a cue")
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(ask, ["without a cue", *(f"say <{number}>" for number in range(8))]))

    assert found == [alone, *(f"This is {number}." * (number + 1) for number in range(8))]
