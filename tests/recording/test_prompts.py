"""The recorded text of a prompt matches its ids, or is None; text that an answer hides is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from agentlightning.generation import Generation
from tests.common.answers import tokenize
from tests.common.reference import tokenizer
from tests.conftest import PARSERS
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer
from tests.recording.test_endpoints import BATCH, CHAT, COMPLETIONS, MESSAGES, RESPONSES, answer_to, ids_of

TEXT = "The quick brown fox jumps over the lazy dog."
TALK: Any = [{"role": "user", "content": TEXT}]
LONG = "word " * 2000
"""A prompt for half of which the server has room."""


def short(value: Any) -> str | None:
    """A parameter as part of a test's name, and so of the rollout's: without slashes and quotes."""
    return value.replace("/", " ") if isinstance(value, str) else None if value is None else type(value).__name__


@pytest.fixture(scope="module")
def server(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    """A server without embeddings: with them, vLLM itself has no text of a chat's prompt."""
    path = tmp_path_factory.mktemp("store") / "generations.db"
    env = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with nursery.server(path, "--enable-prompt-tokens-details", *PARSERS, env=env) as server:
        yield server


def asked(server: RecordingServer, rollout: str, path: str, **options: Any) -> Generation:
    """Return the recorded generation of one call."""
    said: dict[str, dict[str, Any]] = {
        CHAT: {"messages": TALK, "max_tokens": 2},
        BATCH: {"messages": [TALK], "max_tokens": 2},
        MESSAGES: {"messages": TALK, "max_tokens": 2},
        COMPLETIONS: {"prompt": TEXT, "max_tokens": 2},
        RESPONSES: {"input": TEXT, "max_output_tokens": 2},
    }
    answer_to(server, rollout, path, {"model": server.model, "temperature": 0, **said[path], **options})
    [kept] = server.recorded(rollout_id=rollout)
    return kept


def text_of(generation: Generation) -> str:
    """Return the text that the prompt's ids decode to."""
    return tokenizer().decode(ids_of(generation)[0])


@pytest.mark.parametrize("path", [CHAT, BATCH, MESSAGES, COMPLETIONS, RESPONSES], ids=short)
def test_a_prompt_has_the_text_of_its_ids(server: RecordingServer, rollout: str, path: str) -> None:
    kept = asked(server, rollout, path)

    assert kept.prompt_text == text_of(kept)
    assert TEXT in str(kept.prompt_text)


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS], ids=["chat", "completions"])
def test_a_truncated_prompt_has_its_ids_and_no_text(
    server: RecordingServer, rollout: str, path: str, side: str | None
) -> None:
    kept = asked(server, rollout, path, truncate_prompt_tokens=5, truncation_side=side)

    whole = tokenize(server, **({"messages": TALK} if path == CHAT else {"prompt": TEXT}))
    assert ids_of(kept)[0] == (whole[:5] if side == "right" else whole[-5:])
    assert kept.prompt_text is None


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}], "truncate_prompt_tokens": -1}),
        (COMPLETIONS, {"prompt": LONG, "truncate_prompt_tokens": -1}),
        (RESPONSES, {"input": LONG, "truncation": "auto"}),
    ],
    ids=short,
)
def test_a_prompt_truncated_to_the_room_left_has_no_text(
    server: RecordingServer, rollout: str, path: str, options: dict[str, Any]
) -> None:
    kept = asked(server, rollout, path, **options)

    assert 1000 < len(ids_of(kept)[0]) < 1024
    assert kept.prompt_text is None


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (CHAT, {"truncate_prompt_tokens": 500}),
        (CHAT, {"truncate_prompt_tokens": -1}),
        (COMPLETIONS, {"truncate_prompt_tokens": 500}),
        (COMPLETIONS, {"truncate_prompt_tokens": -1}),
        (RESPONSES, {"truncation": "auto"}),
        (RESPONSES, {"truncation": "auto", "max_output_tokens": None}),
    ],
    ids=short,
)
def test_a_prompt_that_fits_keeps_its_text(
    server: RecordingServer, rollout: str, path: str, options: dict[str, Any]
) -> None:
    kept = asked(server, rollout, path, **options)

    assert kept.prompt_text == text_of(kept)


def test_a_beam_search_has_no_prompt_text(server: RecordingServer, rollout: str) -> None:
    options = {"model": server.model, "prompt": TEXT, "n": 2, "max_tokens": 3, "use_beam_search": True}
    answer_to(server, rollout, COMPLETIONS, options)
    kept = server.recorded(rollout_id=rollout)

    assert len({len(ids_of(each)[0]) for each in kept}) == 3
    assert {each.prompt_text for each in kept} == {None}


THOUGHT = "<think>aaaa</think>So: b"


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("path", [CHAT, BATCH, RESPONSES], ids=short)
def test_reasoning_that_an_answer_hides_is_recorded(
    server: RecordingServer, rollout: str, path: str, stream: bool
) -> None:
    options: dict[str, Any] = {"include_reasoning": False, "structured_outputs": {"choice": [THOUGHT]}}
    options |= {"max_output_tokens" if path == RESPONSES else "max_tokens": 40}
    kept = asked(server, rollout, path, **options, **({} if path == BATCH else {"stream": stream}))

    [ids] = ids_of(kept)[1]
    assert tokenizer().decode(ids, skip_special_tokens=True) == kept.choices[0].text == THOUGHT
