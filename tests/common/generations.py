"""Generations to be stored: each is what its number makes it, so that a mixture of two is none of them."""

from __future__ import annotations

import uuid
from array import array
from typing import Any

from agentlightning.generation import Choice, Generation, RoutedExperts, SamplingMask, TopLogprobs, new_id

SECOND = 1_000_000_000
START = 1_790_000_000 * SECOND

HOSTILE = {
    "long": "x" * 10_000,
    "a path": "../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "quotes": "'; DROP TABLE generations; --\"",
    "a NUL": "a\0b",
    "a NUL alone": "\0",
    "any Unicode": "größe 北京 \N{GRINNING FACE} e\N{COMBINING ACUTE ACCENT}\u2028\x85",
    "a pattern": "%_*?[a-z]",
    "blanks": " ",
    "nothing": "",
}

FULL = Generation(
    call_id=new_id(),
    request_id="chatcmpl-1-abcdef01",
    response_id="chatcmpl-1",
    endpoint="/v1/chat/completions",
    model="a model/größe",
    rollout_id="rollout",
    attempt_id="attempt",
    session_id="session",
    trace_id="0af7651916cd43dd8448eb211c80319c",
    agent_id="agent",
    parent_agent_id="parent agent",
    purpose="sub-agent",
    retry=2,
    via="router",
    started_at=START,
    first_token_at=START + 1,
    finished_at=START + 2,
    status="aborted",
    prompt_token_ids=array("i", [0, 1, 2**31 - 1, -1]),
    prompt_text="what went in: \N{GRINNING FACE}\0",
    sampling_params='{"n": 3, "stop": ["\\ud800"]}',
    logprobs_mode="raw_logprobs",
    cached_tokens=3,
    choices=[
        Choice(
            token_ids=array("i", [7, 8]),
            logprobs=array("f", [-0.1, float("-inf")]),
            text="what came out",
            finish_reason="stop",
            stop_reason="7",
            weight_versions=[("v1", 0, 1), ("v2", 1, 2)],
            routed_experts=RoutedExperts((2, 3, 2), array("h", range(12))),
            sampling_mask=SamplingMask(array("I", [0, 3, 4]), array("i", [7, 9, 2**31 - 1, 8])),
            top_logprobs=TopLogprobs(
                array("I", [0, 2, 3]), array("i", [7, 9, 8]), array("f", [-0.1, -2.5, float("-inf")])
            ),
        ),
        Choice(index=1, token_ids=array("i"), finish_reason="abort", stop_reason=7, weight_versions=[]),
        Choice(index=2),
    ],
    served_model="tiny",
    requested_params='{"temperature": 0}',
    prompt_logprobs=TopLogprobs(array("I", [0, 0, 1, 3, 4]), array("i", [1, 5, 6, 7]), array("f", [-1, -2, -3, -4])),
)
EMPTY = Generation(request_id="", finished_at=0, status="error")


def generation(number: int, prompt: int = 12, output: int = 5, **fields: Any) -> Generation:
    """The generation of this number, of so many ids, ten to a rollout and finished a second after the one before it."""
    finished_at = START + number * SECOND
    response_id = f"chatcmpl-{uuid.UUID(int=number).hex}"
    choice = Choice(token_ids=array("i", range(number, number + output)), finish_reason="stop")
    usual: dict[str, Any] = {
        "call_id": new_id(finished_at),
        "request_id": f"{response_id}-{number % 2**32:08x}",
        "response_id": response_id,
        "endpoint": "/v1/chat/completions",
        "model": "tiny-model",
        "rollout_id": f"rollout-{number // 10}",
        "attempt_id": f"attempt-{number // 10}",
        "started_at": finished_at - SECOND // 2,
        "first_token_at": finished_at - SECOND // 4,
        "finished_at": finished_at,
        "status": "finished",
        "prompt_token_ids": array("i", range(number, number + prompt)),
        "sampling_params": '{"temperature": 0.7, "top_p": 0.95}',
        "cached_tokens": 0,
        "choices": [choice],
    }
    return Generation(**usual | fields)
