"""From an event loop to a store: a queue that is bounded in bytes, and one thread that writes. Knows no vLLM.

`Recorder.record` takes microseconds, however long the generation. All else is the thread's: putting the generation
together, packing, writing, waiting for a store that is slow or away, and writing down what had to be left out.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread, local

from agentlightning.errors import InvalidRecord, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation, Loss
from agentlightning.sender import Sender
from agentlightning.store import Store, open_store

__all__ = ["LOST", "NOT_BUILT", "QUEUE_FULL", "REFUSED", "STOPPED", "WRITE_SECONDS", "Counters", "Recorder"]

logger = logging.getLogger("agentlightning")

QUEUE_FULL, NOT_BUILT, REFUSED, STOPPED = LOST = ("queue full", "not built", "refused", "stopped")
"""Why generations are lost: no room in the queue; an error of ours before or in the store; the process ended."""
ENDED = "the process ended before they were written"
WRITE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""The upper bounds of the buckets that writes are counted in, by how long they took."""

# How long the thread waits for more after the first: a transaction costs as much as writing many generations, and
# each time the thread wakes it takes the interpreter from the event loop.
GATHERING_SECONDS = 0.25
BATCH_GENERATIONS = 500
BATCH_BYTES = 8 << 20
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
# Short, so that the thread hears in time that the process is to end.
PATIENCE_SECONDS = 0.5
SECONDS_BETWEEN_LOGS = 10.0
# Where one did not get through, and the store is not opened anew.
SECONDS_BETWEEN_GREETINGS = 10.0
# As long as a store of one host needs for a batch.
SECONDS_TO_FORK = 1.0
LEFT_ALONE: list[Store | None] = []
"""Stores of parents, which must not be closed here either."""


@dataclass(slots=True)
class Counters:
    """What has become of what was recorded, since the process started.

    Attributes:
        generations, prompt_tokens, output_tokens: what the store has.
        queue_bytes: what waits now.
        lost: generations that the store does not have, by one of `LOST`.
        writes: transactions, in a list as long as `WRITE_SECONDS` and one more: those that took no longer than each
            bound and longer than the one before it, and the rest.
        write_seconds: what all of them took together.
        failed_writes: how often the store could not be written; each is tried again.
        trouble: why it cannot be written now; None where it can.
    """

    generations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue_bytes: int = 0
    lost: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOST, 0))
    writes: list[int] = field(default_factory=lambda: [0] * (len(WRITE_SECONDS) + 1))
    write_seconds: float = 0.0
    failed_writes: int = 0
    trouble: str | None = None


