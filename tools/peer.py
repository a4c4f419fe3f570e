"""Agent Lightning 0.3, in an environment of its own: it is imported by our name, so the two meet over HTTP alone.

`python -m tools.peer` makes it in `.cache/peer`, once; with OpenTelemetry 1.38, the last one that it works with, and
with schemathesis, which asks for other versions of what vLLM has, too.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.lock import Lock, is_newest, newest
from tools.make_env import CHECKOUT, run, say

__all__ = ["environment", "make_once", "peer"]

# All are named exactly: what they find wrong is to change with this project, and with nothing else.
REQUIREMENTS = (
    "agentlightning==0.3.0",
    "opentelemetry-exporter-otlp-proto-http==1.38.*",
    "opentelemetry-sdk==1.38.*",
    "schemathesis==4.32.5",
)


def peer() -> Path:
    """The folder of its interpreter and commands; made where it is not there yet, in a minute."""
    return environment("peer", "Agent Lightning 0.3", REQUIREMENTS)


def environment(
    name: str,
    title: str,
    requirements: Sequence[str],
    python: Path = Path(sys.executable),
    date: str | None = None,
    made_with: str = "",
) -> Path:
    """Make an environment in `.cache` that has these requirements and nothing else, unless it is there already.

    What they need in turn has the versions of `tools/locks/NAME.txt`; without that file, those of the date; and the
    newest ones where `is_newest()` says so.

    Args:
        title: its name in what is printed.
        requirements: what `uv pip install` is given, options included.
        date: in ISO 8601; nothing that a package index got later is installed.
        made_with: besides all of this, the environment is made again when this text changes.

    Returns:
        The folder of its interpreter and commands.
    """
    lock = Lock(name)
    # A new environment has no lock before `make lock` has written one.
    if lock.path.exists() and not is_newest():
        limits, versions = ("--constraints", lock.path), lock.path.read_text()
    elif date is not None and not is_newest():
        limits, versions = ("--exclude-newer", date), date
    else:
        limits, versions = (), newest()
    folder = CHECKOUT / ".cache" / (f"{name}-newest" if is_newest() else name)
    wanted = "\n".join((sys.version, f"{python}", *requirements, versions, made_with))

    def install(log: Path) -> None:
        uv = (sys.executable, "-m", "uv")
        run(f"{title}: Python", [*uv, "venv", "--python", python, folder], log)
        into = ("--python", folder / "bin" / "python")
        run(f"{title}, and what it needs (a minute)", [*uv, "pip", "install", *into, *limits, *requirements], log)

    make_once(folder, wanted, install)
    return folder / "bin"


def make_once(folder: Path, wanted: str, install: Callable[[Path], None]) -> None:
    """Fill a folder, unless it was made with the same `wanted` before; whoever comes meanwhile waits.

    Args:
        install: fills the folder, which is not there then; it is given the file that the installers' output goes to.
    """
    note = folder / "is-there"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not `with_suffix`, which would take 3.12 for 3 with the suffix .12.
    log, making_of = folder.with_name(f"{folder.name}.log"), folder.with_name(f"{folder.name}.making")
    # Tests run in several processes, each of which may be the first to need it.
    with making_of.open("w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        if not note.exists() or note.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            log.unlink(missing_ok=True)
            install(log)
            note.write_text(wanted)


if __name__ == "__main__":
    say(f"{peer()}")
