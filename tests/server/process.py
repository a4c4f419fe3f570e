"""`agl store` as a process, started as users start it."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.common.environments import CHECKOUT
from tests.common.forking import ForkedProcess, fork_agl
from tests.common.vllm import without_agl

AGL = (sys.executable, "-m", "agentlightning")
AGL_STORE = (*AGL, "store")
SECONDS = 60
PLAIN_HTTP = False
"""The context for `verify`: otherwise each client takes a twentieth of a second to read all certificates."""


class StoreServer:
    """`agl store` from entering the context to leaving it; may be killed and restarted in between.

    Args:
        path: the file to serve; its log is next to it.
        arguments: more arguments of `agl store`.
        key: the key to ask for, set in the environment.
        store: the database to serve instead of the file.
        env: additional environment variables.
        files: soft and hard limit of open files; those of the tests if not given.
    """

    def __init__(
        self,
        path: Path,
        *arguments: str,
        key: str | None = None,
        store: str | None = None,
        env: Mapping[str, str] | None = None,
        files: tuple[int, int] | None = None,
    ) -> None:
        self.path = path
        self.store = store or str(path)
        self.key = key
        self._arguments = arguments
        self._env = env or {}
        self._files = files
        self._port = 0
        self.log = path.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | ForkedProcess

    def __enter__(self) -> StoreServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the server, after a kill on the same port, and wait until it answers."""
        command = [*AGL_STORE, f"--port={self._port}", f"--store={self.store}", *self._arguments]
        env = {**without_agl(os.environ), "PYTHONPATH": str(CHECKOUT), **self._env}
        if self.key is not None:
            env["AGL_STORE_KEY"] = self.key
        with self.log.open("ab") as log:
            start = log.tell()
            if self._env or self._files:
                # Python itself may read its environment when it starts.
                self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, preexec_fn=self._limit)
            else:
                self.process = fork_agl(command[len(AGL) :], env, log)
        deadline = time.monotonic() + SECONDS
        while True:
            output = self.log.read_bytes()[start:].decode()
            assert self.process.poll() is None, output
            assert time.monotonic() < deadline, output
            if found := re.search(r"is served at http://127\.0\.0\.1:(\d+)", output):
                self._port = int(found[1])
                try:
                    if httpx.get(f"{self.url}/readyz", verify=PLAIN_HTTP).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
            time.sleep(0.02)

    def _limit(self) -> None:
        if self._files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, self._files)

    def stop(self) -> int:
        """Send SIGTERM; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        """Send SIGKILL, unless the server has ended."""
        self.process.kill()
        self.process.wait()

    def client(self, **arguments: Any) -> httpx.Client:
        """Make a client that has the key."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=SECONDS, verify=PLAIN_HTTP, **arguments)
