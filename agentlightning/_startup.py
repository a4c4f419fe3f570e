"""All that the `.pth` file runs.

It runs in every interpreter of the environment, mostly ones that never see vLLM: it imports the import hook alone, and
that imports nothing. The instrumentation comes when vLLM does.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from agentlightning.importhook import ImportHook

INSTRUMENT_OFF = ("", "0", "false", "off", "no")
"""The values of `AGL_INSTRUMENT`, in lower case and without outer white space, that leave everything off."""


_hook: "ImportHook | None" = None


def start() -> None:
    """Arm this interpreter if `AGL_INSTRUMENT` asks for it: when vLLM is imported, it is patched.

    Idempotent, since CPython 3.10 to 3.13 run every `.pth` twice in a venv (cpython issue 75723). Raises nothing, since
    a `SystemExit` that leaves a `.pth` ends the interpreter: what goes wrong is one line on stderr.
    """
    global _hook
    try:
        # A value that is none of the known ones arms too: it is warned of where vLLM is imported, rather than in every
        # Python process of the environment.
        if os.environ.get("AGL_INSTRUMENT", "").strip().lower() not in INSTRUMENT_OFF:
            from agentlightning.importhook import when_imported

            _hook = when_imported("vllm", instrument)
    except BaseException as error:
        _say(f"not armed: {error!r}")


def stop() -> None:
    """Take back what `start` did: a vLLM that is imported from now on is not patched. Idempotent."""
    if _hook is not None:
        _hook.remove()


def instrument(vllm: "ModuleType") -> None:
    """Patch the vLLM that has just been imported; the import hook that calls this contains and logs what fails."""
    from agentlightning import settings

    if settings.instrument() != "off":
        from agentlightning.instrumentation import arm_all

        arm_all()


def _say(message: str) -> None:
    try:
        sys.stderr.write(f"agentlightning: {' '.join(message.split())}\n")
    except Exception:
        return  # No stderr, or none that can be written to: there is nobody to tell.
