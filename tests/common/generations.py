"""Generations to be stored: each is what its number makes it, so that a mixture of two is none of them."""

from __future__ import annotations

import uuid
from array import array
from typing import Any

from agentlightning.generation import Choice, Generation, new_id

SECOND = 1_000_000_000
START = 1_790_000_000 * SECOND


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
