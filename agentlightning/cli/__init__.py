"""The command `agl`: one module a subcommand, imported when it is called.

Written without `argparse`, which takes longer to import than all else here together.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import agentlightning

COMMANDS = {
    "vllm": ("agentlightning.cli.vllm", "run vLLM's own command line, with token ids in every answer"),
    "doctor": ("agentlightning.cli.doctor", "say whether it is on, here or on a server, and if not, why"),
    "export": ("agentlightning.cli.export", "write recorded generations or triplets to a JSONL or Parquet file"),
    "store": ("agentlightning.cli.store", "keep rollouts, spans and generations, over HTTP"),
    "agentops": ("agentlightning.cli.agentops_server", "keep what the AgentOps SDK sends"),
}
"""Each subcommand's module, which has `main(arguments) -> exit status`, and what it does."""

USAGE = "usage: agl [-h] [--version] COMMAND ...\n"
HELP = """{usage}
Exact token ids from an unmodified vLLM.

options:
  -h, --help  show this help message and exit
  --version   show program's version number and exit

commands:
{commands}

agl COMMAND --help tells about a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `agl`. `arguments` default to the process's own; returns the exit status."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in COMMANDS:
        module, _ = COMMANDS[command]
        return importlib.import_module(module).main(rest)
    if command in ("-h", "--help"):
        sys.stdout.write(HELP.format(usage=USAGE, commands="\n".join(_lines())))
        return 0
    if command == "--version":
        sys.stdout.write(f"agl {agentlightning.__version__}\n")
        return 0
    sys.stderr.write(f"{USAGE}agl: error: there is no {command!r}; the commands are {', '.join(COMMANDS)}\n")
    return 2


def _lines() -> list[str]:
    width = max(map(len, COMMANDS))
    return [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
