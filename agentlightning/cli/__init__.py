"""The command `agl`: one module for each subcommand, imported when the subcommand is called.

Written without `argparse`, which takes longer to import than everything else here together.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import agentlightning

COMMANDS = {
    "vllm": ("agentlightning.cli.vllm", "run vLLM's own command line, with token ids in every answer"),
    "doctor": ("agentlightning.cli.doctor", "check that it is on, here or on a server, and if not, say why"),
    "export": ("agentlightning.cli.export", "write recorded generations or triplets to a JSONL or Parquet file"),
    "store": ("agentlightning.cli.store", "serve a store of rollouts, spans and generations over HTTP"),
    "migrate": ("agentlightning.cli.migrate", "store the prompts of an older version as what is new in each"),
    "prune": ("agentlightning.cli.prune", "delete old rollouts, and give their space back"),
    "agentops": ("agentlightning.cli.agentops_server", "serve a store that also takes what the AgentOps SDK sends"),
}
"""The module of each subcommand, which has `main(arguments) -> exit status`, and a description."""

USAGE = "usage: agl [-h] [--version] COMMAND ...\n"
HELP = """{usage}
Exact token ids from an unmodified vLLM.

options:
  -h, --help  show this help message and exit
  --version   show program's version number and exit

commands:
{commands}

agl COMMAND --help describes a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `agl` and return its exit status. `arguments` default to those of the process."""
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
    sys.stderr.write(f"{USAGE}agl: error: unknown command {command!r}; the commands are {', '.join(COMMANDS)}\n")
    return 2


def _lines() -> list[str]:
    width = max(map(len, COMMANDS))
    return [f"  {name:<{width}}  {description}" for name, (_, description) in COMMANDS.items()]
