"""Shared parts of `agl migrate` and `agl prune`, which work on a store beside its servers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import agentlightning
from agentlightning import settings
from agentlightning.cli import interruption
from agentlightning.errors import StoreError, StoreRefused
from agentlightning.store import open_database
from agentlightning.store.database import Database, NotMigrated

__all__ = ["add_options", "existing_database", "human_bytes", "is_served", "run"]

PATIENCE = 30.0
"""Seconds to wait for writers: nothing waits for this program."""


def add_options(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the options that both commands have.

    Args:
        about: the kinds of stores.
    """
    store = settings.read("AGL_STORE")
    about = f"{about} (default: AGL_STORE)"
    parser.add_argument("--store", metavar="URL", default=store, help=about)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")


def run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    work: Callable[[], tuple[Mapping[str, Any], str]],
) -> int:
    """Work on the store, print the result, and return the exit status.

    Args:
        work: returns the result as JSON and as a text.
    """
    program = parser.prog
    if not options.store:
        parser.error("which store? Give --store, or set AGL_STORE")
    interruption.install(program, "interrupted; the store is whole, and the same command goes on from here")
    try:
        with interruption.unwinding():
            found, text = work()
    except StoreError as reason:
        sys.stderr.write(f"{program}: {reason}\n")
        return 1
    sys.stdout.write(f"{json.dumps(found) if options.json else text}\n")
    return 0


def is_served(url: str) -> bool:
    """Tell whether the store is an `agl store`, over HTTP."""
    return url.startswith(("http://", "https://"))


def existing_database(url: str, *, read_only: bool = False) -> Database:
    """Open the database of a store, but create none.

    Args:
        read_only: change nothing, not even the tables of an older version.

    Raises:
        StoreRefused: it is an `agl store`, over HTTP.
    """
    if is_served(url):
        raise StoreRefused(
            f"{settings.without_secrets(url)} is an agl store, and this works on the database behind it",
            "run it on the store's own host, with the file or the postgresql:// URL that the store has",
        )
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
