"""Things that stay as they were: answers without ids, all of an answer but its ids, and vLLM once it is undone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Set
from typing import Any

import pytest

from tests.common.answers import joined, post, steady
from tests.common.environments import CHECKOUT
from tests.common.vllm import QUIET, RemoteOpenAIServer
from tests.releases.chosen import ANYTHING, SENTENCE, TOOL_CALL
from tests.releases.engine import Engine
from tests.releases.environments import scripts
from tests.releases.table import CALL_STREAMED, Release
from tests.releases.test_ids import MESSAGES, PROMPTS, TOOL, USAGE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IDS = {"prompt_token_ids", "token_ids", "response_token_ids"}
CUT = {"text_offset", "name", "type"}
"""Fields that depend on where vLLM cuts a stream: where a busy server has several tokens in one chunk, 0.32's hermes
parser loses what a tool call begins with, with us and without."""
ASKS: Mapping[str, tuple[str, int, dict[str, Any]]] = {
    "chat": (CHAT, ANYTHING, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}),
    "chat, stopped": (CHAT, SENTENCE, {"messages": MESSAGES, "stop": ["four"], "max_tokens": 60}),
    "completions": (COMPLETIONS, ANYTHING, {"prompt": PROMPTS}),
    # One prompt: two may be computed together or not, and then the last digits differ.
    "completions, stopped": (
        COMPLETIONS,
        SENTENCE,
        {"prompt": PROMPTS[0], "logprobs": 1, "stop": ["four"], "max_tokens": 60},
    ),
}
CALL = (CHAT, TOOL_CALL, {"messages": MESSAGES, "tools": [TOOL], "max_tokens": 120})

each_ask = pytest.mark.parametrize(
    ("asked", "stream"),
    [
        *(pytest.param(asked, False, id=name) for name, asked in ASKS.items()),
        *(pytest.param(asked, True, id=f"{name}, streamed") for name, asked in ASKS.items()),
        pytest.param(CALL, False, id="a tool call"),
        pytest.param(CALL, True, id="a tool call, streamed", marks=pytest.mark.check(CALL_STREAMED)),
    ],
)

UNDO = """\
import json, sys, types
from agentlightning.instrumentation import vllm

vllm.import_targets()
modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "vllm"]
things = {value for module in modules for value in list(vars(module).values()) if isinstance(value, type)}
things |= set(modules)

def whole(thing):
    functions = (types.FunctionType, classmethod, staticmethod)
    members = {name: id(value) for name, value in list(vars(thing).items()) if isinstance(value, functions)}
    return members, [*vars(thing).get("__pydantic_fields__", ())]

def changed():
    return sorted(thing.__name__ for thing in things if whole(thing) != before[thing])

before = {thing: whole(thing) for thing in things}
vllm.instrument_vllm()
patched = changed()
vllm.uninstrument_vllm()
print(json.dumps([patched, changed()]))
"""


def answer_of(
    server: RemoteOpenAIServer, engine: Engine, asked: tuple[str, int, dict[str, Any]], stream: bool, **said: Any
) -> Any:
    """Return what is the same from call to call in an answer that no client library has touched; a stream's, joined."""
    path, what, options = asked
    body = {"model": server.model, "max_tokens": 24, **engine.asks(what, **options), **said}
    if stream:
        body |= {"stream": True, "stream_options": USAGE}
    answer = steady(post(server, path, body))
    return without(CUT, joined(answer)) if stream else answer


def without(names: Set[str], answer: Any) -> Any:
    if isinstance(answer, dict):
        return {name: without(names, value) for name, value in answer.items() if name not in names}
    return [without(names, item) for item in answer] if isinstance(answer, list) else answer


def turns(asked: Any, stream: bool) -> int:
    """The number of times to ask: what vLLM's parser makes of a streamed call depends on the cuts, beyond `CUT`."""
    return 10 if asked is CALL and stream else 1


def assert_alike(ours: Callable[[], Any], vllms: Callable[[], Any], turns: int) -> None:
    """Assert that the two answers are the same, in one of so many turns."""
    while (answer := ours()) != (expected := vllms()) and (turns := turns - 1):
        pass
    assert answer == expected


@each_ask
def test_request_that_declines_ids_gets_vllms_own_answer(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, engine: Engine, asked: Any, stream: bool
) -> None:
    def ours() -> Any:
        return answer_of(armed, engine, asked, stream, return_token_ids=False)

    assert_alike(ours, lambda: answer_of(plain, engine, asked, stream), turns(asked, stream))


@each_ask
def test_answer_without_its_ids_equals_vllms_own(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, engine: Engine, asked: Any, stream: bool
) -> None:
    def ours() -> Any:
        answer = answer_of(armed, engine, asked, stream)
        without_ids = without(IDS, answer)
        assert without_ids != answer
        return without_ids

    def vllms() -> Any:
        # Asked for ids, vLLM sends logprobs that it loses otherwise; before 0.10.2 it does not hear that.
        return without(IDS, answer_of(plain, engine, asked, stream, return_token_ids=True))

    assert_alike(ours, vllms, turns(asked, stream))


def test_uninstrumented_vllm_has_no_patch_left(release: Release) -> None:
    python = scripts(release) / "python"
    undone = subprocess.run(
        [python, "-c", UNDO], env={**QUIET, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, check=False
    )

    # vLLM logs to the same place.
    patched, left = json.loads(undone.stdout.splitlines()[-1])
    assert {"OpenAIServingChat", "OpenAIServingCompletion", "OutputProcessor"} <= set(patched)
    assert left == []
