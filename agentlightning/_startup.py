"""All that the `.pth` file runs.

It runs in every interpreter of the environment, mostly ones that never see vLLM, so it arms one name and
imports nothing that is not loaded already; the instrumentation itself is imported when vLLM is.
"""


def start() -> None:
    """Arm this interpreter if `AGL_INSTRUMENT` asks for it: when vLLM is imported, it is patched.

    Idempotent, since CPython 3.10 to 3.13 run every `.pth` twice in a venv (cpython issue 75723). Raises
    nothing, since a `SystemExit` that leaves a `.pth` ends the interpreter: what goes wrong is one line on stderr.
    """
    try:
        from agentlightning import settings

        # A value that is none of the known ones arms too: it is warned of where vLLM is imported,
        # rather than in every Python process of the environment.
        if settings.read("AGL_INSTRUMENT") not in settings.INSTRUMENT_OFF:
            from agentlightning.importhook import when_imported

            when_imported("vllm", instrument)
    except BaseException as error:
        _say(f"not armed: {error!r}")


def instrument(vllm: object) -> None:
    """Patch the vLLM that has just been imported; called by the import hook, which contains and logs what fails."""
    from agentlightning import settings

    if settings.instrument() != "off":
        from agentlightning.instrumentation import arm_all

        arm_all()


def _say(message: str) -> None:
    import sys

    if sys.stderr is not None:
        sys.stderr.write(f"agentlightning: {message}\n")
