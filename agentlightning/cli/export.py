"""`agl export`: write generations or triplets of a store to a file."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from tqdm import tqdm

import agentlightning
from agentlightning import settings
from agentlightning.cli import formats, interruption, no_match, output_file
from agentlightning.cli.arguments import Parser
from agentlightning.cli.formats import MissingPackage
from agentlightning.cli.output_file import STDOUT, CannotWrite
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.generation import STATUSES
from agentlightning.store import Filters, Store, open_store

DESCRIPTION = "Write recorded generations to a file, in the order in which they finished, or the triplets of rollouts."
EPILOG = """\
Times are ISO 8601, local unless they have an offset: 2026-11-24, 2026-11-24T10:30, 2026-11-24T10:30:00Z. FILE appears
once it is complete, and only its owner can read it. On stderr it says how many it has written."""

OUTPUT_CLOSED = 128 + signal.SIGPIPE
WRITERS = {"jsonl": formats.write_jsonl, "parquet": formats.write_parquet}
FILTERS_OF_TRIPLETS = ("rollout_id", "attempt_id")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def main(arguments: Sequence[str]) -> int:
    """Run `agl export` and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.store:
        parser.error("which store? Give --store, or set AGL_STORE")
    filters: Any = {
        name: value for name in Filters.__annotations__ if (value := getattr(options, name, None)) is not None
    }
    others = [f"--{name.removesuffix('_id')}" for name in filters if name not in FILTERS_OF_TRIPLETS]
    if options.what == "triplets" and others:
        parser.error(f"triplets can be filtered by --rollout and --attempt only, not by {', '.join(others)}")
    if options.format == "parquet" and options.output == STDOUT and sys.stdout.isatty():
        parser.error("Parquet is binary, which a terminal cannot show: give -o FILE")
    try:
        output_file.check(options.output, options.force)
        if options.format == "parquet":
            formats.import_pyarrow()
        with open_store(options.store, read_only=True) as store, interruption.unwinding():
            found = _export(store, options, filters)
    except BrokenPipeError:
        # Python flushes stdout when it exits, and would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except (CannotWrite, MissingPackage, StoreRefused, StoreUnavailable) as reason:
        sys.stderr.write(f"{parser.prog}: {reason}\n")
        return 1
    sys.stderr.write(f"{parser.prog}: {found}\n")
    return 0


def _export(store: Store, options: Any, filters: Any) -> str:
    """Write the file, and say what is in it."""
    with output_file.opened(options.output, options.force) as file:
        if options.what == "triplets":
            kind, found, total = formats.TRIPLETS, store.triplets(**filters), None
        else:
            kind, found, total = formats.GENERATIONS, store.generations(**filters), _total(store, filters)
        # None: no progress bar unless stderr is a terminal.
        without_bar = True if total == 0 else None
        with tqdm(found, total=total, unit=f" {options.what}", disable=without_bar) as records:
            count = WRITERS[options.format](file, iter(records), kind)
    if not count:
        return no_match.explain(store, options.what, filters)
    return f"{options.what} written to {'stdout' if options.output == STDOUT else options.output}: {count}"


def _total(store: Store, filters: Filters) -> int:
    return sum(store.tally(**filters).values())


def _parser() -> Parser:
    parser = Parser(prog="agl export", description=DESCRIPTION, epilog=EPILOG)
    store = settings.read("AGL_STORE")
    parser.add_argument("--store", metavar="URL", default=store, help="the store to read (default: AGL_STORE)")
    what = "calls of vLLM, or calls of rollouts with their rewards (default: %(default)s)"
    parser.add_argument("--what", choices=("generations", "triplets"), default="generations", help=what)
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="(default: %(default)s)")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=STDOUT, help="the file to write; - is stdout (default: -)"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--rollout", metavar="ID", dest="rollout_id", help="only this rollout's")
    parser.add_argument("--attempt", metavar="ID", dest="attempt_id", help="only this attempt's")
    parser.add_argument("--session", metavar="ID", dest="session_id", help="only this session's")
    parser.add_argument("--model", metavar="NAME", help="only this model's")
    parser.add_argument("--status", choices=STATUSES, help="only those with this status")
    parser.add_argument("--since", metavar="TIME", type=_nanoseconds, help="only those that finished then or later")
    parser.add_argument("--until", metavar="TIME", type=_nanoseconds, help="only those that finished before")
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")
    return parser


def _nanoseconds(text: str) -> int:
    """Convert a time to nanoseconds since the epoch."""
    try:
        return (_parsed(text).astimezone() - EPOCH) // timedelta(microseconds=1) * 1_000
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write it like 2026-11-24T10:30") from error


def _parsed(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        # Before Python 3.11 it reads neither Z nor 24.5 s. pydantic reads both, but takes a bare number as seconds.
        if not _DATE.match(text):
            raise
        from pydantic import TypeAdapter

        return TypeAdapter(datetime).validate_python(text)
