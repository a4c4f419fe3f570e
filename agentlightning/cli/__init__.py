"""The command `agl`: one module a subcommand, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import agentlightning

COMMANDS = {
    "vllm": ("agentlightning.cli.vllm", "run vLLM's own command line, with token ids in every answer"),
    "doctor": ("agentlightning.cli.doctor", "say whether it is on, here or on a server, and if not, why"),
    "store": (None, "keep rollouts, spans and generations, over HTTP"),
    "agentops": (None, "keep what the AgentOps SDK sends"),
}
"""Each subcommand's module, which has `main(arguments) -> exit status`, and what it does. No module: not there yet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `agl`. `arguments` default to the process's own; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Not left to argparse: it would answer --help, and swallow a --, that are meant for the subcommand.
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        module, _ = COMMANDS[name]
        if module is None:
            sys.stderr.write(f"agl {name}: not in version {agentlightning.__version__} yet\n")
            return 1
        return importlib.import_module(module).main(rest)
    parser = _parser()
    parser.parse_args(arguments)
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(
        f"  {name:<{width}}  {description}{'' if module else ' (not there yet)'}"
        for name, (module, description) in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="agl",
        usage="agl [-h] [--version] COMMAND ...",
        description="Exact token ids from an unmodified vLLM.",
        epilog=f"commands:\n{commands}\n\nagl COMMAND --help tells about a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    return parser
