"""`agl agentops`: `agl store --agentops` on a port of its own, in the foreground or as a daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from agentlightning.cli import daemon
from agentlightning.cli.arguments import Parser
from agentlightning.cli.serving import add_options, key_of, serve

DESCRIPTION = """\
Keep what the AgentOps SDK sends: sessions, model calls and tool calls, each model call with the token ids that vLLM
recorded for it. It is `agl store --agentops` on another port."""
EPILOG = """\
It prints the variables to set where the agent runs. With a key (--api-key, or AGL_STORE_KEY) it accepts only that key
from the SDK; without one, any key. On SIGTERM it finishes open requests, for at most ten seconds, and exits."""

PORT = 8002
PID_FILE = "agl-agentops.pid"


def main(arguments: Sequence[str]) -> int:
    """Run `agl agentops` and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.stop:
        return daemon.stop(parser.prog, options.pid_file)
    key = key_of(parser, options)

    def run(announce: Callable[[str], None]) -> int:
        return serve(parser.prog, options, key, agentops=True, announce=announce)

    if options.daemon:
        return daemon.start(parser.prog, options.pid_file, run)
    return serve(parser.prog, options, key, agentops=True)


def _parser() -> Parser:
    parser = Parser(prog="agl agentops", description=DESCRIPTION, epilog=EPILOG)
    add_options(parser, PORT)
    parser.add_argument("--daemon", action="store_true", help="run in the background; return once the server answers")
    parser.add_argument("--stop", action="store_true", help="stop the server that --daemon started")
    parser.add_argument(
        "--pid-file",
        metavar="FILE",
        type=Path,
        default=Path(PID_FILE),
        help="the file with the process id of --daemon, beside its log (default: %(default)s)",
    )
    return parser
