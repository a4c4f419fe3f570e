"""The recorded calls of conversations, read from the store by a few threads: no request waits for more than its bound.

A thread cannot be stopped while a store has it wait. So a request waits for as long as it may and goes on without the
rest; what arrives later is kept for the next request, and while a read is late no other one begins.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from agentlightning.continuation import Rendered
from agentlightning.errors import StoreError
from agentlightning.generation import Choice, Generation
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture.session import session
from agentlightning.instrumentation.vllm.continuation.chats import ROUTES
from agentlightning.instrumentation.vllm.continuation.prompts import whole_text
from agentlightning.store import Filters, Store, open_store

__all__ = ["Log", "Reader", "RecordedAnswer", "RecordedCall", "close", "reader"]

THREADS = 4
MOST_WAITING = 32
"""Requests that wait for these threads, each in one of its own."""
CALLS_AT_ONCE = 8
SHARE = 0.5
"""The part of a request's time after which no further page is read: the rest is for looking at what was read."""
PATIENCE = 1.0
"""Seconds that a thread waits for a store: one that does not answer keeps no thread for longer. No request does."""
SECONDS_BETWEEN_FAILURES = 5.0
OVERLAP = 10 * 1_000_000_000
"""Nanoseconds that are read again: a call may be stored later than one that has ended after it."""
MOST_CONVERSATIONS = 64
MOST_BYTES = 64 << 20
MOST_TRIED = 4096

logger = logging.getLogger("agentlightning")


