"""`agl vllm ARGS...`: `AGL_INSTRUMENT=1 vllm ARGS...`, with the vLLM of this interpreter.

The process becomes vLLM: it keeps its process id, and arguments, signals and exit status are vLLM's.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence

from agentlightning import settings
from agentlightning.doctor.vllm import CLI_MODULE, missing_vllm


def main(arguments: Sequence[str]) -> int:
    """Become vLLM's command line. Return, with 1, only if there is no vLLM, after a message."""
    missing = missing_vllm()
    if missing:
        sys.stderr.write(f"agl vllm: {missing}\n")
        return 1
    # The command asks for instrumentation by name, so it overrides "off" in the environment. "strict" stays.
    if settings.read("AGL_INSTRUMENT") != "strict":
        os.environ["AGL_INSTRUMENT"] = "1"
    os.execv(sys.executable, [sys.executable, *_command(), *arguments])


def _command() -> list[str]:
    """Return the arguments that run vLLM's command line: its own script, so that usage texts and `ps` say `vllm`."""
    script = os.path.join(sysconfig.get_path("scripts"), "vllm")
    if os.path.isfile(script):
        return [script]
    # Like a script, without the working directory on the path: a folder called vllm there is not the checked vLLM.
    safe_path = ["-P"] if sys.version_info >= (3, 11) else []
    return [*safe_path, "-m", CLI_MODULE]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
