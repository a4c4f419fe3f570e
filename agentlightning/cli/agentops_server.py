"""`agl agentops`: `agl store --agentops` where the AgentOps SDK is what sends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from agentlightning.cli import daemon
from agentlightning.cli.serving import Serving, add_options, key_of, serve

DESCRIPTION = """\
Keep what the AgentOps SDK sends: sessions, model calls and tool calls, each model call with the token ids that vLLM
has recorded for it. It is `agl store` with what that SDK calls beside all else: `agl store --agentops` is the same.
"""
EPILOG = """\
It prints what to set where the agent runs. With a key (--api-key, or AGL_STORE_KEY) only that key gets a token;
without one, any key does. On SIGTERM it finishes open requests, for at most ten seconds, and exits."""

PORT = 8002
PID_FILE = "agl-agentops.pid"
ANY_KEY = "agl"
# Where it is not set, a shell says so, and sets nothing.
KEY = '"${AGL_STORE_KEY:?is the key of the store}"'


def main(arguments: Sequence[str]) -> int:
    """Run `agl agentops`; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.stop:
        return daemon.stop(parser.prog, options.pid_file)
    key = key_of(parser, options)

    def run(say: Callable[[str], None]) -> int:
        return serve(parser.prog, options, key, agentops=True, is_up=lambda serving: say(exports(serving)))

    if options.daemon:
        return daemon.start(parser.prog, options.pid_file, run)
    return run(_print)


def exports(serving: Serving) -> str:
    """What to paste into a shell. A key is not in it: whoever reads this may be somebody else."""
    variables = {
        "AGENTOPS_API_KEY": ANY_KEY if serving.key is None else KEY,
        "AGENTOPS_API_ENDPOINT": serving.url,
        "AGENTOPS_EXPORTER_ENDPOINT": f"{serving.url}/v1/traces",
        "AGENTOPS_APP_URL": serving.url,
    }
    return "".join(f"export {name}={value}\n" for name, value in variables.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agl agentops",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, PORT)
    parser.add_argument("--daemon", action="store_true", help="return when it answers, and leave it running")
    parser.add_argument("--stop", action="store_true", help="end the one that --daemon has left running")
    parser.add_argument(
        "--pid-file",
        metavar="FILE",
        type=Path,
        default=Path(PID_FILE),
        help="where --daemon writes its process id and --stop reads it; the log is beside it (default: %(default)s)",
    )
    return parser


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
