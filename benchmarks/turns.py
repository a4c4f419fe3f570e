"""The cost of a conversation of twenty turns for a real server, with `AGL_CONTINUE` and without.

Instructions of the API server are counted, by callgrind, in plain answers; CPU time is printed beside them, of a
server that runs as fast as it can, with the time to the first token and the ids from the prefix cache.

One server process takes all turns: a middleware sets `AGL_CONTINUE` for each request, as its header says. Each
conversation begins with a number of its own, so that none finds another's ids in the prefix cache. The model says
random bytes, at temperature 1: what it has said is tokenised otherwise than it was sampled.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentlightning.instrumentation.vllm._context import App
from agentlightning.instrumentation.vllm.capture.session import session
from benchmarks import callgrind
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
COUNTED_ROUNDS = 2
LENGTH = 40_960
HEADER = b"x-agl-continue"
CPU = {"8,000 ids": {REPORT: Target(1.03), ON: Target(0.9)}, "28,000 ids": {REPORT: Target(1.03), ON: Target(0.7)}}
FIRST_TOKEN = {ON: Target(1.0)}
ENV = {
    "AGL_INSTRUMENT": "1",
    "AGL_CONTINUE": "on",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "PYTHONPATH": str(Path(__file__).parents[1]),
}


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
        before = cpu_seconds(self.server.process.pid)

        def ask() -> str:
            said, costs.first_token, costs.last_cached = self._ask()
            costs.cached += costs.last_cached
            return said

        self._hold(system, question, ask)
        costs.cpu = (cpu_seconds(self.server.process.pid) - before) * 1e3 / TURNS
        return costs

    def run_plain(self, system: str, question: str) -> None:
        """Hold it with plain answers, of which no chunk depends on how fast the server is."""

        def ask() -> str:
            connection, response, _ = self._post({})
            answer = json.load(response)
            connection.close()
            return answer["choices"][0]["message"]["content"]

        self._hold(system, question, ask)

    def _hold(self, system: str, question: str, ask: Callable[[], str]) -> None:
        self.messages = [{"role": "system", "content": f"{self.name} {system}"}]
        for _ in range(TURNS):
            self.messages.append({"role": "user", "content": question})
            self.messages.append({"role": "assistant", "content": ask()})

    def _post(self, options: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, float]:
        body = {
            "model": self.server.model,
            "messages": self.messages,
            "max_tokens": SAID,
            "temperature": 1,
            **options,
        }
        headers = {"Content-Type": "application/json", HEADER.decode(): "off" if self.mode == AGAIN else self.mode}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=600)
        data = json.dumps(body).encode()
        began = time.perf_counter()
        connection.request("POST", f"/rollout/{self.name}/v1/chat/completions", data, headers)
        return connection, connection.getresponse(), began

    def _ask(self) -> tuple[str, float, int]:
        connection, response, began = self._post({"stream": True, "stream_options": {"include_usage": True}})
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
    """Hold conversations of two lengths in each way, in turns, with a counted server and a timed one."""
    return [*_counted(quick), *_timed(quick)]


def _arguments() -> tuple[str, ...]:
    folder = Path(tiny_model())
    template = folder.parent / "chatml.jinja"
    template.write_text(CHATML)
    return (
        "--middleware=benchmarks.turns.Modes",
        f"--chat-template={template}",
        f"--max-model-len={LENGTH}",
        f"--hf-overrides={json.dumps({'max_position_embeddings': LENGTH})}",
        "--max-num-batched-tokens=8192",
        "--enable-prompt-tokens-details",
    )


def _counted(quick: bool) -> list[Section]:
    def title(size: str) -> str:
        return f"instructions of the API server, {TURNS} turns, {size}"

    if why := callgrind.missing():
        return [Section(title(size), skipped=f"skipped: {why}") for size in SIZES]
    found: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        counter = callgrind.Callgrind(Path(folder))
        server = RemoteOpenAIServer(*_arguments(), env=ENV)
        server.command = [*counter.prefix, sys.executable, *server.command]
        say("continuation: starting a server under valgrind")
        with server:
            counter.pid = server.process.pid
            # What the server does first of all takes more.
            _plain_talk(server, ON, min(SIZES.values()))
            counter.begin()
            for size, ids in [*SIZES.items()][: 1 if quick else None]:
                counts: dict[str, list[float]] = {mode: [] for mode in MODES}
                for _ in range(1 if quick else COUNTED_ROUNDS):
                    for mode in MODES:
                        counter.zero()
                        _plain_talk(server, mode, ids)
                        counts[mode].append(counter.millions() / TURNS)
                        say(f"continuation: {TURNS} turns, {size}, {mode}: {counts[mode][-1]:.3f} millions a call")
                rows = [Row.of(mode, counts[mode], counts[OFF], CPU[size].get(mode)) for mode in MODES]
                found.append(Section(title(size), "millions", "Of a call, with a plain answer.", rows))
    return found


def _plain_talk(server: RemoteOpenAIServer, mode: str, size: int) -> None:
    Talk(server, mode, f"ro-{os.urandom(6).hex()}").run_plain(*_texts(size))


def _timed(quick: bool) -> list[Section]:
    found: list[Section] = []
    say("continuation: starting a server")
    with RemoteOpenAIServer(*_arguments(), env=ENV, forks=True) as server:
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
    return Talk(server, mode, f"ro-{os.urandom(6).hex()}").run(*_texts(size))


def _texts(size: int) -> tuple[str, str]:
    """Return the system prompt and the question of a conversation that comes to so many ids."""
    tokenizer = _tokenizer()
    return _text(tokenizer, size - (TURNS - 1) * (NEW + SAID) - NEW), _text(tokenizer, NEW)


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
        Section(f"CPU time of the API server, {turns}", "ms a call", "", rows("cpu", {})),
        Section(f"time to the first token of turn {TURNS}, {title}", "ms", "", rows("first_token", FIRST_TOKEN)),
        Section(f"cached ids of turn {TURNS}, {title}", "ids", "", rows("last_cached", {})),
        Section(f"cached ids of the whole rollout, {turns}", "ids", "", rows("cached", {})),
    ]
