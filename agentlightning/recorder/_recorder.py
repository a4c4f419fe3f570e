"""The recorder: a queue, and the thread that writes to the store what is queued."""

from __future__ import annotations

import atexit
import os
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import NamedTuple, NoReturn

from agentlightning.errors import InvalidRecord, NotFound, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation
from agentlightning.recorder._connection import PATIENCE_SECONDS, Connection
from agentlightning.recorder._counters import NOT_BUILT, REFUSED, STOPPED, WRITE_SECONDS, Counters, Whose
from agentlightning.recorder._losses import Losses
from agentlightning.recorder._trouble import TroubleLog, logger
from agentlightning.sender import Progress, Sender, StoreTime, UnfinishedCalls

__all__ = ["BATCH_GENERATIONS", "Recorder"]

ENDED = "the process ended before they were written"
# How long the thread waits for more after the first generation: a transaction costs as much as writing many of them,
# and each time the thread wakes it takes the interpreter from the event loop.
GATHERING_SECONDS = 0.25
BATCH_GENERATIONS = 500
BATCH_BYTES = 8 << 20
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
# How often a store hears from this process when there is nothing to write.
SECONDS_BETWEEN_REPORTS = 1.0
# The most losses in one report: half of what an `agl store` accepts.
LOSSES_AT_ONCE = 1 << 15
# As much as a generation keeps alive that is queued only to be counted as lost.
NBYTES_OF_A_LOSS = 1000


_Queued = tuple[Callable[[], Generation], int, Callable[[], Whose]]
"""A generation that waits to be written: the arguments of `Recorder.record`."""


class _Mark(NamedTuple):
    """A moment, queued behind everything that had ended by then, and the generations that were unfinished then."""

    at: int
    under_way: Sequence[UnfinishedCalls]


def _of_nobody() -> Whose:
    return None, None


