"""Recordings of answers, with logprobs that nobody has asked for."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from agentlightning.errors import StoreUnavailable
from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm._status import STATUS_ROUTE
from agentlightning.store import open_database, open_store, senders
from agentlightning.token_text import TokenTexts
from tests.common.answers import fetch, post
from tests.common.vllm import RemoteOpenAIServer
from tests.recording.server import until
from tests.releases.chosen import ANYTHING
from tests.releases.engine import Engine
from tests.releases.table import Release
from tests.releases.test_ids import MESSAGES, PROMPTS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODES = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


@pytest.fixture(autouse=True)
def only_with_v1(release: Release) -> None:
    if release.engine == "V0":
        pytest.skip("nothing is recorded with the V0 engine, and the log says so")


def kept(server: RemoteOpenAIServer, response_id: str) -> list[Generation]:
    """Return what is kept of an answer, as soon as something is."""

    def found() -> list[Generation]:
        try:
            with open_store(server.env["AGL_STORE"], read_only=True) as store:
                return [*store.generations(response_id=response_id)]
        except StoreUnavailable:
            return []

    return until(found, "the generation")


def ids(array: Any) -> list[int]:
    return array.tolist()


@MODES
def test_a_chat_answer_is_kept_with_the_logprobs_that_it_has_where_it_is_asked(
    armed: RemoteOpenAIServer, engine: Engine, stream: bool
) -> None:
    body = {"model": armed.model, "messages": MESSAGES, "max_tokens": 12, **engine.asks(ANYTHING)}
    asked = post(armed, CHAT, {**body, "logprobs": True})
    answer = post(armed, CHAT, {**body, "stream": stream})
    chunks = answer if stream else [answer]
    [generation] = kept(armed, chunks[0]["id"])

    said = [each["logprob"] for each in asked["choices"][0]["logprobs"]["content"]]
    assert not any(choice.get("logprobs") for chunk in chunks for choice in chunk["choices"])
    [choice] = generation.choices
    assert ids(generation.prompt_token_ids) == asked["prompt_token_ids"]
    assert ids(choice.token_ids) == asked["choices"][0]["token_ids"]
    # A prompt of which a part came from the cache was computed in other steps.
    assert choice.logprobs is not None
    assert choice.logprobs.tolist() == pytest.approx(said, rel=1e-3)
    assert (generation.status, generation.logprobs_mode) == ("finished", "raw_logprobs")


@MODES
def test_each_of_n_choices_of_each_prompt_has_its_own(armed: RemoteOpenAIServer, engine: Engine, stream: bool) -> None:
    options = {"n": 2, "temperature": 1, "max_tokens": 8, "stream": stream}
    answer = post(armed, COMPLETIONS, {"model": armed.model, "prompt": PROMPTS, **engine.asks(ANYTHING, **options)})
    chunks = answer if stream else [answer]
    response_id = chunks[0]["id"]
    until(lambda: len(kept(armed, response_id)) == len(PROMPTS), "every prompt's")

    said: dict[int, list[int]] = {}
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        said.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
    choices = [choice for each in kept(armed, response_id) for choice in each.choices]
    assert sorted(ids(choice.token_ids) for choice in choices) == sorted(said.values())
    for choice in choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(ids(choice.token_ids))


def test_store_has_the_sender_and_its_vocabulary(armed: RemoteOpenAIServer, engine: Engine) -> None:
    answer = post(armed, COMPLETIONS, {"model": armed.model, "prompt": PROMPTS[0], **engine.asks(ANYTHING)})
    [generation] = kept(armed, answer["id"])
    with closing(open_database(armed.env["AGL_STORE"])) as database, database.reading() as connection:
        seen = senders.recent(connection, since=0)
        vocabulary = senders.vocabulary_of(connection, generation.id)

    [sender] = [each.sender for each in seen]
    assert (sender.model, sender.vllm) == (armed.model, fetch(armed, STATUS_ROUTE)["vllm"])
    assert vocabulary is not None
    said = {"tokens": [*ids(generation.prompt_token_ids), *ids(generation.choices[0].token_ids)]}
    # Each is known, and put together they are the text, as the model's own tokenizer has it.
    pieces = TokenTexts(vocabulary)
    text = "".join(map(pieces.text, said["tokens"])).encode().decode("unicode_escape").encode("latin-1")
    assert text.decode("utf-8", "replace") == post(armed, "/detokenize", {"model": armed.model, **said})["prompt"]
