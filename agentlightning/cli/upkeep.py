"""Shared parts of `agl migrate` and `agl prune`, which work on the database of a store beside its servers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from typing import Any

import agentlightning
from agentlightning import settings
from agentlightning.cli import interruption
from agentlightning.errors import RolloutUnderWay, StoreRefused, StoreUnavailable
from agentlightning.store import open_database
from agentlightning.store.database import Database, NotMigrated

__all__ = ["add_options", "human_bytes", "run"]

PATIENCE = 30.0
"""Seconds to wait for writers: nothing waits for this program."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that both commands have."""
    store = settings.read("AGL_STORE")
    about = "the path of a SQLite file, or postgresql://... (default: AGL_STORE)"
    parser.add_argument("--store", metavar="URL", default=store, help=about)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")


def run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    work: Callable[[Database], tuple[Mapping[str, Any], str]],
    *,
    read_only: bool = False,
) -> int:
    """Work on the database, print the result, and return the exit status.

    Args:
        work: returns the result as JSON and as a text.
        read_only: change nothing, not even the tables of an older version.
    """
    program = parser.prog
    if not options.store:
        parser.error("which store? Give --store, or set AGL_STORE")
    if options.store.startswith(("http://", "https://")):
        sys.stderr.write(
            f"{program}: {settings.without_secrets(options.store)} is an agl store, and this works on the database "
            "behind it: run it on the store's own host, with the file or the postgresql:// URL that the store has\n"
        )
        return 1
    interruption.install(program, "interrupted; the store is whole, and the same command goes on from here")
    try:
        with closing(_open(options.store, read_only)) as database, interruption.unwinding():
            found, text = work(database)
    except (RolloutUnderWay, StoreRefused, StoreUnavailable) as reason:
        sys.stderr.write(f"{program}: {reason}\n")
        return 1
    sys.stdout.write(f"{json.dumps(found) if options.json else text}\n")
    return 0


def _open(url: str, read_only: bool) -> Database:
    """Open a store, but create none."""
    if read_only:
        return open_database(url, read_only=True, patience=PATIENCE)
    with suppress(NotMigrated):
        open_database(url, read_only=True, patience=PATIENCE).close()
    return open_database(url, patience=PATIENCE)


def human_bytes(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