class RecordedAnswer(NamedTuple):
    """An answer of a recorded call; its text has the stop string that ended it."""

    token_ids: array[int]
    text: str | None
    finish_reason: str | None
    is_stopped: bool


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A recorded call that may be continued.

    Attributes:
        rendered: describes the text of its prompt; None for a prompt that is not the ids of a text.
        stop_token_ids: the ids that ended its answers, beside the tokenizer's own.
    """

    prompt_token_ids: array[int]
    rendered: Rendered | None
    answers: Sequence[RecordedAnswer]
    stop_token_ids: Sequence[int]

    @classmethod
    def of(cls, generation: Generation, served_model: str | None) -> RecordedCall | None:
        """Return what is needed of a generation; None if no request to this model may continue it."""
        params = json.loads(generation.sampling_params or "{}")
        if (
            not generation.prompt_token_ids
            or generation.endpoint not in ROUTES
            or (generation.served_model or generation.model) != served_model
            # Its answers may go on behind the end of a turn, at tokens that only its server knows.
            or params.get("ignore_eos")
        ):
            return None
        text = generation.prompt_text
        is_told = params.get("include_stop_str_in_output", False)
        return cls(
            generation.prompt_token_ids,
            None if text is None else Rendered.of(text),
            [_answer(choice, is_told) for choice in generation.choices if choice.token_ids],
            params.get("stop_token_ids") or (),
        )

    @property
    def nbytes(self) -> int:
        """The memory that it takes, roughly."""
        answers = sum(4 * len(each.token_ids) + len(each.text or "") for each in self.answers)
        return 1000 + 4 * len(self.prompt_token_ids) + answers


def _answer(choice: Choice, is_told: bool) -> RecordedAnswer:
    assert choice.token_ids is not None
    text = whole_text(choice.text, choice.stop_reason, is_told)
    return RecordedAnswer(choice.token_ids, text, choice.finish_reason, isinstance(choice.stop_reason, str))


@dataclass(slots=True, eq=False)
class Log:
    """The calls of one conversation, as far as they were read.

    Attributes:
        seen: the ids of all that were read.
        calls: those that no request has gone through yet, by these ids.
        latest: when the last of them finished.
        is_behind: whether there was no time for all of them.
        has_given: whether calls were taken out of it.
        tried: how many calls had been read when calls with messages of this fingerprint were looked for.
        lock: of the thread that reads on.
    """

    seen: set[str] = field(default_factory=set[str])
    calls: dict[str, RecordedCall] = field(default_factory=dict[str, RecordedCall])
    latest: int = 0
    is_behind: bool = False
    has_given: bool = False
    nbytes: int = 0
    tried: dict[bytes, int] = field(default_factory=dict[bytes, int])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read_on(self, store: Store, filters: Filters, served_model: str | None, until: float) -> None:
        """Read the calls that are new in the store, one page at least."""
        count = store.tally(**filters)["finished"]
        if count == len(self.seen):
            return
        if count < len(self.seen):
            # Some were deleted, and there may be new ones.
            self.seen.clear()
            self.latest = 0
        wanted = filters.copy()
        wanted["since"] = self.latest if self.is_behind else max(0, self.latest - OVERLAP)
        self.is_behind, new = True, 0
        for generation in store.generations(CALLS_AT_ONCE, details=False, **wanted):
            if generation.id in self.seen:
                continue
            self._add(generation, RecordedCall.of(generation, served_model))
            new += 1
            if new % CALLS_AT_ONCE == 0 and time.monotonic() > until:
                return
        self.is_behind = False
        if count > len(self.seen):
            # One of them was stored long after it had ended.
            self.latest = 0

    def _add(self, generation: Generation, call: RecordedCall | None) -> None:
        if call is not None:
            self.calls[generation.id] = call
            self.nbytes += call.nbytes
            while self.nbytes > MOST_BYTES and len(self.calls) > 1:
                self._drop(next(iter(self.calls)))
        self.latest = max(self.latest, generation.finished_at)
        self.seen.add(generation.id)

    def note_tried(self, fingerprint: bytes, seen: int) -> None:
        """Note that calls with these messages were looked for among so many."""
        if len(self.tried) >= MOST_TRIED:
            self.tried.clear()
        self.tried[fingerprint] = seen

    def take(self, generation_id: str) -> None:
        """Leave out a call that is known."""
        self.has_given = True
        self._drop(generation_id)

    def _drop(self, generation_id: str) -> None:
        dropped = self.calls.pop(generation_id, None)
        if dropped is not None:
            self.nbytes -= dropped.nbytes


class Reader:
    """Reads calls from a store.

    Args:
        open_it: opens the store.
    """

    def __init__(self, open_it: Callable[[], Store]) -> None:
        self._open = open_it
        self._store: Store | None = None
        self._opening = threading.Lock()
        self._threads = threading.Semaphore(THREADS)
        self._waiting = threading.Semaphore(MOST_WAITING)
        self._deadlines: dict[int, float] = {}
        self._logs: OrderedDict[Hashable, Log] = OrderedDict()
        self._paused_until = 0.0
        self._is_closed = False

    def is_available(self) -> bool:
        """Tell whether the store has neither failed just now nor lets a request wait for longer than its bound."""
        now = time.monotonic()
        return now >= self._paused_until and all(now <= deadline for deadline in list(self._deadlines.values()))

    def log(self, key: Hashable, is_known: bool) -> Log:
        """Return what was read of a conversation.

        Args:
            is_known: whether the calls that were taken out of it are still kept; if not, it begins anew.
        """
        found = self._logs.get(key)
        if found is None or (found.has_given and not is_known):
            found = self._logs[key] = Log()
        self._logs.move_to_end(key)
        while len(self._logs) > MOST_CONVERSATIONS or (
            len(self._logs) > 1 and sum(each.nbytes for each in self._logs.values()) > MOST_BYTES
        ):
            self._logs.popitem(last=False)
        return found

    async def read_on(self, log: Log, filters: Filters, served_model: str | None, deadline: float) -> None:
        """Read the calls that are new in the store, as far as time allows."""
        left = deadline - time.monotonic()
        if left <= 0 or not self.is_available() or not self._waiting.acquire(blocking=False):
            return
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def note_done() -> None:
            if not done.done():
                done.set_result(None)

        def run() -> None:
            contained("reading calls of others", self._read_on, log, filters, served_model, deadline, left)
            self._waiting.release()
            # The loop may have ended meanwhile.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(note_done)

        # A daemon: it does not keep the process from ending.
        threading.Thread(target=run, name="agentlightning-recall", daemon=True).start()
        await asyncio.wait({done}, timeout=left)

    def _read_on(self, log: Log, filters: Filters, served_model: str | None, deadline: float, left: float) -> None:
        until = deadline - left * (1 - SHARE)
        if not log.lock.acquire(timeout=max(0.0, until - time.monotonic())):
            return
        try:
            if self._threads.acquire(timeout=max(0.0, until - time.monotonic())):
                self._deadlines[threading.get_ident()] = deadline
                try:
                    log.read_on(self._opened(), filters, served_model, until)
                except StoreError as error:
                    self._note_failure(error)
                finally:
                    del self._deadlines[threading.get_ident()]
                    self._threads.release()
                    self._close_if_unused()
        finally:
            log.lock.release()

    def _opened(self) -> Store:
        with self._opening:
            if self._store is None:
                self._store = self._open()
            return self._store

    def _note_failure(self, error: StoreError) -> None:
        if not self._paused_until:
            logger.warning(
                "agentlightning: calls that other servers have answered cannot be read from the store, so their "
                "conversations have vLLM's own prompts; tried again every %d seconds, logged once: %s",
                SECONDS_BETWEEN_FAILURES,
                error,
            )
        self._paused_until = time.monotonic() + SECONDS_BETWEEN_FAILURES

    def close(self) -> None:
        """Close the store, once no thread reads."""
        self._is_closed = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_closed and not self._deadlines:
            with self._opening:
                store, self._store = self._store, None
            if store is not None:
                store.close()


_reader: tuple[str, Reader] | None = None
"""The one of the store at this place."""
_inherited: tuple[str, Reader] | None = None
"""The parent's. Never closed here: that would end its connections."""


def reader() -> Reader:
    """Return the reader of this process."""
    global _reader
    place = session.settings.store
    assert place is not None
    if _reader is None or _reader[0] != place:
        close()
        _reader = place, Reader(lambda: open_store(place, read_only=True, patience=PATIENCE, seconds=PATIENCE))
    return _reader[1]


def close() -> None:
    """Close the store, and forget what was read."""
    global _reader
    if _reader is not None:
        _reader[1].close()
    _reader = None


def _forget_parents() -> None:
    # Its connections are not for a forked child, and its threads are not there to release their locks.
    global _reader, _inherited
    _inherited, _reader = _reader, None


os.register_at_fork(after_in_child=_forget_parents)
