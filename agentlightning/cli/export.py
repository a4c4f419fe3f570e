"""`agl export`: write generations or triplets of a store to a file."""

from __future__ import annotations

import argparse
import os
import re
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

import agentlightning
from agentlightning import settings
from agentlightning.cli import formats
from agentlightning.cli.formats import MissingPackage
from agentlightning.errors import StoreRefused, StoreUnavailable
from agentlightning.generation import STATUSES
from agentlightning.store import Filters, Store, open_store

DESCRIPTION = "Write recorded generations to a file, in the order in which they finished, or the triplets of rollouts."
EPILOG = """\
Times are ISO 8601, local unless they have an offset: 2026-11-24, 2026-11-24T10:30, 2026-11-24T10:30:00Z. FILE appears
once it is complete, and only its owner can read it."""

INTERRUPTED = 128 + signal.SIGINT
OUTPUT_CLOSED = 128 + signal.SIGPIPE
WRITERS = {"jsonl": formats.write_jsonl, "parquet": formats.write_parquet}
FILTERS_OF_TRIPLETS = ("rollout_id", "attempt_id")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def main(arguments: Sequence[str]) -> int:
    """Run `agl export` and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    filters: Any = {
        name: value for name in Filters.__annotations__ if (value := getattr(options, name, None)) is not None
    }
    others = [f"--{name.removesuffix('_id')}" for name in filters if name not in FILTERS_OF_TRIPLETS]
    if options.what == "triplets" and others:
        parser.error(f"triplets can be filtered by --rollout and --attempt only, not by {', '.join(others)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with open_store(options.store, read_only=True) as store, _output(options.output) as file:
            if options.what == "triplets":
                kind, found, total = formats.TRIPLETS, store.triplets(**filters), None
            else:
                kind, found, total = formats.GENERATIONS, store.generations(**filters), _total(store, filters)
            # disable=None: no progress bar unless stderr is a terminal.
            with tqdm(found, total=total, unit=f" {options.what}", disable=None) as records:
                WRITERS[options.format](file, iter(records), kind)
    except BrokenPipeError:
        # Python flushes stdout when it exits, and would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (MissingPackage, StoreRefused, StoreUnavailable, OSError) as reason:
        sys.stderr.write(f"agl export: {reason}\n")
        return 1
    return 0


def _total(store: Store, filters: Filters) -> int:
    return sum(store.tally(**filters).values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agl export", description=DESCRIPTION, epilog=EPILOG)
    store = settings.read("AGL_STORE")
    parser.add_argument(
        "--store", metavar="URL", default=store, required=not store, help="the store to read (default: AGL_STORE)"
    )
    what = "calls of vLLM, or calls of rollouts with their rewards (default: %(default)s)"
    parser.add_argument("--what", choices=("generations", "triplets"), default="generations", help=what)
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="(default: %(default)s)")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="-", help="the file to write; - is stdout (default: -)"
    )
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


@contextmanager
def _output(name: str) -> Iterator[IO[bytes]]:
    """Open the output. A file gets its name, and replaces an older one, when the block ends without an error."""
    if name == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(name).resolve()
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        # A pipe or a device cannot be replaced.
        with path.open("wb") as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            raise
