"""The ids of engine requests, parsed for rollout, endpoint and choice."""

from __future__ import annotations

import pytest

from agentlightning.instrumentation.vllm.capture.request_names import RequestName, parse

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("request_id", "said"),
    [
        ("chatcmpl-ro-7-eaf61e22", RequestName("chatcmpl-ro-7", "chatcmpl-ro-7", CHAT, "ro-7")),
        ("chatcmpl-ro-7.at.1-eaf61e22", RequestName("chatcmpl-ro-7.at.1", "chatcmpl-ro-7.at.1", CHAT, "ro-7.at", "1")),
        ("cmpl-größe-eaf61e22", RequestName("cmpl-größe", "cmpl-größe", COMPLETIONS, "größe")),
        ("cmpl-ro-7-eaf61e22", RequestName("cmpl-ro-7", "cmpl-ro-7", COMPLETIONS, "ro-7")),
        ("ro-7.1-eaf61e22", RequestName("ro-7.1", "ro-7.1", None, "ro-7", "1")),
        (
            "chatcmpl-agl/a%2Fb/at-1/planner/7-eaf61e22",
            RequestName(
                "chatcmpl-agl/a%2Fb/at-1/planner/7", "chatcmpl-agl/a%2Fb/at-1/planner/7", CHAT, "a/b", "at-1", "planner"
            ),
        ),
        ("agl/ro-7/7-eaf61e22", RequestName("agl/ro-7/7", "agl/ro-7/7", None, "ro-7")),
        # Where a client sends no header.
        ("chatcmpl-7541c8c9-f6dc9b0f", RequestName("chatcmpl-7541c8c9", "chatcmpl-7541c8c9", CHAT)),
        # Of vLLM's gRPC server itself.
        ("smg-warmup-161", RequestName("smg-warmup-161", "smg-warmup-161")),
        # What no id of a rollout may be.
        ("chatcmpl-a'b-eaf61e22", RequestName("chatcmpl-a'b", "chatcmpl-a'b", CHAT)),
        (f"chatcmpl-{'a' * 300}-eaf61e22", RequestName(f"chatcmpl-{'a' * 300}", f"chatcmpl-{'a' * 300}", CHAT)),
        ("chatcmpl-.1-eaf61e22", RequestName("chatcmpl-.1", "chatcmpl-.1", CHAT, ".1")),
        ("", RequestName("", "")),
    ],
)
def test_names_by_the_rust_frontend_are_parsed(request_id: str, said: RequestName) -> None:
    assert parse(request_id, from_rust=True) == said


@pytest.mark.parametrize(
    ("request_id", "said"),
    [
        # From 0.14 on vLLM adds eight characters.
        ("cmpl-ro-7-0-eaf61e22", RequestName("cmpl-ro-7-0", "cmpl-ro-7", COMPLETIONS, "ro-7")),
        ("cmpl-ro-7-0", RequestName("cmpl-ro-7-0", "cmpl-ro-7", COMPLETIONS, "ro-7")),
        ("2_chatcmpl-ro-7-eaf61e22", RequestName("chatcmpl-ro-7", "chatcmpl-ro-7", CHAT, "ro-7", choice=2)),
        (
            "cmpl-ace6090aedee17e3-0-eaf61e22",
            RequestName("cmpl-ace6090aedee17e3-0", "cmpl-ace6090aedee17e3", COMPLETIONS),
        ),
    ],
)
def test_names_by_a_python_frontend_elsewhere_are_parsed(request_id: str, said: RequestName) -> None:
    assert parse(request_id, from_rust=False) == said
