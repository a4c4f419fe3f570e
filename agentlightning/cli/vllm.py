"""`agl vllm ARGS...`: `AGL_INSTRUMENT=1 vllm ARGS...`, in the vLLM that this interpreter has.

The process becomes vLLM's: same process id, and from there on its arguments, signals and exit status are its own.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence

from agentlightning import settings
from agentlightning.modules import locate

CLI_MODULE = "vllm.entrypoints.cli.main"


def main(arguments: Sequence[str]) -> int:
    """Turn into vLLM's command line; returns (with 1) only where there is none, after saying so."""
    missing = _what_is_missing()
    if missing:
        sys.stderr.write(f"agl vllm: {missing}\n")
        return 1
    # Asked for by name: "off" in the environment is not what who types this wants, "strict" may be.
    if settings.read("AGL_INSTRUMENT") != "strict":
        os.environ["AGL_INSTRUMENT"] = "1"
    os.execv(sys.executable, [sys.executable, *_command(), *arguments])


def _what_is_missing() -> str | None:
    """One sentence where this interpreter has no vLLM that could run. Imports nothing of vLLM's."""
    vllm = locate("vllm")
    if vllm is None:
        return f"vLLM is not installed for {sys.executable}; install it with: {sys.executable} -m pip install vllm"
    # A folder that an uninstall left behind has no __init__.py, and so no origin.
    if vllm.origin is None or locate(CLI_MODULE) is None:
        where = vllm.origin or ", ".join(vllm.submodule_search_locations or ())
        return (
            f"the vLLM at {where} is incomplete, it cannot run {CLI_MODULE}; install it again with: "
            f"{sys.executable} -m pip install --force-reinstall vllm"
        )
    return None


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
