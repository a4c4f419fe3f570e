"""Drift of agents that call a real vLLM: what the history has in the place of an answer is the agent's doing, or the
template's.

The server renders ChatML with the template of each request, with reasoning or without.
"""

from __future__ import annotations

import pytest

from tests.conftest import ScriptedServer
from tests.drift.templates import CHATML, Message
from tests.recording.drifting import NEXT, QUESTION, SYSTEM, Agent, look, said
from tests.recording.server import RecordingServer

TRIMMED = CHATML.replace("{{ m.content or '' }}", "{{ (m.content or '').strip() }}")
CALL = '<tool_call>\n{"name":  "look", "arguments": {"city":"Paris"}}\n</tool_call>'


@pytest.fixture
def server(scripted: ScriptedServer) -> RecordingServer:
    """The server of the agents, without a script."""
    scripted.follows({})
    return scripted.server


@pytest.mark.parametrize(
    ("answer", "history", "cause"),
    [
        ("It will be cold today.", said("It will be cold today."), "retokenised"),
        ("<think>\nIt snows.\n</think>\n\nYes.", said("Yes."), "reasoning"),
        (CALL, look(), "tool_call"),
        ("Yes. \n", said("Yes. \n"), "answer_end"),
        ("Yes.", said("It is far too early to tell, and nobody knows."), "foreign"),
    ],
    ids=["retokenised", "reasoning", "tool_call", "answer_end", "foreign"],
)
def test_what_stands_in_the_place_of_an_answer_is_named(
    server: RecordingServer, rollout: str, answer: str, history: Message, cause: str
) -> None:
    agent = Agent(server, rollout, TRIMMED if cause == "answer_end" else CHATML)
    agent.ask([SYSTEM, QUESTION], answer)
    agent.ask([SYSTEM, QUESTION, history, NEXT], "1")

    [found] = agent.breaks()

    assert (found.cause, found.role, found.message) == (cause, "assistant", 2)
    assert found.is_certain


def test_what_changes_in_front_of_the_answer_is_named(server: RecordingServer, rollout: str) -> None:
    agent = Agent(server, rollout)
    timed = [{**SYSTEM, "content": f"It is 10:0{minute} now. You are a careful assistant."} for minute in range(2)]
    agent.ask([timed[0], QUESTION], "1")
    agent.ask([timed[1], QUESTION, said("1"), NEXT], "2")
    agent.ask([{**SYSTEM, "content": "Write a title for the conversation, and nothing else."}, QUESTION], "3")
    agent.ask([timed[1], {**NEXT, "content": "Summary of what was said: it is cold. What now?"}], "4")
    agent.ask([timed[1], {**NEXT, "content": "Summary of what was said: it is cold. What now?"}], "4")

    found = [(each.cause, each.is_certain) for each in agent.breaks()]

    # Nothing of the conversation is kept beside the summary, and no client says that it tries again.
    assert found == [("header", True), ("sub_agent", True), ("compaction", False), ("retry", False)]


def test_random_bytes_that_come_back_as_text_are_retokenised_or_miss_special_tokens(
    server: RecordingServer, rollout: str
) -> None:
    agent = Agent(server, rollout)
    answer = agent.client.chat.completions.create(
        model=server.model,
        messages=[SYSTEM, QUESTION],  # type: ignore[list-item]
        max_tokens=64,
        temperature=1,
        seed=1,
        extra_body={"chat_template": CHATML, "ignore_eos": True},
    )
    agent.calls += 1
    agent.ask([SYSTEM, QUESTION, said(answer.choices[0].message.content or ""), NEXT], "1")

    [found] = agent.breaks()

    assert found.cause in ("retokenised", "template")
    assert found.role == "assistant"
