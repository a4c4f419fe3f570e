"""Conversations that go on from exact ids, of each release that can: over chat, Messages and Responses."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from agentlightning.continuation import canonical_calls
from agentlightning.instrumentation.vllm._status import STATUS_ROUTE
from tests.common.answers import fetch, post
from tests.common.vllm import RemoteOpenAIServer
from tests.recording.test_continuation import CHAT, INTERFACES, RESPONSES, Interface
from tests.releases.chosen import ANYTHING, TOOL_CALL
from tests.releases.conftest import CONTINUES_SINCE
from tests.releases.engine import Engine
from tests.releases.table import Release
from tests.releases.test_ids import TOOL

TURNS = 5


@pytest.fixture(autouse=True)
def only_where_chats_go_on(release: Release) -> None:
    if release.numbers < CONTINUES_SINCE:
        pytest.skip("AGL_CONTINUE is for 0.14 and later")


def ids_of(answer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of an answer, whole or streamed: those of its prompt, and its own."""
    prompt: list[int] = []
    said: list[int] = []
    for part in answer if isinstance(answer, list) else [answer]:
        # The last event of a Responses stream has the whole answer.
        whole = part.get("response") or part.get("message") or part
        prompt = whole.get("prompt_token_ids") or part.get("prompt_token_ids") or prompt
        if whole.get("response_token_ids"):
            [said] = whole["response_token_ids"]
        else:
            for choice in part.get("choices", ()):
                said = [*said, *(choice.get("token_ids") or ())]
            said = [*said, *(part.get("token_ids") or ())]
    return prompt, said


@pytest.mark.parametrize("interface", INTERFACES.values(), ids=INTERFACES)
def test_a_conversation_goes_on_from_what_the_model_said(
    release: Release, armed: RemoteOpenAIServer, engine: Engine, interface: Interface, rollout: str
) -> None:
    if interface is RESPONSES and release.numbers[:2] == (0, 18):
        pytest.skip("0.18 prepares Responses by another method than chats")
    if interface is not CHAT and type(engine).__name__ != "Model":
        pytest.skip("only a chat has a seed for the tests' own worker")
    before = fetch(armed, STATUS_ROUTE)["continuation"]["results"]["continued"]
    history: list[Any] = []
    context: list[int] = []
    for turn in range(TURNS):
        history.append({"role": "user", "content": f"Question {turn}?"})
        options = engine.asks(ANYTHING + turn, temperature=1) if interface is CHAT else {"temperature": 1}
        body = {"model": armed.model, interface.messages: history, interface.limit: 16, **options}
        answer = post(armed, f"/rollout/{rollout}{interface.path}", body)
        prompt, said = ids_of(answer)
        assert said
        assert prompt[: len(context)] == context
        context = [*prompt, *said]
        history += interface.history(answer)

    assert fetch(armed, STATUS_ROUTE)["continuation"]["results"]["continued"] == before + TURNS - 1


def calls_in(text: str) -> Any:
    """Return the tool calls in what the model wrote."""
    written = re.findall("<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    return canonical_calls([{"function": json.loads(each)} for each in written])


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_a_tool_call_stays_as_the_model_wrote_it(
    armed: RemoteOpenAIServer, engine: Engine, stream: bool, rollout: str
) -> None:
    before = fetch(armed, STATUS_ROUTE)["continuation"]["results"]["continued"]
    history: list[Any] = [{"role": "user", "content": "Paris?"}]
    body = {"model": armed.model, "tools": [TOOL], "max_tokens": 120, **engine.asks(TOOL_CALL), "stream": stream}
    answer = post(armed, f"/rollout/{rollout}{CHAT.path}", {**body, "messages": history})
    history += CHAT.history(answer)
    calls = history[-1].get("tool_calls") or []
    prompt, said = ids_of(answer)
    text = post(armed, "/detokenize", {"model": armed.model, "tokens": said})["prompt"]
    if stream and canonical_calls(calls) != calls_in(text):
        pytest.skip("vLLM's stream has lost the call, or a part of it")
    history.append({"role": "tool", "content": "sunny", "tool_call_id": calls[0]["id"]})
    again = post(armed, f"/rollout/{rollout}{CHAT.path}", {**body, "messages": history, "stream": False})

    assert ids_of(again)[0][: len(prompt) + len(said)] == [*prompt, *said]
    assert fetch(armed, STATUS_ROUTE)["continuation"]["results"]["continued"] == before + 1
    assert fetch(armed, STATUS_ROUTE)["counters"]["failures"] == {}
