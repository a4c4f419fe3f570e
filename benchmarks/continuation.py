"""The cost of the prompt of a call that continues another one, with `AGL_CONTINUE` and without.

vLLM's own renderer of the three chat interfaces, in this process, is handed the last request of a conversation of
twenty turns. Requests of a rollout and requests of none, whose prompts are vLLM's, take turns, in another order each
time. What whole conversations cost a real server is in `benchmarks/turns.py`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import psutil

from agentlightning.instrumentation.vllm import instrument_vllm, uninstrument_vllm
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture.session import session
from benchmarks import turns
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say
from benchmarks.turns import AGAIN, OFF, ON, REPORT, TURNS
from tests.common.rendering import answered, online_renderer, prompt_of
from tests.common.templates import CHATML
from tests.common.tiny_model import CORPUS

SIZES = {"8,000 ids": 8_000, "28,000 ids": 28_000}
NEW, SAID = 300, 40
ROUNDS, QUICK_ROUNDS = 60, 10
TARGETS = {"28,000 ids": {ON: Target(0.2)}}
ABOUT = (
    "The first two tables have the CPU time, in all threads, of making the prompt of a conversation's last request: "
    f"rendering and tokenising. There are {TURNS} turns, of which the last adds some {NEW} ids; the tokenizer is the "
    "tiny model's. The others are of whole conversations with a real server of that model."
)


def measure(quick: bool) -> Part:
    """Make the last prompt so many times in each way, for conversations of two lengths."""
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    with mock.patch.dict(os.environ, {"AGL_CONTINUE": "on"}):
        instrument_vllm()
        # Read at their first use.
        assert session.settings.continues == ON
    try:
        renderer = online_renderer(CHATML)
        with busy.running():
            sections = [section(renderer, *size, QUICK_ROUNDS if quick else ROUNDS) for size in SIZES.items()]
    finally:
        uninstrument_vllm()
    with busy.running():
        sections += turns.sections(quick)
    return Part("The exact history", ABOUT, sections, busy.share_of_others())


def section(renderer: Any, title: str, size: int, rounds: int) -> Section:
    say(f"continuation: {title}")
    conversations = {name: Conversation(renderer, size, name) for name in (OFF, AGAIN, REPORT, ON)}
    milliseconds: dict[str, list[float]] = {name: [] for name in conversations}
    order = [*conversations]
    # What is measured makes much garbage, whose collection would be measured where it happens to fall.
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            milliseconds[name].append(conversations[name].milliseconds())
        gc.collect()
    gc.enable()
    rows = [
        Row.of(name, values, milliseconds[OFF], TARGETS.get(title, {}).get(name))
        for name, values in milliseconds.items()
    ]
    lengths = ", ".join(f"{name}: {conversation.length}" for name, conversation in conversations.items())
    return Section(f"the prompt, {title}", "ms", f"Ids of the prompt: {lengths}.", rows)


class Conversation:
    """A conversation all but whose last request has been answered.

    Args:
        renderer: vLLM's.
        size: how many ids it has in the end, roughly.
        mode: `AGL_CONTINUE`.
    """

    def __init__(self, renderer: Any, size: int, mode: str) -> None:
        self._renderer, self._mode = renderer, mode
        self._loop = asyncio.new_event_loop()
        self._tokenizer = renderer.renderer.get_tokenizer()
        rest = (TURNS - 1) * (NEW + SAID)
        self._messages: list[Any] = [{"role": "system", "content": self._text(size - rest)}]
        for _ in range(TURNS - 1):
            self._ask()
            self._answer()
        self._ask()
        self.length = len(self._prompt()[0])

    def milliseconds(self) -> float:
        """Make the last prompt, and return what that took."""
        before = time.process_time_ns()
        self._prompt()
        return (time.process_time_ns() - before) / 1e6

    def _text(self, size: int) -> str:
        """Return a text of so many ids."""
        ids = self._tokenizer.encode(" ".join(CORPUS), add_special_tokens=False)
        return self._tokenizer.decode((ids * (size // len(ids) + 1))[:size])

    def _ask(self) -> None:
        self._messages.append({"role": "user", "content": self._text(NEW)})

    def _answer(self) -> None:
        prompt, context = self._prompt()
        said = self._text(SAID)
        # Byte by byte, as no tokenizer would do it.
        ids = [self._tokenizer.encode(each, add_special_tokens=False)[0] for each in said if each.isascii()]
        said = self._tokenizer.decode(ids)
        answered(prompt, context, ids, said, self._tokenizer.eos_token_id)
        self._messages.append({"role": "assistant", "content": said})

    def _prompt(self) -> tuple[list[int], RequestContext]:
        rollout = None if self._mode in (OFF, AGAIN) else self._mode
        settings = replace(session.settings, continues=REPORT if self._mode == REPORT else ON)
        with mock.patch.object(session, "_settings", settings):
            return self._loop.run_until_complete(prompt_of(self._renderer, self._messages, rollout))
