"""What stays as it was: the answers to who wants no ids, all of an answer but its ids, and vLLM once it is undone."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from tests.common.answers import joined, post, steady
from tests.common.environments import CHECKOUT
from tests.common.vllm import QUIET, RemoteOpenAIServer
from tests.releases.chosen import ANYTHING, SENTENCE, TOOL_CALL
from tests.releases.engine import Engine
from tests.releases.environments import scripts
from tests.releases.table import Release
from tests.releases.test_ids import MESSAGES, PROMPTS, TOOL, USAGE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IDS = {"prompt_token_ids", "token_ids", "response_token_ids"}
ASKS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "chat": (CHAT, ANYTHING, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}),
    "chat, stopped": (CHAT, SENTENCE, {"messages": MESSAGES, "stop": ["four"], "max_tokens": 60}),
    "chat, a tool": (CHAT, TOOL_CALL, {"messages": MESSAGES, "tools": [TOOL], "max_tokens": 120}),
    "completions": (COMPLETIONS, ANYTHING, {"prompt": PROMPTS, "logprobs": 1}),
    "completions, stopped": (COMPLETIONS, SENTENCE, {"prompt": PROMPTS[0], "stop": ["four"], "max_tokens": 60}),
}

each_ask = pytest.mark.parametrize("asked", ASKS.values(), ids=ASKS.keys())
plain_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])

UNDO = """\
import importlib, sys, types
from agentlightning.instrumentation import vllm

vllm.import_targets()

def whole(thing):
    members = {name: (value, getattr(value, "default", None)) for name, value in vars(thing).items()}
    return {name: value for name, value in members.items() if not name.startswith("_abc_")}

targets = [sys.modules[name] for patch_set in vllm.PATCH_SETS for name in patch_set.modules if name in sys.modules]
classes = [cls for module in targets for cls in vars(module).values() if isinstance(cls, type)]
before = {id(thing): whole(thing) for thing in (*targets, *classes)}

def changed():
    return sorted({thing.__name__ for thing in (*targets, *classes) if whole(thing) != before[id(thing)]})

vllm.instrument_vllm()
print(*changed())
vllm.uninstrument_vllm()
print(*changed())
"""


def answer_of(
    server: RemoteOpenAIServer, engine: Engine, asked: tuple[str, int, dict[str, Any]], stream: bool, **said: Any
) -> Any:
    """What is the same from call to call of an answer that no client library has touched; a stream's, joined."""
    path, what, options = asked
    body = {"model": server.model, "max_tokens": 24, **engine.asks(what, **options), **said}
    if stream:
        body |= {"stream": True, "stream_options": USAGE}
    answer = steady(post(server, path, body))
    return joined(answer) if stream else answer


def without_ids(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {name: without_ids(value) for name, value in answer.items() if name not in IDS}
    return [without_ids(item) for item in answer] if isinstance(answer, list) else answer


@each_ask
@plain_and_streamed
def test_who_wants_no_ids_gets_vllms_own_answer(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, engine: Engine, asked: Any, stream: bool
) -> None:
    ours = answer_of(armed, engine, asked, stream, return_token_ids=False)

    assert ours == answer_of(plain, engine, asked, stream)


@each_ask
@plain_and_streamed
def test_all_but_the_ids_is_vllms_own(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, engine: Engine, asked: Any, stream: bool
) -> None:
    ours = answer_of(armed, engine, asked, stream)

    assert without_ids(ours) == without_ids(answer_of(plain, engine, asked, stream))
    assert without_ids(ours) != ours


def test_undone_vllm_is_as_it_was(release: Release) -> None:
    python = scripts(release) / "python"
    undone = subprocess.run(
        [python, "-c", UNDO], env={**QUIET, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, check=False
    )

    patched, left = undone.stdout.splitlines()
    assert "OpenAIServingChat" in patched
    assert left == ""
