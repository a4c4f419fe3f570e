"""Drift on real vLLM servers whose special tokens are those of Llama 3 and of Mistral, the latter with its own
tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.common.tiny_model import llama_model, mistral_model
from tests.drift.templates import LLAMA, Message
from tests.recording.drifting import NEXT, QUESTION, SYSTEM, Agent, look, said
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer

pytestmark = pytest.mark.tier("all")

CALL = {
    "llama": '{"name":  "look", "parameters": {"city":"Paris"}}',
    "mistral": '[{"name":  "look", "arguments": {"city":"Paris"}, "id": "callnoone"}]',
}


@dataclass(frozen=True)
class Templated:
    """A server, and the template that each request sends; None where the server has its own."""

    family: str
    server: RecordingServer
    template: str | None


@pytest.fixture(scope="module", params=["llama", "mistral"])
def templated(
    request: pytest.FixtureRequest, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Templated]:
    path = tmp_path_factory.mktemp("store") / "generations.db"
    is_llama = request.param == "llama"
    model = llama_model() if is_llama else mistral_model()
    how = "--trust-request-chat-template" if is_llama else "--tokenizer-mode=mistral"
    with nursery.server(path, how, model=model) as server:
        yield Templated(request.param, server, LLAMA if is_llama else None)


@pytest.mark.parametrize(
    ("answer", "history", "cause"),
    [
        ("It will be cold today.", said("It will be cold today."), "retokenised"),
        ("<think>\nIt snows.\n</think>\n\nYes.", said("Yes."), "reasoning"),
        ("a call", look(), "tool_call"),
        ("Yes. \n", said("Yes. \n"), "answer_end"),
        ("Yes.", said("It is far too early to tell, and nobody knows."), "foreign"),
    ],
    ids=["retokenised", "reasoning", "tool_call", "answer_end", "foreign"],
)
def test_what_stands_in_the_place_of_an_answer_is_named(
    templated: Templated, rollout: str, answer: str, history: Message, cause: str
) -> None:
    agent = Agent(templated.server, rollout, templated.template)
    result = {"role": "tool", "tool_call_id": "callnoone", "content": "cold"}
    agent.ask([SYSTEM, QUESTION], CALL[templated.family] if cause == "tool_call" else answer)
    agent.ask([SYSTEM, QUESTION, history, result if cause == "tool_call" else NEXT], "1")

    [found] = agent.breaks()

    if templated.family == "mistral" and cause == "retokenised":
        # Its tokenizer begins the text of an answer with a space, which the model did not write.
        cause = "answer_end"
    assert (found.cause, found.role, found.is_certain) == (cause, "assistant", True)


def test_what_changes_in_front_of_the_answer_is_named(templated: Templated, rollout: str) -> None:
    agent = Agent(templated.server, rollout, templated.template)
    title = {**SYSTEM, "content": "Write a title for the conversation, and nothing else."}
    timed = [{**SYSTEM, "content": f"It is 10:0{minute} now. You are a careful assistant."} for minute in range(2)]
    agent.ask([timed[0], QUESTION], "1")
    agent.ask([timed[1], QUESTION, said("1"), NEXT], "2")

    agent.ask([title, QUESTION], "3")
    agent.ask([timed[1], {**NEXT, "content": "Summary of what was said: it is cold. What now?"}], "4")

    found = [each.cause for each in agent.breaks()]
    # Most of Llama's system prompt is its template's own, so that another one may be of the same agent.
    assert found == ["header", *(["sub_agent"] if templated.family == "mistral" else []), "compaction"]
