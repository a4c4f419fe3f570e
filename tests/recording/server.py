"""A real server that records, and its recorded generations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from agentlightning.errors import StoreUnavailable
from agentlightning.generation import Generation
from agentlightning.store import Filters, open_store
from tests.common.answers import get, post
from tests.common.environments import CHECKOUT
from tests.common.vllm import RemoteOpenAIServer

SECONDS = 300
"""A safety net: usually a second or two is enough, unless the disk is busy with gigabytes of other writes."""


class RecordingServer(RemoteOpenAIServer):
    """`AGL_INSTRUMENT=1 AGL_STORE=PATH vllm serve`.

    Args:
        path: where it keeps what it generates.
        store: the URL of where it does so in the place of that file.
        arguments, env, options: as `RemoteOpenAIServer` takes them.
    """

    def __init__(
        self,
        path: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        store: str | None = None,
        **options: Any,
    ) -> None:
        self.path = path
        self.store = store or str(path)
        ours = {"AGL_INSTRUMENT": "1", "AGL_STORE": self.store, "PYTHONPATH": str(CHECKOUT)}
        super().__init__(*arguments, env={**ours, **(env or {})}, **options)

    def kept(self, **filters: Unpack[Filters]) -> list[Generation]:
        """Return the generations in its store now."""
        try:
            with open_store(self.store, read_only=True) as store:
                return [*store.generations(**filters)]
        except StoreUnavailable:
            return []

    def recorded(self, **filters: Unpack[Filters]) -> list[Generation]:
        """Return the generations in its store once all finished ones are there: one process writes them in order."""
        last = post(self, "/v1/completions", {"model": self.model, "prompt": "last", "max_tokens": 1})
        until(lambda: self.kept(response_id=last["id"]), "the last one")
        return self.kept(**filters)

    def metrics(self) -> dict[str, float]:
        """vLLM's `/metrics`, as they are now."""
        _, body = get(self, "/metrics/")
        lines = [line.rpartition(" ") for line in body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def body(self, **options: Any) -> dict[str, Any]:
        """Return a greedy request, whose answer is known."""
        return {"model": self.model, "max_tokens": 24, "temperature": 0, **options}


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return the first true result of `condition`."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {SECONDS} s: {what}")
        time.sleep(0.05)
    return found
