"""A user's scheduler, connector, logits processors and stat logger are shown what they are shown without us."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.common.answers import post
from tests.common.vllm import RemoteOpenAIServer
from tests.plugins import OF_LOGPROBS, is_settled, shown
from tests.recording.server import until
from tests.releases.chosen import ANYTHING, SENTENCE
from tests.releases.engine import Engine
from tests.releases.table import Release
from tests.releases.test_ids import MESSAGES

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
STREAM = {"stream": True}


def plugins_saw(server: RemoteOpenAIServer, engine: Engine) -> Counter[str]:
    """Ask one question after the other, and return what the plugins of a server are shown."""
    file = Path(server.env["PLUGINS_WRITE_TO"])
    until(lambda: is_settled(file), "the end of what was asked before")
    before = len(file.read_text().splitlines()) if file.exists() else 0
    questions: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": MESSAGES, **engine.asks(ANYTHING)}),
        (CHAT, {"messages": MESSAGES, **engine.asks(ANYTHING), **STREAM}),
        (CHAT, {"messages": MESSAGES, **engine.asks(ANYTHING, temperature=1), "n": 2}),
        (CHAT, {"messages": MESSAGES, **engine.asks(ANYTHING), "logprobs": True}),
        (CHAT, {"messages": MESSAGES, **engine.asks(SENTENCE), "stop": [" four"]}),
        (COMPLETIONS, {"prompt": ["one two", "three"], **engine.asks(ANYTHING)}),
        (COMPLETIONS, {"prompt": "one two", **engine.asks(ANYTHING), **STREAM}),
        # Last, so that the engine has been told of all that ended before: it hears so in this order.
        (COMPLETIONS, {"prompt": "one", **engine.asks(ANYTHING)}),
    ]
    for path, body in questions:
        post(server, path, {"model": server.model, "max_tokens": 8, **body})
    until(lambda: is_settled(file), "the end of what was asked")
    return shown(file, OF_LOGPROBS, after=before)


def test_plugins_are_shown_the_same(
    release: Release, armed: RemoteOpenAIServer, plain: RemoteOpenAIServer, engine: Engine
) -> None:
    if release.engine == "V0":
        pytest.skip("nothing is recorded with the V0 engine, and no request is marked")
    ours, vllms = plugins_saw(armed, engine), plugins_saw(plain, engine)

    assert dict(ours - vllms) == {}
    assert dict(vllms - ours) == {}
    assert ours.total() > 0