class Recorder:
    """Writes generations to the store at `url`, as `open_store` takes it.

    A forked process starts with an empty queue and counters at zero: its parent writes what waits.

    Args:
        url: where the store is. The thread opens it, and opens it again after every failure.
        queue_bytes: how many bytes may wait, as counted by the callers of `record`.
        sender: returns what is known so far of this process. The thread calls it before each write, and registers the
            result with each store that it opens, and again when the result changes. Without one, no progress is
            reported.
        observe: called by the thread with the counters, after each write and each failure, and when the queue shrinks.
        under_way: returns whose the generations are that are unfinished now. One that has ended is among them until it
            has been given to `record`.
    """

    def __init__(
        self,
        url: str,
        queue_bytes: int,
        sender: Callable[[], Sender] | None = None,
        observe: Callable[[Counters], object] = lambda counters: None,
        under_way: Callable[[], Iterable[Whose]] = tuple,
    ) -> None:
        self._under_way = under_way
        self._queue_bytes = queue_bytes
        self._sender = sender
        self._observe = observe
        self._connection = Connection(url, sender)
        self._begin()
        os.register_at_fork(
            before=self._connection.before_fork,
            after_in_parent=self._connection.after_fork,
            after_in_child=self._begin_in_child,
        )

    def _begin_in_child(self) -> None:
        self._connection.after_fork_in_child()
        self._begin()

    def _begin(self) -> None:
        self._thread: Thread | None = None
        self._queue: SimpleQueue[_Queued | _Mark | None] = SimpleQueue()
        self._clock = _Clock()
        self._mark: _Mark | None = None
        self._next_report = 0.0
        self._reported_until = 0
        self._closing = Event()
        self._was_opened = Event()
        self._wait_until: float | None = None
        self._deadline = float("inf")
        self._counters = Counters()
        self._record_lock = Lock()
        # Bytes that came in and bytes that went out: the first is written under the lock of the callers of `record`,
        # the second only by our thread, so that the callers never wait for it.
        self._bytes_in = self._bytes_out = 0
        self._trouble = TroubleLog()
        self._losses = Losses(self._trouble)
        self._connection.begin(self._trouble, self._closing)

    def start(self, patience: float = 0.0) -> None:
        """Start the thread, which opens the store. Idempotent; else the first `record` does it, and takes longer.

        Args:
            patience: seconds to wait at most until the store knows this process, or cannot be opened now. A store takes
                a rollout for complete if it does not know the process that answered its calls. They count from the
                first call that gives any, however many follow.
        """
        with self._record_lock:
            self._start_thread()
        if patience:
            self._wait_until = self._wait_until or time.monotonic() + patience
            self._was_opened.wait(max(self._wait_until - time.monotonic(), 0.0))

    def _start_thread(self) -> None:
        if self._thread is None:
            thread = Thread(target=self._run, name="agentlightning-recorder", daemon=True)
            thread.start()
            self._thread = thread
            atexit.register(self.close)

    def record(self, build: Callable[[], Generation], nbytes: int, whose: Callable[[], Whose] = _of_nobody) -> None:
        """Queue a generation for the store; never wait for the store, never raise. Thread-safe.

        Args:
            build: makes the generation, in the writing thread.
            nbytes: how many bytes it keeps alive until then.
            whose: returns the rollout and the attempt that it belongs to; called only if it is lost.
        """
        # Held only for an addition, and to start the thread.
        with self._record_lock:
            try:
                if self._closing.is_set():
                    self._losses.count_late("it is closed")
                    return
                waiting = self._bytes_in - self._bytes_out
                # A generation larger than the queue is admitted when the queue is empty.
                if waiting and waiting + nbytes > self._queue_bytes:
                    full = f"the queue of {self._queue_bytes >> 20} MiB (AGL_QUEUE_MB) is full"
                    self._losses.reject(_whose_of(whose), f"{full}, since the store is too slow or away")
                    return
                self._start_thread()
                self._bytes_in += nbytes
                self._queue.put((build, nbytes, whose))
            except Exception as error:
                # No thread can be started while the interpreter is ending.
                self._losses.count_late(repr(error))

    def note_lost(self, whose: Callable[[], Whose], error: Exception) -> None:
        """Count a generation as lost that our code failed to record; never raise. Thread-safe.

        It goes through the queue, so that no watermark passes it before its loss is reported.

        Args:
            whose: returns the rollout and the attempt that it belongs to.
            error: the reason.
        """
        # Without the error itself, whose traceback keeps much alive.
        self.record(partial(_fail, repr(error)), NBYTES_OF_A_LOSS, whose)

    def counters(self) -> Counters:
        """Return a snapshot of the counters."""
        mine = self._counters
        waiting = self._bytes_in - self._bytes_out
        return replace(mine, queue_bytes=waiting, lost=self._losses.counts(), writes=list(mine.writes))

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, for at most `timeout` seconds; count the rest as lost, and record the loss if possible.

        Idempotent. Generations that are recorded afterwards are lost, and counted.
        """
        # Leave time for a last attempt, and for recording the loss of the rest.
        self._deadline = min(self._deadline, time.monotonic() + max(timeout - 2 * PATIENCE_SECONDS, 0))
        self._closing.set()
        if self._thread is not None:
            self._queue.put(None)
            waits = self._bytes_in > self._bytes_out
            # With nothing to write, only the last report is missing.
            self._thread.join(timeout if waits else min(timeout, 2 * PATIENCE_SECONDS))
            if waits and self._thread.is_alive():
                logger.error(
                    "agentlightning: the store does not answer, so about %d bytes of generations are lost: the process "
                    "ends without writing them",
                    self._bytes_in - self._bytes_out,
                )

    def _run(self) -> None:
        self._try_to_open()
        self._was_opened.set()
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                self._write_batch()
                self._trouble.forget("batch")
            except Exception as error:
                self._trouble.warn("batch", f"writing generations failed: {error!r}")
        self._write_losses()
        self._report_the_end()
        self._connection.close()

    def _try_to_open(self) -> None:
        """Open the store before there is anything to write, so that an unusable store is reported at the start."""
        try:
            with self._connection.opened():
                pass
        except StoreUnavailable as error:
            self._note_failed_write(error)

    def _write_batch(self) -> None:
        """Wait for generations, or until a report is due; write what has arrived, and report it."""
        items, mark = self._gather()
        try:
            if items and time.monotonic() > self._deadline:
                self._lose(STOPPED, [_whose_of(whose) for _, _, whose in items], ENDED)
                return
            if generations := self._build(items):
                self._write(generations)
        finally:
            self._bytes_out += sum(nbytes for _, nbytes, _ in items)
            self._mark = mark or self._mark
            self._notify()
        self._write_losses()
        # With more to write at once, a report each second is enough.
        if self._queue.qsize() < BATCH_GENERATIONS or time.monotonic() >= self._next_report:
            self._report()

    def _gather(self) -> tuple[list[_Queued], _Mark | None]:
        """Wait for generations; return those that have arrived, and the last moment before which all had ended."""
        items: list[_Queued] = []
        item, mark, nbytes = None, None, 0
        with suppress(Empty):
            item = self._queue.get(timeout=self._longest_wait())
            if self._queue.qsize() < BATCH_GENERATIONS and self._bytes_in - self._bytes_out < BATCH_BYTES:
                self._closing.wait(GATHERING_SECONDS)
        self._put_mark()
        with suppress(Empty):
            while True:
                if isinstance(item, _Mark):
                    mark = item
                # None only wakes this thread.
                elif item is not None:
                    items.append(item)
                    nbytes += item[1]
                if len(items) == BATCH_GENERATIONS or nbytes >= BATCH_BYTES:
                    break
                item = self._queue.get_nowait()
        return items, mark

    def _longest_wait(self) -> float | None:
        """Return how many seconds to wait for a generation; None if nothing else is to be done."""
        waits = [LONGEST_PAUSE_SECONDS] if self._losses.reports else []
        if self._sender is not None:
            waits.append(max(self._next_report - time.monotonic(), 0.0))
        return min(waits, default=None)

    def _put_mark(self) -> None:
        """Queue this moment behind everything that has ended.

        The moment comes before the look at what is unfinished, and that before the queue: a generation that is
        neither in this look nor before the mark began after the moment.
        """
        if self._sender is None:
            return
        at = self._clock.now()
        try:
            counts = Counter(self._under_way())
        except Exception as error:
            self._trouble.warn(
                "under way", f"unfinished generations cannot be listed, so no progress is reported: {error!r}"
            )
        else:
            self._trouble.forget("under way")
            self._queue.put(_Mark(at, [UnfinishedCalls(*whose, count) for whose, count in counts.items()]))

    def _build(self, items: Iterable[_Queued]) -> list[Generation]:
        generations = list[Generation]()
        for build, _, whose in items:
            try:
                generations.append(build())
            except Exception as error:
                self._lose(NOT_BUILT, [_whose_of(whose)], repr(error))
        return generations

    def _write(self, generations: list[Generation]) -> None:
        """Write all generations, retrying until the store accepts them, or count them as lost."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            started = time.perf_counter()
            try:
                with self._connection.opened() as store:
                    started = time.perf_counter()
                    store.add(generations, None if self._connection.writer is None else self._connection.writer.id)
            except (StoreUnavailable, StoreRefused) as error:
                self._note_failed_write(error)
                retry_after = error.retry_after if isinstance(error, StoreUnavailable) else None
            except InvalidRecord as error:
                # Without reasons, the store refused the message as a whole.
                refused = error.reasons or {generation.id for generation in generations}
                kept = [generation for generation in generations if generation.id not in refused]
                self._lose(REFUSED, [_whose(each) for each in generations if each.id in refused], str(error))
                self._count(kept, time.perf_counter() - started)
                return
            except Exception as error:
                # Our own error before the store was asked, so that it has none of them.
                if len(generations) == 1:
                    self._lose(REFUSED, [_whose(each) for each in generations], repr(error))
                else:
                    for generation in generations:
                        self._write([generation])
                return
            else:
                self._count(generations, time.perf_counter() - started)
                return
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._lose(STOPPED, [_whose(each) for each in generations], ENDED)
                return
            # Random, so that servers that lost the store together do not return together. SystemRandom, since a program
            # may have seeded the process's generator, and would draw other numbers after ours.
            wait = pause * random.SystemRandom().uniform(0.5, 1)
            if self._closing.is_set():
                # The store's own delay no longer counts: it may exceed the time left, and all would be lost untried.
                time.sleep(min(wait, left))
            elif self._closing.wait(max(wait, retry_after or 0)):
                # There is a deadline now: short pauses again, for as many attempts as fit.
                pause = FIRST_PAUSE_SECONDS
                continue
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _write_losses(self) -> None:
        losses = self._losses
        losses.make_reports()
        if losses.reports:
            try:
                with self._connection.opened() as store:
                    store.add_losses(losses.reports)
                losses.reports = []
            except InvalidRecord as error:
                # A retry would be refused again.
                refused = f"the store refuses the numbers of lost generations: {error}: {losses.reports}"
                self._trouble.warn("losses", refused)
                losses.reports = []
            except Exception as error:
                self._note_failed_write(error)

    def _report(self, has_ended: bool = False) -> None:
        """Tell the store how far this process has written. What fails is tried again with the next report."""
        self._next_report = time.monotonic() + SECONDS_BETWEEN_REPORTS
        self._losses.collect_named()
        unconfirmed = self._losses.unconfirmed
        if self._mark is None:
            return
        try:
            # Twice where the store's time is not known yet, and once more for every further part of the losses.
            while True:
                with self._connection.opened() as store:
                    # Also if its registration was refused, as a proxy refuses a large vocabulary: the store may know it
                    # without, and takes a rollout for complete whose calls a sender has not reported on.
                    if self._connection.writer is None:
                        return
                    known, lost = self._connection.store_time, unconfirmed[:LOSSES_AT_ONCE]
                    is_last = len(lost) == len(unconfirmed)
                    told = Progress(
                        # The moment passes only with the last of the losses before it.
                        watermark=self._mark.at if is_last else self._reported_until,
                        store_time=known,
                        under_way=self._mark.under_way,
                        lost=lost,
                        has_ended=has_ended and is_last,
                    )
                    at = store.report_progress(self._connection.writer.id, told)
                    self._connection.store_time = StoreTime(at, self._clock.now())
                    self._reported_until = told.watermark
                    del unconfirmed[: len(lost)]
                if known is not None and is_last:
                    break
        except StoreUnavailable as error:
            self._note_failed_write(error, is_news=self._counters.trouble is None)
        except NotFound:
            self._connection.forget_registration()
        except Exception as error:
            self._trouble.warn("progress", f"the store refuses to hear how far generations are written: {error}")
        else:
            self._trouble.forget("progress")
            self._note_success()

    def _report_the_end(self) -> None:
        """Tell the store that nothing follows, if it answers: a process that ends has no time to wait for it."""
        if self._connection.is_open and self._mark is not None:
            try:
                unfinished = list(self._under_way())
            except Exception as error:
                # Without a last word, the store takes this process for killed, and trusts in nothing that it answers.
                self._trouble.warn(
                    "under way", f"unfinished generations cannot be listed, so no end is reported: {error!r}"
                )
                return
            self._losses.name(STOPPED, unfinished)
            self._mark = _Mark(self._clock.now(), ())
            self._report(has_ended=True)

    def _note_failed_write(self, error: Exception, is_news: bool = True) -> None:
        """Note that the store could not be written; it is opened again for the next attempt.

        Args:
            is_news: log it. A server that is idle would log the same all night.
        """
        self._counters.failed_writes += 1
        self._counters.trouble = str(error)
        self._notify()
        if is_news:
            self._trouble.warn(
                "store", f"the store cannot be written, so generations wait in memory and are retried: {error}"
            )
        self._connection.close()

    def _count(self, generations: Iterable[Generation], seconds: float) -> None:
        counters = self._counters
        for generation in generations:
            counters.generations += 1
            counters.prompt_tokens += len(generation.prompt_token_ids or ())
            counters.output_tokens += sum(len(choice.token_ids or ()) for choice in generation.choices)
        counters.writes[bisect_left(WRITE_SECONDS, seconds)] += 1
        counters.write_seconds += seconds
        self._note_success()
        self._notify()

    def _note_success(self) -> None:
        if self._counters.trouble is not None:
            self._counters.trouble = None
            self._trouble.forget("store")
            logger.info("agentlightning: generations are written to the store again")

    def _lose(self, kind: str, whose: Sequence[Whose], detail: str) -> None:
        self._losses.add(kind, whose, detail)
        self._notify()

    def _notify(self) -> None:
        try:
            self._observe(self.counters())
            self._trouble.forget("observe")
        except Exception as error:
            # This may run between two attempts to write, which must go on.
            self._trouble.warn("observe", f"the metrics of recorded generations could not be updated: {error!r}")


class _Clock:
    """A clock that begins with the time of day and never jumps, in nanoseconds."""

    def __init__(self) -> None:
        self._ahead = time.time_ns() - time.monotonic_ns()

    def now(self) -> int:
        return self._ahead + time.monotonic_ns()


def _fail(reason: str) -> NoReturn:
    raise RuntimeError(reason)


def _whose_of(whose: Callable[[], Whose]) -> Whose:
    """Return whose a lost generation is; no rollout's if that cannot be told, so that it is counted in any case."""
    try:
        return whose()
    except Exception:
        return _of_nobody()


def _whose(generation: Generation) -> Whose:
    return generation.rollout_id, generation.attempt_id
