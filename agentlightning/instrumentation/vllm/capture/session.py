"""Everything that this process has for recording, in one object: settings, recorder, metrics, and its identity.

On the event loop a generation costs the same however long it is: vLLM's lists are queued uncopied, and the writing
thread converts them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Protocol
from weakref import WeakSet

from agentlightning import settings
from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm.capture.identity import Identity
from agentlightning.instrumentation.vllm.capture.metrics import Metrics, Observer
from agentlightning.recorder import Recorder, Whose
from agentlightning.settings import Settings
from agentlightning.store import place_of

__all__ = ["Session", "session"]

# A Python integer and its place in a list.
BYTES_PER_ID = 36
# Everything else that a queued generation keeps alive.
BYTES_PER_GENERATION = 2000


class Unfinished(Protocol):
    """Generations that have begun and not ended."""

    def under_way(self) -> Iterable[Whose]:
        """Return whose they are. Called by the writing thread while others change them."""
        ...


class Session:
    """The state of recording in this process, from the first time that it is instrumented until it exits.

    Settings are read once each time the process is instrumented, never for a request. A program may be instrumented
    again with another `AGL_STORE`: from then on generations go there, and what was recorded before still goes to the
    store of that time, whose recorder stays until the process exits.

    Attributes:
        identity: what stores are told about this process.
    """

    def __init__(self) -> None:
        self.identity = Identity()
        self._settings: Settings | None = None
        self._recorder: Recorder | None = None
        self._recorders: dict[tuple[str, int], Recorder] = {}
        # Prometheus knows each name once, however many stores a process records to.
        self._metrics: Metrics | None = None
        self._unfinished: WeakSet[Unfinished] = WeakSet()
        self._lock = threading.Lock()

    def begin_in_child(self) -> None:
        """Forget the settings in a forked child, where a launcher may set other variables, and the parent's requests.

        The lock is replaced: another thread of the parent may have held it.
        """
        self._lock = threading.Lock()
        self._unfinished = WeakSet()
        self._settings = self._recorder = None

    def begin(self) -> None:
        """Forget the settings: the process is instrumented (again), and their next use reads them."""
        with self._lock:
            self._settings = self._recorder = None

    @property
    def settings(self) -> Settings:
        """The settings, as they were read at their first use since `begin`."""
        found = self._settings
        if found is None:
            found = self._settings = settings.read_all()
        return found

    @property
    def is_recording(self) -> bool:
        """True if generations are recorded: `AGL_STORE` is set."""
        return self.settings.store is not None

    @property
    def records_offline(self) -> bool:
        """True if what is generated without a server is recorded, too: `AGL_RECORD_OFFLINE` is on."""
        return self.is_recording and self.settings.record_offline

    @property
    def follows_requests(self) -> bool:
        """True if requests to the engine are followed to their end: to be recorded, or continued by later ones."""
        return self.is_recording or self.settings.continues != "off"

    @property
    def describes_calls(self) -> bool:
        """True if what a call asks for has to be known: to follow its requests, or to change what it asks for."""
        return self.follows_requests or self.settings.sampling.is_on or self.settings.any_model_name

    @property
    def recorder(self) -> Recorder:
        """The recorder of the store that `AGL_STORE` names; only for a session that records."""
        return self._recorder or self._find_recorder()

    def _find_recorder(self) -> Recorder:
        with self._lock:
            if self._recorder is None:
                store, queue_bytes = self.settings.store, self.settings.queue_bytes
                assert store is not None, "AGL_STORE is not set, so nothing is recorded"
                found = self._recorders.get((store, queue_bytes))
                if found is None:
                    self._metrics = self._metrics or Metrics()
                    found = Recorder(store, queue_bytes, self.identity.sender, Observer(self._metrics), self._under_way)
                    self._recorders[store, queue_bytes] = found
                self._recorder = found
            return self._recorder

    def follow(self, unfinished: Unfinished) -> None:
        """Report these generations to the store as under way, for as long as the object lives."""
        self._unfinished.add(unfinished)

    def _under_way(self) -> list[Whose]:
        return [whose for each in list(self._unfinished) for whose in each.under_way()]

    def record(
        self, build: Callable[[], Generation], token_ids: int, more_bytes: int, whose: Callable[[], Whose]
    ) -> None:
        """Queue a generation for the store.

        Args:
            build: makes the generation, in the writing thread.
            token_ids: how many ids it keeps alive until then, as Python integers.
            more_bytes: what else it keeps alive, if that is much.
            whose: returns its rollout and attempt.
        """
        self.recorder.record(build, BYTES_PER_GENERATION + BYTES_PER_ID * token_ids + more_bytes, whose)

    def destination(self) -> str:
        """Say in a clause where generations are recorded, for the log."""
        store = self.settings.store
        if store is None:
            return "nothing is recorded, since AGL_STORE is not set"
        trouble = self.recorder.counters().trouble
        return f"records to {place_of(store)}" if trouble is None else f"records once its store can be used: {trouble}"

    def report(self) -> dict[str, Any] | None:
        """Return the store's place and the recorder's counters, for the status; None if nothing is recorded."""
        store = self.settings.store
        if store is None:
            return None
        return {"store": settings.without_secrets(store), **asdict(self.recorder.counters())}


session = Session()
"""The session of this process."""
os.register_at_fork(after_in_child=session.begin_in_child)
