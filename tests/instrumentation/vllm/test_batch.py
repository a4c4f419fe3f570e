"""Token ids in batches: /v1/chat/completions/batch, and vllm run-batch."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from agentlightning.store import open_store
from tests.common.answers import post, steady, tokenize
from tests.common.reference import greedy
from tests.common.tiny_model import tiny_model
from tests.common.vllm import LITTLE_CACHE, NO_WORKER, SMALL, RemoteOpenAIServer, run, started_by

BATCH = "/v1/chat/completions/batch"
CONVERSATIONS = [[{"role": "user", "content": " ".join(["word"] * (30 - length))}] for length in range(30)]


def body(server: RemoteOpenAIServer, **options: Any) -> dict[str, Any]:
    return {"model": server.model, "messages": CONVERSATIONS, "max_tokens": 4, "temperature": 0, **options}


def test_every_choice_has_the_ids_of_its_own_conversation(armed: RemoteOpenAIServer) -> None:
    answer = post(armed, BATCH, body(armed))

    expected = [tokenize(armed, messages=messages) for messages in CONVERSATIONS]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == expected
    assert answer["response_token_ids"] == [choice["token_ids"] for choice in answer["choices"]]
    assert answer["response_token_ids"] == [greedy(prompt, 4) for prompt in expected]


def test_a_request_that_declines_ids_gets_vllms_own_answer(
    armed: RemoteOpenAIServer, plain: RemoteOpenAIServer
) -> None:
    ours = post(armed, BATCH, body(armed, return_token_ids=False))

    assert steady(ours) == steady(post(plain, BATCH, body(plain)))


def test_a_request_that_asks_gets_prompt_ids_too(parsing: RemoteOpenAIServer) -> None:
    # AGL_RETURN_TOKEN_IDS=response
    unsaid, asked = (post(parsing, BATCH, body(parsing, **said)) for said in ({}, {"return_token_ids": True}))

    assert unsaid["response_token_ids"] == asked["response_token_ids"]
    assert all(choice["prompt_token_ids"] for choice in asked["choices"])
    assert not any(choice.get("prompt_token_ids") for choice in unsaid["choices"])


@pytest.mark.parametrize(
    "command",
    [
        ("vllm", "run-batch"),
        pytest.param(("python", "-m", "vllm.entrypoints.openai.run_batch"), marks=pytest.mark.tier("all")),
    ],
)
def test_result_lines_of_run_batch_carry_their_ids_and_are_recorded(tmp_path: Path, command: tuple[str, ...]) -> None:
    model = str(tiny_model())
    chat = {"model": model, "messages": CONVERSATIONS[-1], "max_tokens": 4, "temperature": 0}
    asked = {
        "chat": ("/v1/chat/completions", chat),
        "declined": ("/v1/chat/completions", {**chat, "return_token_ids": False}),
        "pooled": ("/v1/embeddings", {"model": model, "input": "one"}),
    }
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})
        for name, (url, body) in asked.items()
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    files = ("-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    store = tmp_path / "generations.db"
    # Forked, the engine core need not import vLLM once more.
    env = {"AGL_INSTRUMENT": "1", "AGL_STORE": str(store), **started_by("fork")}
    ran = run(*command, *files, "--model", model, *SMALL, *LITTLE_CACHE, *NO_WORKER, env=env)

    assert ran.returncode == 0, ran.stderr
    with (tmp_path / "out.jsonl").open() as written:
        results = {line["custom_id"]: line for line in map(json.loads, written)}
    answer = results["chat"]["response"]["body"]
    assert answer["response_token_ids"] == [greedy(answer["prompt_token_ids"], 4)]
    assert "response_token_ids" not in results["declined"]["response"]["body"]
    assert results["declined"]["response"]["body"]["choices"][0]["token_ids"] is None
    assert results["pooled"]["error"] or results["pooled"]["response"]["status_code"] != 200

    with open_store(str(store)) as opened:
        kept = {each.response_id: each for each in opened.generations()}
    assert kept.keys() == {results[name]["response"]["body"]["id"] for name in ("chat", "declined")}
    for each in kept.values():
        assert (each.endpoint, each.model, each.status) == ("/v1/chat/completions", model, "finished")
        assert each.prompt_token_ids == array("i", answer["prompt_token_ids"])
        assert [choice.token_ids for choice in each.choices] == [array("i", answer["response_token_ids"][0])]
    assert len({each.call_id for each in kept.values()}) == len(kept)
