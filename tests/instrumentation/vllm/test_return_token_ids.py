"""A request's own `return_token_ids`: false gives vLLM's answer, true or omitted vLLM's answer with ids."""

from __future__ import annotations

from typing import Any

import pytest

from tests.common.answers import joined, post, steady
from tests.common.vllm import RemoteOpenAIServer

MESSAGES: Any = [{"role": "user", "content": "What is the capital of France? 😀"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKS = {
    "chat": (CHAT, {"messages": MESSAGES}),
    "chat, n": (CHAT, {"messages": MESSAGES, "n": 2, "temperature": 1, "seed": 7}),
    "chat, stop string": (CHAT, {"messages": MESSAGES, "stop": ["a"]}),
    "completions": (COMPLETIONS, {"prompt": "The quick brown"}),
    "completions, prompts, logprobs": (COMPLETIONS, {"prompt": ["The quick", "😀"], "logprobs": 2}),
    "completions, stop string": (COMPLETIONS, {"prompt": "The quick brown", "stop": ["a"]}),
}

pytestmark = [
    pytest.mark.parametrize(("path", "options"), ASKS.values(), ids=ASKS.keys()),
    pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"]),
]


def ask(server: RemoteOpenAIServer, path: str, **options: Any) -> Any:
    """Return the answer without parts that differ from call to call; a stream's chunks joined."""
    answer = steady(post(server, path, {"model": server.model, "max_tokens": 16, "temperature": 0, **options}))
    return joined(answer) if isinstance(answer, list) else answer


def test_false_gives_exactly_vllms_answer(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, path: str, options: dict[str, Any], stream: bool
) -> None:
    ours = ask(armed, path, stream=stream, return_token_ids=False, **options)

    assert ours == ask(plain, path, stream=stream, **options)


def test_true_or_omitted_gives_vllms_answer_with_ids(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, path: str, options: dict[str, Any], stream: bool
) -> None:
    not_said = ask(armed, path, stream=stream, **options)
    null = ask(armed, path, stream=stream, return_token_ids=None, **options)
    true = ask(armed, path, stream=stream, return_token_ids=True, **options)
    vllms = ask(plain, path, stream=stream, return_token_ids=True, **options)

    assert not_said == null == true
    if not stream:
        assert true.pop("response_token_ids") == [choice["token_ids"] for choice in vllms["choices"]]
    assert true == vllms
