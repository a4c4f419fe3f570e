"""The help of each command and the commonest errors, in `docs/commands.md`: `make commands` writes the page.

Each was printed by the command itself, on a terminal of 80 columns. What differs from machine to machine (folders, the
interpreter, ports, the version) has a name in its place.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import agentlightning
from agentlightning.cli import COMMANDS
from agentlightning.generation import Choice, Generation
from agentlightning.store import open_store
from tests.common.terminal import on_terminal

__all__ = ["PAGE", "page"]

CHECKOUT = Path(__file__).parents[1]
PAGE = CHECKOUT / "docs" / "commands.md"
AGL = (sys.executable, "-m", "agentlightning")
# Without all packages but this one and the standard library.
BARE_AGL = (sys.executable, "-S", "-m", "agentlightning")
HOME = "/home/me"
PORT, OTHER_PORT = 4747, 8000
"""The ports on the page. Those that are used have as many digits, so that lines break at the same places."""
KEY = "the-key-of-this-store"
INTRODUCTION = """\
# Commands and their errors

The help of each command, and the commonest errors, as they look on a terminal of 80 columns. [Switches](switches.md)
explains the options, and [Is it on?](doctor.md) has answers of `agl doctor`. `make commands` wrote this page.

A command that is stopped by Ctrl-C or SIGTERM prints one line, such as `agl export: interrupted`, and ends by that
signal: a shell shows 130 or 143.
"""
ERRORS = {
    "exprot --rollout ro-1": "A command that does not exist",
    "vllm serve Qwen/Qwen3-0.6B": "vLLM is in another environment",
    f"doctor --url http://127.0.0.1:{OTHER_PORT}": "No server there",
    f"doctor --store http://127.0.0.1:{PORT} --rollout ro-9": "A rollout of which nothing is recorded",
    "export -o ro-1.jsonl": "No store is named",
    "export --store typo.db": "The store does not exist",
    "export --store .": "The store is a folder",
    f"export --store http://127.0.0.1:{OTHER_PORT}": "The store is not served there",
    f"export --store http://agl:wrong@127.0.0.1:{PORT}": "The key of the store is wrong",
    "export --store agl-store.db -o ro-1.jsonl": "The file exists",
    "export --store agl-store.db -o missing/ro-1.jsonl": "The folder of the file does not exist",
    "export --store agl-store.db --format parquet": "Parquet on a terminal",
    "export --store agl-store.db --since yesterday": "A time that is none",
    "export --store agl-store.db --what triplets --model tiny": "A filter that triplets do not have",
    "export --store agl-store.db --rollout ro-9 -o ro-9.jsonl": "Nothing matches",
    "store --host 0.0.0.0": "Other machines could connect without a key",
    f"store --port {PORT}": "The port is in use",
    "store --cors-origin app.example.org": "An origin that no browser sends",
    "store --port 0 --store notes.txt": "The store is another file",
    "agentops": "A package is missing",
}
"""The commonest errors: the arguments of `agl`, and a heading for each."""
BARE = ("vllm serve Qwen/Qwen3-0.6B", "agentops")
"""Errors that happen where packages are missing."""


def page() -> str:
    """Run all commands, and return the page."""
    parts = [INTRODUCTION, "## Help"]
    for arguments in ("--help", *(f"{command} --help" for command in COMMANDS if command != "vllm")):
        parts += [f"### agl {arguments.removesuffix('--help')}".rstrip(), _block(arguments, _shown(arguments))]
    parts += ["`agl vllm --help` is the help of vLLM.", "## The commonest errors"]
    with _folder() as folder, _server(folder) as port, _free_port() as other:
        for arguments, heading in ERRORS.items():
            used = arguments.replace(f"{PORT}", f"{port}").replace(f"{OTHER_PORT}", f"{other}")
            shown = _shown(used, folder, BARE_AGL if arguments in BARE else AGL)
            shown = shown.replace(f":{port}", f":{PORT}").replace(f":{other}", f":{OTHER_PORT}")
            parts += [f"### {heading}", _block(arguments, shown)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _block(arguments: str, shown: str) -> str:
    return f"```text\n$ agl {arguments}\n{shown.rstrip()}\n```"


def _shown(arguments: str, folder: Path | None = None, program: tuple[str, ...] = AGL) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AGL_", "VLLM_"))}
    env |= {"PYTHONPATH": str(CHECKOUT), "NO_COLOR": "1", "TZ": "UTC"}
    env |= {"AGL_STORE_KEY": KEY} if arguments.startswith("doctor") else {}
    shown, _ = on_terminal((*program, *shlex.split(arguments)), env=env, folder=folder)
    if folder is not None:
        shown = shown.replace(str(folder), HOME)
    return shown.replace(sys.executable, "python").replace(f" {agentlightning.__version__}:", " VERSION:")


@contextmanager
def _folder() -> Iterator[Path]:
    """Make a folder with a store, an export, and a file that is no store."""
    with tempfile.TemporaryDirectory(prefix="agl-commands-") as name:
        folder = Path(name).resolve()
        with open_store(str(folder / "agl-store.db")) as store:
            store.add([_generation(number) for number in range(4)])
        (folder / "ro-1.jsonl").write_text("{}\n")
        (folder / "notes.txt").write_text("No database, though long enough to be one.\n" * 100)
        yield folder


def _generation(number: int) -> Generation:
    return Generation(
        request_id=f"{number}",
        rollout_id=f"ro-{number // 2 + 1}",
        model="tiny",
        finished_at=1_790_000_000_000_000_000 + number,
        status="finished",
        prompt_token_ids=array("i", [1, 2, 3]),
        choices=[Choice(token_ids=array("i", [4, 5]), finish_reason="stop")],
    )


@contextmanager
def _server(folder: Path) -> Iterator[int]:
    """Serve the store, with a key; return the port."""
    with _free_port() as port:
        pass
    command = [*AGL, "store", f"--port={port}", f"--store={folder / 'agl-store.db'}"]
    env = {**os.environ, "AGL_STORE_KEY": KEY, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(command, env=env, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        output = ""
        while "is served at" not in output:
            line = server.stderr.readline()
            assert line, output
            output += line
        try:
            yield port
        finally:
            server.terminate()
            server.communicate()


@contextmanager
def _free_port() -> Iterator[int]:
    """Reserve a port of four digits on which nothing answers."""
    for port in range(4747, 10_000):
        with socket.socket() as reserved:
            try:
                reserved.bind(("127.0.0.1", port))
            except OSError:
                continue
            yield port
            return


if __name__ == "__main__":
    PAGE.write_text(page())
