"""Clients that hang up during an answer: the ids sampled for them are recorded once, as aborted."""

from __future__ import annotations

import random

from tests.common.answers import get, post
from tests.recording.load import PROMPTS, TOKENS, Load, Stream, checked
from tests.recording.server import RecordingServer, until
from tests.recording.under_way import ROUTE

CALLS = 1000
FEWER_CALLS = 50
AT_ONCE = 64
# More than the engine usually samples before it is told that the client has gone.
NEVER_ENDING = 900


def plan(calls: int) -> list[Stream]:
    chance = random.Random(6)
    stay = [Stream(number, chance.choice(PROMPTS)) for number in range(0, calls, 2)]
    leave = [
        Stream(number, chance.choice(PROMPTS), NEVER_ENDING, leaves_after=chance.randint(1, TOKENS))
        for number in range(1, calls, 2)
    ]
    return [stream for both in zip(stay, leave, strict=True) for stream in both]


def said_in_full(server: RecordingServer, prompt: str) -> list[int]:
    body = server.body(prompt=prompt, max_tokens=NEVER_ENDING, ignore_eos=True, return_token_ids=True)
    return post(server, "/v1/completions", body)["choices"][0]["token_ids"]


def test_ids_sampled_for_clients_that_hang_up_are_recorded(
    recording: RecordingServer, rollout: str, thorough: bool
) -> None:
    calls = CALLS if thorough else FEWER_CALLS
    with Load(recording, rollout, plan(calls), AT_ONCE) as load:
        load.wait()
    until(lambda: len(recording.kept(rollout_id=rollout)) >= calls, "all of them")
    kept = checked(recording.recorded(rollout_id=rollout), load.streams)

    assert kept.keys() == set(range(calls))
    assert [stream.number for stream in load.streams if not stream.token_ids] == []
    assert all(kept[stream.number].status == "finished" for stream in load.streams if not stream.leaves_after)
    assert sum(each.status == "aborted" for each in kept.values()) > calls / 4
    # To the last id: what it would have said to who waits for all of it.
    longest = {prompt: said_in_full(recording, prompt) for prompt in PROMPTS}
    for stream in load.streams:
        [choice] = kept[stream.number].choices
        assert choice.token_ids is not None
        assert choice.token_ids.tolist() == longest[stream.prompt][: len(choice.token_ids)]

    assert get(recording, ROUTE) == (200, b"0")
