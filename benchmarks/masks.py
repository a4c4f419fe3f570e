"""The cost of recording the ids that each token was chosen from, and the bytes that it takes.

As in `benchmarks/serving.py`, all turns are taken by one server process. Its engine core gives masks all the time
(`tests/plugins/masks.py`): so what is compared is recording with them, and recording as if vLLM gave none.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say
from benchmarks.serving import CHAT, Client, Load, Turn, environment, rounds_of, session
from tests.common.vllm import RemoteOpenAIServer

STARTS, SECONDS = 2, 100
QUICK_STARTS, QUICK_SECONDS = 1, 40
MIN_ROUNDS = 10
"""Rounds of each start and length, however slow the machine is."""
IDS_LEFT = 8
PATH = "/v1/chat/completions"
WITHOUT, AGAIN, WITH = "recording without masks", "the same, again", "recording with masks"
POSITIONS = {WITHOUT: "unmasked", AGAIN: "unmasked", WITH: "on"}
SIZES = {32: Turn(), 512: Turn(requests=32, concurrency=32, warm_up=8)}
ABOUT = (
    "Chat completions by a tiny model at a top-p of 0.95, recorded to SQLite. The engine core of the tests gives masks "
    f"of {IDS_LEFT} ids: on CPUs vLLM makes none. The second turn of recording without them shows what is "
    "read where nothing differs."
)


def measure(quick: bool) -> Part:
    """A server in turns, with short answers and with long ones; and again."""
    starts, seconds = (QUICK_STARTS, QUICK_SECONDS) if quick else (STARTS, SECONDS)
    rounds: dict[int, list[Mapping[str, Load]]] = {tokens: [] for tokens in SIZES}
    bytes_a_token: list[float] = []
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as folder:
        for start in range(starts):
            say(f"masks: starting a server, {start + 1} of {starts}")
            path = Path(folder, f"{start}.db")
            env = {**environment(seed=start), "AGL_INSTRUMENT": "1", "AGL_STORE": str(path), "MASK_SIZE": str(IDS_LEFT)}
            arguments = ("--middleware=benchmarks.switch.Switch", "--scheduler-cls=tests.plugins.masks.Scheduler")
            with RemoteOpenAIServer(*arguments, env=env) as server:
                for tokens in SIZES:
                    say(f"masks: {tokens} tokens")
                    with busy.running():
                        rounds[tokens] += asyncio.run(take_turns(server, tokens, seconds / len(SIZES)))
            bytes_a_token.append(mask_bytes(path))
    sections = [of_length(tokens, found) for tokens, found in rounds.items()]
    on_disk = Row.of("masks", bytes_a_token, bytes_a_token)
    return Part(
        "Sampling masks",
        ABOUT,
        [*sections, Section("on disk", "bytes a token", "Of tokens that have a mask, in the file.", [on_disk])],
        busy.share_of_others(),
    )


async def take_turns(server: RemoteOpenAIServer, tokens: int, seconds: float) -> list[Mapping[str, Load]]:
    request: dict[str, Any] = {"model": server.model, **CHAT, "temperature": 1, "top_p": 0.95, "max_tokens": tokens}
    # With masks, vLLM takes no request without it.
    request["top_k"] = IDS_LEFT
    bodies = dict.fromkeys(POSITIONS, request)
    async with session(server.url) as client_session:
        client = Client(client_session, server.process.pid, PATH, bodies, POSITIONS, SIZES[tokens])
        for name in POSITIONS:
            await client.turn(name)
        return await rounds_of(dict.fromkeys(POSITIONS, client), seconds, MIN_ROUNDS)


def of_length(tokens: int, rounds: list[Mapping[str, Load]]) -> Section:
    measured = {name: [each[name].cpu for each in rounds] for name in POSITIONS}
    rows = [
        Row.of(name, values, measured[WITHOUT], Target(1.05) if name == WITH else None)
        for name, values in measured.items()
    ]
    return Section(f"CPU time of the API server, {tokens} tokens", "ms a request", "", rows)


def mask_bytes(path: Path) -> float:
    """Return how many bytes the masks in a store take for each token that has one."""
    with closing(sqlite3.connect(path)) as connection:
        query = (
            "SELECT 1.0 * sum(length(sampling_mask)) / sum(length(token_ids) / 4) FROM choices WHERE sampling_mask > ''"
        )
        [[found]] = connection.execute(query)
    return found
