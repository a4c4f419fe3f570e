"""The store at the end of a recorder: opened when it is needed, and after every failure; told who writes there."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from threading import Event, Lock, local

from agentlightning.errors import StoreUnavailable
from agentlightning.recorder._trouble import TroubleLog
from agentlightning.sender import Sender, StoreTime
from agentlightning.store import Store, open_store

__all__ = ["PATIENCE_SECONDS", "Connection"]

# Short, so that the thread learns in time that the process is ending.
PATIENCE_SECONDS = 0.5
# Delay before a failed registration is retried, unless the store is opened again before that; ten times as long after
# another failure.
SECONDS_BETWEEN_REGISTRATIONS = 10.0
# As long as a store on this host needs for a batch.
SECONDS_TO_FORK = 1.0
INHERITED: list[Store | None] = []
"""Connections inherited across fork: never use or close them."""


class Connection:
    """A connection to the store at `url`, for the writing thread alone.

    Args:
        sender: returns what is known so far of this process; None registers nothing.

    Attributes:
        writer: this process, as it was last described.
        store_time: what is known of the clock of the store that is open.
    """

    def __init__(self, url: str, sender: Callable[[], Sender] | None) -> None:
        self._url = url
        self._sender = sender
        self._store: Store | None = None
        self._lock = Lock()
        self._forking = local()

    def begin(self, trouble: TroubleLog, closing: Event) -> None:
        """Begin in this process; `closing` is set when it ends."""
        self._trouble = trouble
        self._closing = closing
        self.writer: Sender | None = None
        self.store_time: StoreTime | None = None
        self._registered: Sender | None = None
        self._no_registration_until = 0.0
        self._registration_failures = 0

    @contextmanager
    def opened(self) -> Generator[Store, None, None]:
        """Yield the store, which no fork closes meanwhile.

        Raises:
            StoreUnavailable: it cannot be opened now.
        """
        with self._lock:
            if self._store is None:
                try:
                    self._store = open_store(self._url, patience=PATIENCE_SECONDS)
                except StoreUnavailable:
                    raise
                except Exception as error:
                    raise StoreUnavailable(str(error)) from error
            self._register(self._store)
            yield self._store

    @property
    def is_open(self) -> bool:
        return self._store is not None

    def close(self) -> None:
        """Close the store; the next `opened` opens it again."""
        with self._lock:
            self._close()

    def forget_registration(self) -> None:
        """Register again: the store has lost its senders."""
        self._registered = None

    def before_fork(self) -> None:
        # SQLite in the child would take the parent's locks for its own, and overwrite what the parent writes.
        self._forking.has_lock = self._lock.acquire(timeout=SECONDS_TO_FORK)
        if self._forking.has_lock:
            self._close()

    def after_fork(self) -> None:
        if self._forking.has_lock:
            self._lock.release()

    def after_fork_in_child(self) -> None:
        if not self._forking.has_lock:
            # The store did not answer in time, and vLLM must not wait for it.
            INHERITED.append(self._store)
            self._store, self._lock = None, Lock()
        else:
            self._lock.release()

    def _register(self, store: Store) -> None:
        # If registration fails (for one, a proxy may refuse large bodies), generations are still written.
        if self._sender is None:
            return
        try:
            self.writer = self._sender()
            if self.writer == self._registered or time.monotonic() < self._no_registration_until:
                return
            store.register_sender(self.writer)
            self._registered = self.writer
            self._registration_failures = 0
            self._trouble.forget("registration")
        except Exception as error:
            self._registration_failures += 1
            pause = SECONDS_BETWEEN_REGISTRATIONS * (1 if self._registration_failures == 1 else 10)
            self._no_registration_until = time.monotonic() + pause
            failed = "this server could not be registered with its store, and will retry; generations are written"
            self._trouble.warn("registration", f"{failed}: {error}")

    def _close(self) -> None:
        store, self._store, self._registered = self._store, None, None
        # The next one may have another clock.
        self.store_time = None
        if not self._closing.is_set():
            # There is time to register with the next one, which may be another store.
            self._no_registration_until = 0.0
        if store is not None:
            with suppress(Exception):
                store.close()
