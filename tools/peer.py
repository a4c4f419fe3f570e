"""Agent Lightning 0.3, in an environment of its own: it is imported by our name, so the two meet over HTTP alone.

`python -m tools.peer` makes it in `.cache/peer`, once; with OpenTelemetry 1.38, the last one that it works with, and
with schemathesis, which asks for other versions of what vLLM has, too.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tools.make_env import CHECKOUT, run, say

__all__ = ["peer"]

FOLDER = CHECKOUT / ".cache" / "peer"
# All are named exactly: what they find wrong is to change with this project, and with nothing else.
REQUIREMENTS = (
    "agentlightning==0.3.0",
    "opentelemetry-exporter-otlp-proto-http==1.38.*",
    "opentelemetry-sdk==1.38.*",
    "schemathesis==4.32.5",
)


def peer() -> Path:
    """The folder of its interpreter and commands; made where it is not there yet, in a minute."""
    wanted = "\n".join((sys.version, *REQUIREMENTS))
    note = FOLDER / "is-there"
    if not note.exists() or note.read_text() != wanted:
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.parent.mkdir(exist_ok=True)
        log = FOLDER.with_suffix(".log")
        log.unlink(missing_ok=True)
        uv = (sys.executable, "-m", "uv")
        run("Agent Lightning 0.3: Python", [*uv, "venv", "--python", sys.executable, FOLDER], log)
        install = [*uv, "pip", "install", "--python", FOLDER / "bin" / "python", *REQUIREMENTS]
        run("Agent Lightning 0.3, and what it needs (a minute)", install, log)
        note.write_text(wanted)
    return FOLDER / "bin"


if __name__ == "__main__":
    say(f"{peer()}")
