"""User code inside vLLM (logits processors, KV connectors, schedulers, stat loggers) sees what it sees without us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.common.answers import joined, joined_events, post, steady
from tests.common.tiny_model import tiny_model
from tests.common.vllm import RemoteOpenAIServer, run, side_by_side
from tests.plugins import OF_LOGPROBS, arguments, environment, is_settled, shown
from tests.recording.server import until

pytestmark = pytest.mark.tier("all")

TALK: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
GREEDY = {"temperature": 0, "max_tokens": 6}
STREAM = {"stream": True}
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"

QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": TALK, **GREEDY}),
    (CHAT, {"messages": TALK, **GREEDY, **STREAM}),
    (CHAT, {"messages": TALK, "n": 2, "temperature": 1, "seed": 3, "max_tokens": 4}),
    (CHAT, {"messages": TALK, **GREEDY, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": TALK, **GREEDY, "stop": ["zz"], "bad_words": ["Paris"]}),
    (CHAT, {"messages": TALK, **GREEDY, "tools": [WEATHER], "tool_choice": "required"}),
    (CHAT, {"messages": TALK, **GREEDY, "vllm_xargs": {"target": 300}}),
    (COMPLETIONS, {"prompt": ["The quick brown", "one two"], **GREEDY}),
    (COMPLETIONS, {"prompt": "The quick brown", **GREEDY, **STREAM}),
    (COMPLETIONS, {"prompt": "The quick brown", "echo": True, **GREEDY}),
    (RESPONSES, {"input": TALK, "temperature": 0, "max_output_tokens": 6}),
    (RESPONSES, {"input": TALK, "temperature": 0, "max_output_tokens": 6, **STREAM}),
    (MESSAGES, {"messages": TALK, **GREEDY}),
    (MESSAGES, {"messages": TALK, **GREEDY, **STREAM}),
    ("/v1/chat/completions/batch", {"messages": [TALK, TALK], **GREEDY}),
    ("/inference/v1/generate", {"token_ids": [1, 87, 85], "sampling_params": GREEDY}),
    ("/generative_scoring", {"query": [1, 87], "items": [[201, 85]], "label_token_ids": [5, 6]}),
    (CHAT, {"messages": TALK, "use_beam_search": True, "n": 2, "max_tokens": 3}),
    # Last, so that the engine has been told of all that ended before: it hears so in this order.
    (COMPLETIONS, {"prompt": "one", **GREEDY}),
]
ANSWERS_IDS = {"prompt_token_ids", "token_ids", "response_token_ids", "generations"}


def ask_everything(server: RemoteOpenAIServer) -> list[Any]:
    """Ask the questions one by one, and return the answers without ids of any kind."""
    return [without_ids(whole(post(server, path, {"model": server.model, **body}))) for path, body in QUESTIONS]


def whole(answer: Any) -> Any:
    if isinstance(answer, list):
        return joined(answer) if "choices" in answer[0] else joined_events(answer)
    return answer


def without_ids(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {key: without_ids(value) for key, value in steady(answer).items() if key not in ANSWERS_IDS}
    return [without_ids(item) for item in answer] if isinstance(answer, list) else answer


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Any], Path]]:
    """Return the answers of three servers with plugins, and what the plugins were shown."""
    folder = tmp_path_factory.mktemp("plugins")
    ours = {"AGL_INSTRUMENT": "1", "AGL_STORE": str(folder / "generations.db")}
    configurations = {"without us": {}, "recording": ours, "with logprobs": {**ours, "AGL_LOGPROBS": "on"}}
    options = ("--enable-scale-out", "--enable-auto-tool-choice", "--tool-call-parser=hermes")
    servers = {
        name: RemoteOpenAIServer(
            *options, *arguments((0, 32, 0)), env={**environment(folder / f"{name}.jsonl"), **variables}
        )
        for name, variables in configurations.items()
    }
    found = {}
    for name, server in servers.items():
        with side_by_side(server):
            answers = ask_everything(server)
            file = folder / f"{name}.jsonl"
            # The last of them is told after the answer: of the first server it is known by nothing else.
            until(lambda file=file: is_settled(file), "what the plugins write")
            found[name] = (answers, file)
    return found


def test_plugins_are_shown_the_same_while_generations_are_recorded(seen: dict[str, tuple[list[Any], Path]]) -> None:
    plain, recording = shown(seen["without us"][1]), shown(seen["recording"][1])

    assert dict(recording - plain) == {}
    assert dict(plain - recording) == {}
    callers = {json.loads(line)[0].partition(":")[0] for line in plain}
    assert callers == {"scheduler", "processor", "connector", "stat logger"}


def test_answers_are_the_same_with_a_processor_that_reads_extra_arguments(
    seen: dict[str, tuple[list[Any], Path]],
) -> None:
    assert seen["recording"][0] == seen["with logprobs"][0] == seen["without us"][0]


def test_plugins_see_only_the_recorded_logprobs_in_addition(seen: dict[str, tuple[list[Any], Path]]) -> None:
    plain, recording = (shown(seen[name][1], OF_LOGPROBS) for name in ("without us", "with logprobs"))

    assert dict(recording - plain) == {}
    assert dict(plain - recording) == {}
    assert shown(seen["with logprobs"][1]) != shown(seen["without us"][1])


PROGRAM = """\
import sys
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from tests.common.vllm import NO_WORKER
from tests.plugins import CONNECTOR, LOGITS_PROCESSORS

if __name__ == "__main__":
    small = {"max_model_len": 1024, "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 256 << 20}
    model = LLM(
        sys.argv[1],
        **small,
        distributed_executor_backend=NO_WORKER[1],
        scheduler_cls="tests.plugins.scheduler.Scheduler",
        logits_processors=[*LOGITS_PROCESSORS],
        kv_transfer_config=KVTransferConfig(**CONNECTOR),
    )
    for prompts in (["The quick brown"], ["one two"]):
        model.generate(prompts, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
"""


def test_plugins_of_an_offline_model_are_shown_the_same(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    for name, variables in {"off": {}, "on": {"AGL_INSTRUMENT": "1", "AGL_STORE": str(tmp_path / "kept.db")}}.items():
        ran = run(
            *("python", str(program), str(tiny_model())), env={**environment(tmp_path / f"{name}.jsonl"), **variables}
        )
        assert ran.returncode == 0, ran.stderr

    assert shown(tmp_path / "on.jsonl") == shown(tmp_path / "off.jsonl")
    assert shown(tmp_path / "on.jsonl").total() > 0