class Recorder:
    """Writes generations to the store at `url`, as `open_store` takes it.

    A process that is forked starts with an empty queue and counters at zero: what waits is written by its parent.

    Args:
        url: where the store is. It is opened by the thread, and again after every failure.
        queue_bytes: how much may wait, as `record` is told it.
        sender: says for whom this process records, as far as is known by then. It is asked by the thread before each
            write; what it says greets each store that is opened, and the same store again where it says something else.
        observe: is given the counters by the thread, after each write and each failure, and when the queue is shorter.
    """

    def __init__(
        self,
        url: str,
        queue_bytes: int,
        sender: Callable[[], Sender | None] = lambda: None,
        observe: Callable[[Counters], object] = lambda counters: None,
    ) -> None:
        self._url = url
        self._queue_bytes = queue_bytes
        self._sender = sender
        self._observe = observe
        self._store: Store | None = None
        self._storing = Lock()
        self._begin()
        self._forking = local()
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._after_fork_in_child
        )

    def _before_fork(self) -> None:
        # SQLite in the child would take locks that the parent holds for its own, and overwrite what the parent writes.
        self._forking.has_lock = self._storing.acquire(timeout=SECONDS_TO_FORK)
        if self._forking.has_lock:
            self._let_go()

    def _after_fork(self) -> None:
        if self._forking.has_lock:
            self._storing.release()

    def _after_fork_in_child(self) -> None:
        if not self._forking.has_lock:
            # It does not answer, and vLLM does not wait for it: what the child has of it is neither used nor closed.
            LEFT_ALONE.append(self._store)
            self._store, self._storing = None, Lock()
        else:
            self._storing.release()
        self._begin()

    def _begin(self) -> None:
        self._thread: Thread | None = None
        self._writer: Sender | None = None
        self._greeted: Sender | None = None
        self._silent_to_store_until = 0.0
        self._queue: SimpleQueue[tuple[Callable[[], Generation], int] | None] = SimpleQueue()
        self._closing = Event()
        self._deadline = float("inf")
        self._counters = Counters()
        self._recording = Lock()
        # Bytes that came in and bytes that went out: the one is written under the lock of those who record, the other
        # by our thread alone, so that they never wait for it.
        self._came = self._went = 0
        self._turned_away = self._noted = self._late = 0
        self._turned_away_at = (0, 0)
        self._losing: dict[str, Loss] = {}
        self._losses: list[Loss] = []
        self._silent_until: dict[str, float] = {}

    def start(self) -> None:
        """Start the thread, which opens the store. Idempotent; the first `record` does it too, but then has to wait."""
        with self._recording:
            self._start_thread()

    def _start_thread(self) -> None:
        if self._thread is None:
            thread = Thread(target=self._run, name="agentlightning-recorder", daemon=True)
            thread.start()
            self._thread = thread
            atexit.register(self.close)

    def record(self, build: Callable[[], Generation], nbytes: int) -> None:
        """Have a generation written; never waits for the store, never raises. Safe for several threads.

        Args:
            build: makes the generation, in the thread that writes.
            nbytes: what it holds on to until then.
        """
        # Held for an addition, and for the start of the thread.
        with self._recording:
            try:
                if self._closing.is_set():
                    self._come_too_late("it is closed")
                    return
                waiting = self._came - self._went
                # One that is larger than the queue has it for itself.
                if waiting and waiting + nbytes > self._queue_bytes:
                    self._turn_away()
                    return
                self._start_thread()
                self._came += nbytes
                self._queue.put((build, nbytes))
            except Exception as error:
                # No thread can be started where the interpreter is about to end.
                self._come_too_late(repr(error))

    def counters(self) -> Counters:
        """What has become of what was recorded, by now."""
        mine = self._counters
        lost = {**mine.lost, QUEUE_FULL: self._turned_away, STOPPED: mine.lost[STOPPED] + self._late}
        return replace(mine, queue_bytes=self._came - self._went, lost=lost, writes=list(mine.writes))

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, for at most `timeout` seconds; what is left is counted and, if that works, written down.

        Idempotent. What is recorded afterwards is lost, and counted.
        """
        # Time enough for a last attempt, and for writing down what it left.
        self._deadline = min(self._deadline, time.monotonic() + max(timeout - 2 * PATIENCE_SECONDS, 0))
        self._closing.set()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout)
            if self._thread.is_alive():
                logger.error("agentlightning: the store does not answer: %d bytes are left", self._came - self._went)

    def _turn_away(self) -> None:
        now = time.time_ns()
        self._turned_away_at = (self._turned_away_at[0] if self._turned_away > self._noted else now, now)
        self._turned_away += 1
        full = f"the queue of {self._queue_bytes >> 20} MiB is full"
        self._say(QUEUE_FULL, f"{full}; generations lost so far: {self._turned_away}")

    def _come_too_late(self, why: str) -> None:
        # Nobody is there to write this down.
        self._late += 1
        self._say("late", f"the recorder takes no more generations: {why}; lost so far: {self._late}")

    def _run(self) -> None:
        self._try_to_open()
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                self._round()
            except Exception as error:
                self._say("round", f"writing generations failed: {error!r}")
        self._write_losses()
        with self._storing:
            self._let_go()

    def _try_to_open(self) -> None:
        """Open the store before there is anything to write, so that what is in the way of it is told at the start."""
        try:
            with self._opened():
                pass
        except StoreUnavailable as error:
            self._failed(error)

    def _round(self) -> None:
        """Write what has come, wait for more if nothing has."""
        items = self._gathered()
        try:
            if items and time.monotonic() > self._deadline:
                self._lose(STOPPED, len(items), ENDED)
                return
            if generations := self._built(items):
                self._write(generations)
        finally:
            self._went += sum(nbytes for _, nbytes in items)
            self._tell()
        self._write_losses()

    def _gathered(self) -> list[tuple[Callable[[], Generation], int]]:
        items, nbytes = [], 0
        try:
            item = self._queue.get(timeout=LONGEST_PAUSE_SECONDS if self._losses else None)
            if self._queue.qsize() < BATCH_GENERATIONS and self._came - self._went < BATCH_BYTES:
                self._closing.wait(GATHERING_SECONDS)
            while True:
                # None only wakes this thread.
                if item is not None:
                    items.append(item)
                    nbytes += item[1]
                if len(items) == BATCH_GENERATIONS or nbytes >= BATCH_BYTES:
                    break
                item = self._queue.get_nowait()
        except Empty:
            pass
        return items

    def _built(self, items: Iterable[tuple[Callable[[], Generation], int]]) -> list[Generation]:
        generations = []
        for build, _ in items:
            try:
                generations.append(build())
            except Exception as error:
                self._lose(NOT_BUILT, 1, repr(error))
        return generations

    def _write(self, generations: list[Generation]) -> None:
        """Write them all, as soon as the store lets it, or count them as lost."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            started = time.perf_counter()
            try:
                with self._opened() as store:
                    started = time.perf_counter()
                    store.add(generations, None if self._writer is None else self._writer.id)
            except (StoreUnavailable, StoreRefused) as error:
                self._failed(error)
                asked = error.retry_after if isinstance(error, StoreUnavailable) else None
            except InvalidRecord as error:
                kept = [generation for generation in generations if generation.id not in error.reasons]
                self._lose(REFUSED, len(generations) - len(kept), str(error))
                self._count(kept, time.perf_counter() - started)
                return
            except Exception as error:
                # An error of ours before the store is asked, so that none of them is there yet.
                if len(generations) == 1:
                    self._lose(REFUSED, 1, repr(error))
                else:
                    for generation in generations:
                        self._write([generation])
                return
            else:
                self._count(generations, time.perf_counter() - started)
                return
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._lose(STOPPED, len(generations), ENDED)
                return
            # Many servers that found the store away at once shall not come back at once. What is random in this process
            # may be somebody else's to repeat.
            wait = pause * random.SystemRandom().uniform(0.5, 1)
            if self._closing.is_set():
                # What the store asks for counts no more: it may be longer than there is, and all would be lost untried.
                time.sleep(min(wait, left))
            elif self._closing.wait(max(wait, asked or 0)):
                # There is a deadline now: short pauses again, for as many attempts as there is time for.
                pause = FIRST_PAUSE_SECONDS
                continue
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _write_losses(self) -> None:
        turned_away, at = self._turned_away, self._turned_away_at
        if turned_away > self._noted:
            self._losses.append(_loss(turned_away - self._noted, QUEUE_FULL, *at))
            self._noted = turned_away
        # From here on these stay as they are: whether an attempt that failed has written them is not known.
        self._losses += self._losing.values()
        self._losing = {}
        if self._losses:
            try:
                with self._opened() as store:
                    store.add_losses(self._losses)
                self._losses = []
            except ValueError as error:
                # Tried again, they would be refused again.
                self._say("losses", f"losses cannot be written down: {error}: {self._losses}")
                self._losses = []
            except Exception as error:
                self._failed(error)

    @contextmanager
    def _opened(self) -> Iterator[Store]:
        with self._storing:
            if self._store is None:
                try:
                    self._store = open_store(self._url, patience=PATIENCE_SECONDS)
                except StoreUnavailable:
                    raise
                except Exception as error:
                    raise StoreUnavailable(str(error)) from error
            self._greet(self._store)
            yield self._store

    def _greet(self, store: Store) -> None:
        # Whatever is in the way of a greeting (a proxy that lets no large body through, for one) costs no generation.
        try:
            self._writer = self._sender()
            if self._writer in (None, self._greeted) or time.monotonic() < self._silent_to_store_until:
                return
            store.greet(self._writer)
            self._greeted = self._writer
        except Exception as error:
            self._silent_to_store_until = time.monotonic() + SECONDS_BETWEEN_GREETINGS
            self._say("greeting", f"the store is not told who writes: {error}")

    def _failed(self, error: Exception) -> None:
        """The store could not be written: it is opened again the next time."""
        self._counters.failed_writes += 1
        self._counters.trouble = str(error)
        self._tell()
        self._say("store", f"generations wait for the store: {error}")
        with self._storing:
            self._let_go()

    def _let_go(self) -> None:
        store, self._store, self._greeted = self._store, None, None
        if not self._closing.is_set():
            # There is time to greet the next one, which may be another.
            self._silent_to_store_until = 0.0
        if store is not None:
            with suppress(Exception):
                store.close()

    def _count(self, generations: Iterable[Generation], seconds: float) -> None:
        counters = self._counters
        for generation in generations:
            counters.generations += 1
            counters.prompt_tokens += len(generation.prompt_token_ids or ())
            counters.output_tokens += sum(len(choice.token_ids or ()) for choice in generation.choices)
        counters.writes[bisect_left(WRITE_SECONDS, seconds)] += 1
        counters.write_seconds += seconds
        if counters.trouble is not None:
            counters.trouble = None
            logger.info("agentlightning: generations are written to the store again")
        self._tell()

    def _lose(self, kind: str, count: int, detail: str) -> None:
        self._counters.lost[kind] += count
        self._say(kind, f"generations lost so far, {kind}: {self._counters.lost[kind]}, the last by {detail}")
        now = time.time_ns()
        loss = self._losing.setdefault(kind, _loss(0, f"{kind}: {detail}", now, now))
        loss.count += count
        loss.last_at = now
        self._tell()

    def _tell(self) -> None:
        try:
            self._observe(self.counters())
        except Exception as error:
            # It may be told between two attempts to write, which have to go on.
            self._say("observe", f"what becomes of generations is not counted outside: {error!r}")

    def _say(self, kind: str, message: str) -> None:
        """Log it, but not this kind more than once in a while."""
        now = time.monotonic()
        if now >= self._silent_until.get(kind, 0):
            self._silent_until[kind] = now + SECONDS_BETWEEN_LOGS
            logger.warning("agentlightning: %s", message)


def _loss(count: int, reason: str, first_at: int, last_at: int) -> Loss:
    where = {"host": os.uname().nodename, "pid": os.getpid()}
    return Loss(count=count, reason=reason, first_at=first_at, last_at=last_at, **where)
