"""`agl export`: write generations, triplets or trajectories of a store to files."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any

from tqdm import tqdm

import agentlightning
from agentlightning import settings
from agentlightning.cli import destinations, formats, interruption, no_match, output_file
from agentlightning.cli.arguments import Parser, nanoseconds
from agentlightning.cli.formats import MissingPackage
from agentlightning.cli.output_file import STDOUT, CannotWrite
from agentlightning.errors import StoreError
from agentlightning.generation import STATUSES, VIAS
from agentlightning.store import Filters, Store, open_store
from agentlightning.store.filters import TripletFilters, nullable
from agentlightning.trajectory import DRIFTS, MergeOptions, check_options

DESCRIPTION = """\
Write recorded generations to a file, in the order in which they finished, or the triplets or trajectories of
rollouts."""
EPILOG = """\
Times are ISO 8601, local unless they have an offset: 2026-11-24, 2026-11-24T10:30, 2026-11-24T10:30:00Z. FILE appears
once it is complete, and only its owner can read it. On stderr it says how many it has written."""

OUTPUT_CLOSED = 128 + signal.SIGPIPE
WRITERS = {"jsonl": formats.write_jsonl, "parquet": formats.write_parquet}
OF_ROLLOUTS = ("rollout_id", "attempt_id", "since")
FILTERS: dict[str, tuple[str, ...]] = {
    "generations": (*Filters.__annotations__,),
    "triplets": (*OF_ROLLOUTS, *nullable(TripletFilters), "status", "min_reward", "weight_version"),
    "trajectories": (*OF_ROLLOUTS, *MergeOptions.__annotations__),
}
KINDS = {"generations": formats.GENERATIONS, "triplets": formats.TRIPLETS, "trajectories": formats.TRAJECTORIES}


def main(arguments: Sequence[str]) -> int:
    """Run `agl export` and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.store:
        parser.error("which store? Give --store, or set AGL_STORE")
    filters: Any = {
        name: value
        for names in FILTERS.values()
        for name in names
        if (value := getattr(options, name, None)) is not None
    }
    others = [
        f"--{name.removesuffix('_id').replace('_', '-')}" for name in filters if name not in FILTERS[options.what]
    ]
    if others:
        parser.error(f"{options.what} cannot be filtered by {', '.join(others)}")
    if options.what == "trajectories":
        try:
            check_options(filters)
        except ValueError as error:
            parser.error(str(error))
    if options.rows_per_file is not None and options.output == STDOUT:
        parser.error("--rows-per-file writes several files: name a folder with -o")
    if options.format == "parquet" and options.output == STDOUT and sys.stdout.isatty():
        parser.error("Parquet is binary, which a terminal cannot show: give -o FILE")
    try:
        if options.rows_per_file is not None:
            destinations.check_folder(options.output)
        elif destinations.is_object(options.output):
            destinations.check_object(options.output, options.force)
        else:
            output_file.check(options.output, options.force)
        if options.format == "parquet":
            formats.import_pyarrow()
        with open_store(options.store, read_only=True) as store, interruption.unwinding():
            said = _export(store, options, filters)
    except BrokenPipeError:
        # Python flushes stdout when it exits, and would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except (CannotWrite, MissingPackage, StoreError, OSError) as reason:
        sys.stderr.write(f"{parser.prog}: {reason}\n")
        return 1
    sys.stderr.write(f"{parser.prog}: {said}\n")
    return 0


