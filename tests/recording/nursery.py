"""Servers, and programs with an engine of their own, that start within seconds.

All that a server does is real; what it is spared is importing vLLM. One process has imported it, and is armed, before
it forks a server, which then forks its engine core. Several API servers are spawned by vLLM as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.common.environments import CHECKOUT
from tests.common.vllm import QUIET, without_agl
from tests.recording.server import RecordingServer

PROGRAM_SECONDS = 300
ENDED = "the program has ended"


class Nursery:
    """The process that forks servers; a context manager.

    Its path is not the servers': each has an `AGL_STORE` of its own, and says itself whether prompts go on, and what is
    pinned.
    """

    def __enter__(self) -> Nursery:
        variables = {"AGL_INSTRUMENT": "1", "AGL_STORE": os.devnull, "AGL_RECORD_OFFLINE": "on"}
        variables |= {
            "AGL_CONTINUE": "on",
            "AGL_SAMPLING": "rollout",
            "AGL_MODEL_NAMES": "any",
            "PYTHONPATH": str(CHECKOUT),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env={**without_agl(os.environ), **QUIET, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def fork(self, command: list[str], env: Mapping[str, str], log: Path) -> int:
        """Start a server, or a program whose file is the first word; return its process id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, dict(env), str(log)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def server(
        self,
        path: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        store: str | None = None,
        model: Path | None = None,
    ) -> NurserysServer:
        """Return a server of a model, or else of the tiny one, that records at `path`, or in the store of this URL."""
        return NurserysServer(self, path, *arguments, env=env, store=store, model=model)

    def run(self, program: str, *arguments: str, folder: Path, env: Mapping[str, str]) -> str:
        """Run a program to its end, with the folder for its files; return its output.

        Raises:
            RuntimeError: it has failed.
        """
        file, log = folder / "program.py", folder / "program.log"
        file.write_text(program)
        variables = {"AGL_INSTRUMENT": "1", "PYTHONPATH": str(CHECKOUT), **env}
        process = _Process(self.fork([str(file), *arguments], {**without_agl(os.environ), **QUIET, **variables}, log))
        process.wait(PROGRAM_SECONDS)
        output = log.read_text(errors="replace")
        if ENDED not in output:
            raise RuntimeError(f"the program has failed:\n{output[-20000:]}")
        return output


class NurserysServer(RecordingServer):
    """A server that is forked."""

    def __init__(self, nursery: Nursery, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._nursery = nursery

    def start(self) -> None:
        self.process: Any = _Process(self._nursery.fork(self.command[1:], self.env, self._log))


class _Process(psutil.Process):
    """A substitute for `subprocess.Popen`; the nursery reaps the process."""

    def poll(self) -> int | None:
        return None if self.is_running() else 0

    def send_signal(self, sig: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            super().send_signal(sig)

    def wait(self, timeout: float | None = None) -> int:
        try:
            # It is not our child, so its exit status is unknown.
            return super().wait(timeout) or 0
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired(str(self), timeout or 0) from None


def _fork_servers(requests: Iterator[str], main: Any) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for request in requests:
        command, env, log = json.loads(request)
        pid = os.fork()
        if not pid:
            break
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    else:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (file, 1), (file, 2)):
        os.dup2(old, new)
    os.environ.clear()
    os.environ.update(env)
    if not command[0].endswith(".py"):
        sys.argv = ["vllm", *command]
        main()
        return
    sys.argv, succeeded = command, []
    # The first to be registered is called last: after all is written that the program has generated.
    atexit.register(lambda: succeeded and sys.stdout.write(f"{ENDED}\n"))
    runpy.run_path(command[0], run_name="__main__")
    succeeded.append(True)


if __name__ == "__main__":
    import multiprocessing

    import vllm.utils.system_utils

    # vLLM's CPU platform insists on spawn; builds for GPUs start the engine core by fork.
    vllm.utils.system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")

    import vllm.entrypoints.cli.main
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.model_executor.models.qwen2
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker

    _fork_servers(iter(sys.stdin.readline, ""), vllm.entrypoints.cli.main.main)
