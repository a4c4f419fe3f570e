"""`agl vllm ARGS...`: `AGL_INSTRUMENT=1 vllm ARGS...`, in the vLLM that this interpreter has.

The process becomes vLLM's: same process id, and from there on its arguments, signals and exit status are its own.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence

from agentlightning import settings
from agentlightning.doctor.presence import CLI_MODULE, what_is_missing


def main(arguments: Sequence[str]) -> int:
    """Turn into vLLM's command line; returns (with 1) only where there is none, after saying so."""
    missing = what_is_missing()
    if missing:
        sys.stderr.write(f"agl vllm: {missing}\n")
        return 1
    # Asked for by name: "off" in the environment is not what who types this wants, "strict" may be.
    if settings.read("AGL_INSTRUMENT") != "strict":
        os.environ["AGL_INSTRUMENT"] = "1"
    os.execv(sys.executable, [sys.executable, *_command(), *arguments])


def _command() -> list[str]:
    """How this interpreter runs vLLM's command line: by its own script, so that usage texts and `ps` say `vllm`."""
    script = os.path.join(sysconfig.get_path("scripts"), "vllm")
    if os.path.isfile(script):
        return [script]
    # As a script would, not -m: a folder called vllm in the working directory is not the one that was checked.
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    return [*safe_path, "-m", CLI_MODULE]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
