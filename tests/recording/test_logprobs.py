"""`AGL_LOGPROBS=on`: logprobs are kept though nobody asked for any, and answers stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.common.answers import post
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer
from tests.recording.test_endpoints import CHAT, COMPLETIONS, MODES, PROMPTS, TALK, answer_to, choice_ids

SPECULATIVE = ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}')
PROCESSED = ("--logprobs-mode", "processed_logprobs")


@pytest.fixture(scope="module", params=[PROCESSED, SPECULATIVE], ids=["processed", "speculative"])
def server(
    request: pytest.FixtureRequest, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RecordingServer]:
    path = tmp_path_factory.mktemp("store") / "generations.db"
    # A prompt that comes from the cache is computed in other steps, and differs in the last bit.
    arguments = ("--no-enable-prefix-caching", *request.param)
    with nursery.server(path, *arguments, env={"AGL_LOGPROBS": "on"}) as server:
        yield server


def kept_logprobs(server: RecordingServer, rollout: str) -> list[list[float]]:
    """Return the logprobs of each choice of the rollout's one generation."""
    [kept] = server.recorded(rollout_id=rollout)
    assert kept.logprobs_mode == ("processed_logprobs" if PROCESSED[0] in server.command else "raw_logprobs")
    found = []
    for choice in kept.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(choice_ids(choice))
        found.append(choice.logprobs.tolist())
    return found


def chat_logprobs(answer: Any) -> list[list[float]]:
    """Return the logprobs of each choice of a chat answer."""
    return [[each["logprob"] for each in choice["logprobs"]["content"]] for choice in answer["choices"]]


def shown(answer: Any) -> list[Any]:
    """Return the logprobs in an answer."""
    chunks = answer if isinstance(answer, list) else [answer]
    return [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice.get("logprobs")]


@MODES
@pytest.mark.parametrize(
    "options",
    [{}, {"n": 3, "temperature": 1, "seed": 5}, {"stop": "a"}, {"max_tokens": 64, "ignore_eos": True}],
    ids=["greedy", "three choices", "stop string", "longer"],
)
def test_recorded_logprobs_are_those_that_vllm_answers(
    server: RecordingServer, rollout: str, options: dict[str, Any], stream: bool
) -> None:
    body = server.body(messages=TALK, **options)
    asked = post(server, CHAT, {**body, "logprobs": True})
    answer = answer_to(server, rollout, CHAT, {**body, "stream": stream})

    assert shown(answer) == []
    assert kept_logprobs(server, rollout) == chat_logprobs(asked)


@MODES
def test_logprobs_that_a_client_asks_for_are_answered_and_recorded(
    server: RecordingServer, rollout: str, stream: bool
) -> None:
    body = server.body(prompt=PROMPTS[0], logprobs=2, stream=stream)
    answer = answer_to(server, rollout, COMPLETIONS, body)

    said = [value for choice in shown(answer) for value in choice["token_logprobs"]]
    assert kept_logprobs(server, rollout) == [said]
    assert len(said) == sum(len(choice["top_logprobs"]) for choice in shown(answer)) > 0


def test_logprobs_of_named_ids_are_answered_and_the_sampled_ids_recorded(server: RecordingServer, rollout: str) -> None:
    if SPECULATIVE[0] in server.command:
        pytest.skip("vLLM answers with HTTP 500 to this beside speculative decoding, without us too")
    body = server.body(messages=TALK, logprobs=True, logprob_token_ids=[5, 6])
    answer = answer_to(server, rollout, CHAT, body)

    assert kept_logprobs(server, rollout) == chat_logprobs(answer)


def test_logprobs_of_the_prompt_stay_unchanged(server: RecordingServer, rollout: str) -> None:
    body = server.body(prompt=PROMPTS[0], prompt_logprobs=1)
    answer = answer_to(server, rollout, COMPLETIONS, body)

    assert len(answer["choices"][0]["prompt_logprobs"]) > 1
    assert shown(answer) == []
    [logprobs] = kept_logprobs(server, rollout)
    asked = post(server, COMPLETIONS, {**body, "logprobs": 0})
    assert logprobs == asked["choices"][0]["logprobs"]["token_logprobs"]
    assert answer["choices"][0]["prompt_logprobs"] == asked["choices"][0]["prompt_logprobs"]


def test_a_beam_search_has_logprobs_for_every_engine_request(server: RecordingServer, rollout: str) -> None:
    options = {"prompt": PROMPTS[0], "n": 2, "max_tokens": 3, "use_beam_search": True}
    answer_to(server, rollout, COMPLETIONS, server.body(**options))

    for kept in server.recorded(rollout_id=rollout):
        assert [len(choice.logprobs or ()) for choice in kept.choices] == [len(choice_ids(c)) for c in kept.choices]
