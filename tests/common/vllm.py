"""A real vLLM server for tests, the demo and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from tests.common.pace import not_counted
from tests.common.tiny_model import tiny_model

if TYPE_CHECKING:
    import openai
    from typing_extensions import Self

SCRIPTS = Path(sysconfig.get_path("scripts"))
START_SECONDS = 600
STOP_SECONDS = 30
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # The tiny model is quicker in one thread; those of several engines would wait for each other's cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
SMALL = ("--max-model-len", "1024", "--enforce-eager", "--dtype", "float32")
CACHE_BYTES = 256 << 20
"""Memory for the keys and values of a quarter of a million tokens: up to a dozen engines of the tests are there at
once, each of which would take most of the memory."""
LITTLE_CACHE = ("--kv-cache-memory-bytes", str(CACHE_BYTES))
# Without a worker process, as on one GPU. On CPUs vLLM starts one, for whose sake both it and the engine core spin.
NO_WORKER = ("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor")
PLAIN = ("vllm", "serve")
AGL = ("agl", "vllm", "serve")


START_METHOD = Path(__file__).parent / "start_method"


def started_by(method: str) -> dict[str, str]:
    """The environment of a server that starts its processes by spawn, fork or forkserver, whatever vLLM would do."""
    return {"PYTHONPATH": str(START_METHOD), "START_METHOD": method}


def is_healthy(server: RemoteOpenAIServer) -> bool:
    """Tell whether it answers to /health."""
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


class RemoteOpenAIServer:
    """`vllm serve` in a process of its own, on a free port, from entering the context to leaving it.

    Args:
        arguments: what follows the model on the command line.
        command: what comes before it: a script, and its subcommand.
        env: environment variables of the server; `AGL_*` variables of this process do not reach it.
        model: a model's folder; the tiny one if not given.
        small: arguments that make it small.
        scripts: the folder that the command is in, where it is another environment's.
        is_up: whether the server is what it is waited for, for one that answers to no /health.
        forks: fork its engine core instead of spawning it, which saves one import of vLLM, half of its start.

    Raises:
        RuntimeError: on entering, if the server ends or is not up after ten minutes; shows its log's end.
    """

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] = PLAIN,
        env: Mapping[str, str] | None = None,
        model: Path | None = None,
        small: Sequence[str] = (*SMALL, *LITTLE_CACHE, *NO_WORKER),
        scripts: Path = SCRIPTS,
        is_up: Callable[[RemoteOpenAIServer], bool] = is_healthy,
        forks: bool = False,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = str(model or tiny_model())
        self.command = [str(scripts / command[0]), *command[1:], self.model, "--port", str(self.port)]
        self.command += ["--host", "127.0.0.1", *small, *arguments]
        self.env = {**without_agl(os.environ), **QUIET, **(env or {})}
        if forks:
            path = filter(None, (str(START_METHOD), self.env.get("PYTHONPATH")))
            self.env |= {**started_by("fork"), "PYTHONPATH": os.pathsep.join(path)}
        self._is_up = is_up
        self._log_folder = tempfile.mkdtemp(prefix="vllm-")
        self._log = Path(self._log_folder) / "server.log"

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and do not wait."""
        with self._log.open("w") as log:
            # A group of its own, so that the engine cores end with the server.
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def log(self) -> str:
        """The output of the server so far."""
        return self._log.read_text(errors="replace")

    @property
    def our_lines(self) -> list[str]:
        """The lines of its log that name us."""
        return [line for line in self.log.splitlines() if "agentlightning: " in line]

    def client(self) -> openai.OpenAI:
        """A client for this server; it never retries, so that no test is passed on the second try."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        """The same, asynchronous."""
        import openai

        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait_until_up(self) -> None:
        """Raises `RuntimeError` where it ends instead, or takes more than ten minutes."""
        deadline = time.monotonic() + START_SECONDS
        with not_counted():
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log[-20000:]}")
                if self._is_up(self):
                    return
                time.sleep(0.25)
        raise RuntimeError(f"the server was not up after {START_SECONDS} s:\n{self.log[-20000:]}")

    def stop(self) -> None:
        """Interrupt it, as Ctrl-C does, and end what is left of it."""
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        # What is left of the group: engine cores that outlived the server, or a server that did not end.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # The servers of vLLM's data-parallel supervisor have groups of their own.
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        shutil.rmtree(self._log_folder)


@contextlib.contextmanager
def side_by_side(*servers: RemoteOpenAIServer) -> Iterator[None]:
    """Start all of them at once, which is quicker than one after the other, and stop them with the block."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(server.stop)
        for server in servers:
            server.wait_until_up()
        yield


def processes_that_serve(server: RemoteOpenAIServer) -> set[int]:
    """The processes that hold the server's side of a connection, while the clients keep theirs."""
    return {
        process.pid
        for process in psutil.Process(server.process.pid).children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == server.port
    }


def without_agl(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without our own variables, whatever the shell that runs the tests has set.

    Nor without bytecode, which a container's shell often switches off: each process would compile thousands of modules.
    """
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith("AGL_") and name != "PYTHONDONTWRITEBYTECODE"
    }


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(*command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A short command with this interpreter's environment's scripts; its output, kept."""
    program = sys.executable if command[0] == "python" else str(SCRIPTS / command[0])
    return subprocess.run(
        [program, *command[1:]],
        env={**without_agl(os.environ), **QUIET, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