def _export(store: Store, options: Any, filters: Any) -> str:
    """Write the records to one file, or to several, and say what is in them."""
    count = 0

    def write(file: IO[bytes], some: Iterator[Any]) -> None:
        nonlocal count
        count += WRITERS[options.format](file, some, KINDS[options.what])

    def opened(name: str) -> AbstractContextManager[IO[bytes]]:
        if destinations.is_object(name):
            return destinations.opened_object(name, options.force)
        return output_file.opened(name, options.force)

    found: Iterator[Any] = getattr(store, options.what)(**filters)
    total = _total(store, filters) if options.what == "generations" else None
    # None: no progress bar unless stderr is a terminal.
    without_bar = True if total == 0 else None
    with tqdm(found, total=total, unit=f" {options.what}", disable=without_bar) as records:
        if options.rows_per_file is not None:
            destinations.write_parts(
                options.output, options.format, options.rows_per_file, iter(records), opened, write
            )
        else:
            with opened(options.output) as file:
                write(file, iter(records))
    if not count:
        return no_match.explain(store, options.what, filters)
    return f"{options.what} written to {'stdout' if options.output == STDOUT else options.output}: {count}"


def _total(store: Store, filters: Filters) -> int:
    return sum(store.tally(**filters).values())


def _parser() -> Parser:
    parser = Parser(prog="agl export", description=DESCRIPTION, epilog=EPILOG)
    store = settings.read("AGL_STORE")
    parser.add_argument("--store", metavar="URL", default=store, help="the store to read (default: AGL_STORE)")
    what = "calls of vLLM, calls of rollouts with their rewards, or these merged to rows (default: %(default)s)"
    parser.add_argument("--what", choices=(*FILTERS,), default="generations", help=what)
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="(default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default=STDOUT,
        help="the file to write, or s3://BUCKET/KEY; - is stdout (default: -)",
    )
    parser.add_argument(
        "--rows-per-file", metavar="N", type=_positive, help="write files of so many rows into the folder FILE"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--rollout", metavar="ID", dest="rollout_id", help="only this rollout's")
    parser.add_argument("--attempt", metavar="ID", dest="attempt_id", help="only this attempt's")
    parser.add_argument("--session", metavar="ID", dest="session_id", help="only this session's")
    parser.add_argument("--agent", metavar="ID", dest="agent_id", help="only this agent's")
    parser.add_argument("--parent-agent", metavar="ID", dest="parent_agent_id", help="only those of its sub-agents")
    parser.add_argument("--purpose", metavar="TEXT", help="only those with this purpose: main, title, ...")
    parser.add_argument("--retry", metavar="N", type=int, help="only those that a client had tried N times before")
    parser.add_argument("--via", choices=VIAS, help="only those that came this way")
    parser.add_argument("--model", metavar="NAME", help="only this model's")
    parser.add_argument("--status", choices=STATUSES, help="only those with this status")
    parser.add_argument("--since", metavar="TIME", type=nanoseconds, help="only those that finished then or later")
    parser.add_argument("--until", metavar="TIME", type=nanoseconds, help="only those that finished before")
    rows = parser.add_argument_group("triplets and trajectories")
    rows.add_argument("--min-reward", metavar="R", type=float, help="only those with at least this reward")
    version = "only those of which every sampled id is known to be of this version of the weights"
    rows.add_argument("--weight-version", metavar="VERSION", help=version)
    merging = parser.add_argument_group("trajectories", "docs/trajectories.md explains them.")
    merging.add_argument("--drift", choices=DRIFTS, help="what becomes of a prompt that breaks its context")
    merging.add_argument("--drift-limit", metavar="N", type=int, help="most ids that --drift realign overwrites")
    staleness = "integer versions that are up to N smaller than --weight-version count, too"
    merging.add_argument("--max-staleness", metavar="N", type=int, help=staleness)
    complete = "only rows that are not aborted, truncated or cut, and miss no call"
    merging.add_argument("--complete", action="store_true", default=None, help=complete)
    merging.add_argument("--max-length", metavar="N", type=int, help="cut rows to so many ids")
    merging.add_argument("--max-prompt-length", metavar="N", type=int, help="leave out rows with a longer prompt")
    merging.add_argument("--max-response-length", metavar="N", type=int, help="cut what follows the prompt to N ids")
    parser.add_argument("--version", action="version", version=f"agl {agentlightning.__version__}")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
