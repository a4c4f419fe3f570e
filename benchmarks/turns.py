"""The cost of a conversation of twenty turns for a real server, with `AGL_CONTINUE` and without.

One server process takes all turns: a middleware sets `AGL_CONTINUE` for each request, as its header says. Each
conversation begins with a number of its own, so that none finds another's ids in the prefix cache. The model says
random bytes, at temperature 1: what it has said is tokenised otherwise than it was sampled.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentlightning.instrumentation.vllm._context import App
from agentlightning.instrumentation.vllm.capture.session import session
from benchmarks.machine import cpu_seconds
from benchmarks.report import Row, Section, Target, say
from tests.common.templates import CHATML
from tests.common.tiny_model import CORPUS, tiny_model
from tests.common.vllm import RemoteOpenAIServer

__all__ = ["AGAIN", "MODES", "OFF", "ON", "REPORT", "TURNS", "Modes", "sections"]

OFF, AGAIN, REPORT, ON = MODES = ("off", "off, again", "report", "on")
SIZES = {"8,000 ids": 8_000, "28,000 ids": 28_000}
TURNS, NEW, SAID = 20, 300, 24
ROUNDS, QUICK_ROUNDS = 6, 2
LENGTH = 40_960
HEADER = b"x-agl-continue"
CPU = {"8,000 ids": {REPORT: Target(1.03), ON: Target(0.9)}, "28,000 ids": {REPORT: Target(1.03), ON: Target(0.7)}}
FIRST_TOKEN = {ON: Target(1.0)}


class Modes:
    """ASGI: set `AGL_CONTINUE` as the header of a request says; one request at a time."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        mode = dict(scope.get("headers", ())).get(HEADER)
        if mode is not None:
            session._settings = replace(session.settings, continues=mode.decode())
        await self._app(scope, receive, send)


@dataclass
class Costs:
    """The cost of one conversation.

    Attributes:
        cpu: milliseconds of the API server's process, a call.
        first_token: milliseconds to the first token of the last turn.
        last_cached: how many ids of that turn's prompt came from the prefix cache.
        cached: how many did in all turns.
    """

    cpu: float = 0.0
    first_token: float = 0.0
    last_cached: int = 0
    cached: int = 0


@dataclass
class Talk:
    """A conversation with a server.

    Attributes:
        name: the rollout's.
        messages: what was said so far.
    """

    server: RemoteOpenAIServer
    mode: str
    name: str
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def run(self, system: str, question: str) -> Costs:
        """Hold it, and return what it cost."""
        costs = Costs()
        self.messages = [{"role": "system", "content": f"{self.name} {system}"}]
        before = cpu_seconds(self.server.process.pid)
        for _ in range(TURNS):
            self.messages.append({"role": "user", "content": question})
            said, costs.first_token, costs.last_cached = self._ask()
            costs.cached += costs.last_cached
            self.messages.append({"role": "assistant", "content": said})
        costs.cpu = (cpu_seconds(self.server.process.pid) - before) * 1e3 / TURNS
        return costs

    def _ask(self) -> tuple[str, float, int]:
        body = {
            "model": self.server.model,
            "messages": self.messages,
            "max_tokens": SAID,
            "temperature": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Content-Type": "application/json", HEADER.decode(): "off" if self.mode == AGAIN else self.mode}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=600)
        data = json.dumps(body).encode()
        began = time.perf_counter()
        connection.request("POST", f"/rollout/{self.name}/v1/chat/completions", data, headers)
        response = connection.getresponse()
        said, first, cached = "", None, 0
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                for choice in event["choices"]:
                    said += choice["delta"].get("content") or ""
                    # The first event has the role alone.
                    if choice.get("token_ids") and first is None:
                        first = time.perf_counter()
                if event.get("usage"):
                    cached = (event["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        connection.close()
        assert first is not None, "the answer had no ids"
        return said, (first - began) * 1e3, cached


def sections(quick: bool) -> list[Section]:
    """Start a server, and hold conversations of two lengths in each way, in turns."""
    folder = Path(tiny_model())
    template = folder.parent / "chatml.jinja"
    template.write_text(CHATML)
    arguments = (
        "--middleware=benchmarks.turns.Modes",
        f"--chat-template={template}",
        f"--max-model-len={LENGTH}",
        f"--hf-overrides={json.dumps({'max_position_embeddings': LENGTH})}",
        "--max-num-batched-tokens=8192",
        "--enable-prompt-tokens-details",
    )
    env = {
        "AGL_INSTRUMENT": "1",
        "AGL_CONTINUE": "on",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    found: list[Section] = []
    say("continuation: starting a server")
    with RemoteOpenAIServer(*arguments, env=env, forks=True) as server:
        for title, size in SIZES.items():
            # What the server does first of all takes longer.
            _talk(server, ON, size)
            rounds: list[Mapping[str, Costs]] = []
            for number in range(QUICK_ROUNDS if quick else ROUNDS):
                say(f"continuation: {TURNS} turns, {title}, round {number + 1}")
                rounds.append({mode: _talk(server, mode, size) for mode in random.sample(MODES, len(MODES))})
            found += _tables(title, rounds)
    return found


def _talk(server: RemoteOpenAIServer, mode: str, size: int) -> Costs:
    tokenizer = _tokenizer()
    system = _text(tokenizer, size - (TURNS - 1) * (NEW + SAID) - NEW)
    return Talk(server, mode, f"ro-{os.urandom(6).hex()}").run(system, _text(tokenizer, NEW))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(tiny_model()) / "tokenizer.json"))


def _text(tokenizer: Any, size: int) -> str:
    """Return a text of so many ids."""
    ids = tokenizer.encode(" ".join(CORPUS), add_special_tokens=False).ids
    return tokenizer.decode((ids * (size // len(ids) + 1))[:size])


def _tables(title: str, rounds: Sequence[Mapping[str, Costs]]) -> list[Section]:
    def rows(name: str, targets: Mapping[str, Target]) -> list[Row]:
        values = {mode: [float(getattr(each[mode], name)) for each in rounds] for mode in MODES}
        return [Row.of(mode, values[mode], values[OFF], targets.get(mode)) for mode in MODES]

    turns = f"{TURNS} turns, {title}"
    return [
        Section(f"CPU time of the API server, {turns}", "ms a call", "", rows("cpu", CPU[title])),
        Section(f"time to the first token of turn {TURNS}, {title}", "ms", "", rows("first_token", FIRST_TOKEN)),
        Section(f"cached ids of turn {TURNS}, {title}", "ids", "", rows("last_cached", {})),
        Section(f"cached ids of the whole rollout, {turns}", "ids", "", rows("cached", {})),
    ]
