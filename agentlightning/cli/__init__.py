"""The command `agl`: one module for each subcommand, imported when the subcommand is called.

Written without `argparse`, which takes longer to import than everything else here together. Until `main` is called,
Ctrl-C shows Python's traceback, so that nothing more than this is imported before.
"""

from __future__ import annotations

import sys

import agentlightning

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COMMANDS = {
    "vllm": ("agentlightning.cli.vllm", "run vLLM's own command line, with token ids in every answer"),
    "doctor": ("agentlightning.cli.doctor", "check that it is on, here or on a server, and if not, say why"),
    "export": ("agentlightning.cli.export", "write generations, triplets or trajectories to JSONL or Parquet files"),
    "drift": ("agentlightning.cli.drift", "say where prompts break the history of a conversation, and why"),
    "store": ("agentlightning.cli.store", "serve a store of rollouts, spans and generations over HTTP"),
    "migrate": ("agentlightning.cli.migrate", "store the prompts of an older version as what is new in each"),
    "prune": ("agentlightning.cli.prune", "delete old rollouts, and give their space back"),
    "agentops": ("agentlightning.cli.agentops_server", "serve a store that also takes what the AgentOps SDK sends"),
}
"""The module of each subcommand, which has `main(arguments) -> exit status`, and a description."""

USAGE = "usage: agl [-h] [--version] COMMAND ..."
TITLE = "Exact token ids from an unmodified vLLM."
OPTIONS = {
    "-h, --help": "show this help message and exit",
    "--version": "show program's version number and exit",
}
END = "agl COMMAND --help describes a command."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `agl` and return its exit status. `arguments` default to those of the process.

    Ctrl-C and SIGTERM end the process from here on: see `interruption`.
    """
    try:
        return _run(*((sys.argv[1:] if arguments is None else arguments) or ["--help"]))
    except KeyboardInterrupt as error:
        from agentlightning.cli import interruption

        interruption.end(*([error.number] if isinstance(error, interruption.Interrupted) else []))
        raise


def _run(command: str, *rest: str) -> int:
    if command in COMMANDS:
        from importlib import import_module

        from agentlightning.cli import interruption

        interruption.install(f"agl {command}")
        module, _ = COMMANDS[command]
        return import_module(module).main(rest)
    if command in ("-h", "--help"):
        sys.stdout.write("".join(f"{line}\n" for line in _help()))
        return 0
    if command == "--version":
        sys.stdout.write(f"agl {agentlightning.__version__}\n")
        return 0
    sys.stderr.write(f"agl: unknown command {command!r}; the commands are {', '.join(COMMANDS)}\nsee agl --help\n")
    return 2


def _help() -> Iterator[str]:
    """Make the help, wrapped to the terminal as that of the subcommands is."""
    import shutil
    import textwrap

    # argparse leaves as many columns free.
    width = shutil.get_terminal_size().columns - 2
    lists = {"options": OPTIONS, "commands": {name: description for name, (_, description) in COMMANDS.items()}}
    yield from (USAGE, "", *textwrap.wrap(TITLE, width))
    for title, entries in lists.items():
        yield from ("", f"{title}:")
        column = max(map(len, entries)) + 4
        for name, description in entries.items():
            first = f"  {name}".ljust(column)
            yield from textwrap.wrap(description, max(width, 40), initial_indent=first, subsequent_indent=" " * column)
    yield from ("", *textwrap.wrap(END, width))
