"""Servers of the demonstrations: started with their output in files, and the store's page at the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["CACHE", "SMALL", "SMALL_ENV", "TINY_MODEL", "free_url", "serving", "show"]

CACHE = Path(__file__).parents[1] / ".cache"
TINY_MODEL = CACHE / "tiny-model"

# Small enough for two cores; with a GPU and a model of your own, leave these out.
SMALL = ("--max-model-len=1024", "--enforce-eager", "--dtype=float32", f"--kv-cache-memory-bytes={256 << 20}")
SMALL_ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(command: Sequence[str], health: str, log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server from the moment that it answers at `health` until the block ends, with its output in `log`."""
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **env}) as process,
    ):
        try:
            while process.poll() is None:
                with suppress(OSError):
                    urllib.request.urlopen(health).close()
                    break
                time.sleep(0.2)
            else:
                sys.exit(f"{' '.join(command)} ended with status {process.returncode}; its output is in {log}")
            yield process
        finally:
            process.terminate()


def free_url() -> str:
    """Return the URL of a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def show(wait: Callable[[], object], url: str, file: Path, shows: Sequence[str]) -> None:
    """Say where the page is and what it shows. At a terminal, wait for the server, which Ctrl-C ends."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    again = f"{os.path.relpath(Path(sys.executable).parent / 'agl')} store --store {os.path.relpath(file)}"
    print(f"\nthe page: {f'{url}/' if is_terminal else f'serve it with {again}'}")
    for line in shows:
        print(f"          {line}")
    if is_terminal:
        print("Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            wait()
        print(f"\nagain:    {again}")
