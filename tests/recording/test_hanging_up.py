"""Clients that hang up in the midst of an answer: what the engine has sampled for them is kept, once, as aborted."""

from __future__ import annotations

import asyncio
import json
import random
from typing import NamedTuple

import aiohttp

from tests.common.answers import get, post, tokenize
from tests.common.reference import greedy
from tests.recording.server import RecordingServer, until
from tests.recording.test_endpoints import ids_of
from tests.recording.under_way import ROUTE

CALLS = 1000
AT_ONCE = 64
TOKENS = 32
# More than the engine can come to before it is told that nobody waits any more.
NEVER_ENDING = 700
PROMPTS = ["one", "The quick brown", "Größe 😀", "two three"]


class Call(NamedTuple):
    """One of the clients: what it asks for, and after how many chunks it hangs up, if it does."""

    prompt: str
    leaves_after: int | None


class Got(NamedTuple):
    """What it got."""

    response_id: str
    token_ids: list[int]


def plan() -> list[Call]:
    chance = random.Random(6)
    return [
        Call(chance.choice(PROMPTS), None if number % 2 else chance.randrange(TOKENS)) for number in range(CALLS)
    ]


def test_what_was_sampled_for_a_thousand_clients_is_kept_though_half_of_them_hang_up(
    recording: RecordingServer, rollout: str
) -> None:
    calls = plan()
    got = asyncio.run(all_of(recording, rollout, calls))
    until(lambda: len(recording.kept(rollout_id=rollout)) >= CALLS, "all of them")
    kept = recording.recorded(rollout_id=rollout)

    assert sorted(str(each.attempt_id) for each in kept) == sorted(map(str, range(CALLS)))
    assert len({each.id for each in kept}) == len({each.call_id for each in kept}) == CALLS
    by_attempt = {int(str(each.attempt_id)): each for each in kept}
    prompts = {prompt: tokenize(recording, prompt=prompt) for prompt in PROMPTS}
    longest = {prompt: greedy_without_end(recording, prompt) for prompt in PROMPTS}
    for number, (call, (response_id, token_ids)) in enumerate(zip(calls, got, strict=True)):
        each = by_attempt[number]
        prompt, [sampled] = ids_of(each)
        assert each.response_id == response_id
        assert prompt == prompts[call.prompt]
        assert sampled[: len(token_ids)] == token_ids
        assert sampled == longest[call.prompt][: len(sampled)]
        # The engine may have come to the end of what it was asked for before the server knew that nobody waits.
        whole = len(sampled) == (TOKENS if call.leaves_after is None else NEVER_ENDING)
        assert whole or call.leaves_after is not None
        assert (each.status, each.choices[0].finish_reason) == (("finished", "length") if whole else ("aborted", "abort"))

    assert sum(each.status == "aborted" for each in kept) > CALLS / 4
    assert get(recording, ROUTE) == (200, b"0")


def greedy_without_end(server: RecordingServer, prompt: str) -> list[int]:
    """What the model says if it may not end, as far as it was asked to; the reference ends where the model does."""
    body = server.body(prompt=prompt, max_tokens=NEVER_ENDING, ignore_eos=True, return_token_ids=True)
    said = post(server, "/v1/completions", body)["choices"][0]["token_ids"]
    reference = greedy(tokenize(server, prompt=prompt), TOKENS)
    assert said[: len(reference)] == reference
    return said


async def all_of(server: RecordingServer, rollout: str, calls: list[Call]) -> list[Got]:
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(client: aiohttp.ClientSession, number: int, call: Call) -> Got:
        tokens = TOKENS if call.leaves_after is None else NEVER_ENDING
        options = {"stream": True, "ignore_eos": True, "return_token_ids": True}
        body = server.body(prompt=call.prompt, max_tokens=tokens, **options)
        headers = {"x-agl-rollout-id": rollout, "x-agl-attempt-id": str(number), "Authorization": "Bearer none"}
        token_ids: list[int] = []
        response_id = ""
        async with limit, client.post("/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200
            chunks = (json.loads(line[6:]) async for line in response.content if line.startswith(b"data: {"))
            count = 0
            async for chunk in chunks:
                response_id = chunk["id"]
                token_ids += [token_id for choice in chunk["choices"] for token_id in choice["token_ids"] or []]
                count += 1
                if call.leaves_after is not None and count > call.leaves_after:
                    # Before its end, this closes the connection.
                    break
        return Got(response_id, token_ids)

    connections = aiohttp.TCPConnector(limit=AT_ONCE)
    async with aiohttp.ClientSession(server.url, connector=connections) as client:
        return await asyncio.gather(*(one(client, number, call) for number, call in enumerate(calls)))
