"""`agl prune`: delete rollouts that have ended, and what nothing refers to any more."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence

from tqdm import tqdm

from agentlightning.cli.arguments import Parser
from agentlightning.cli.upkeep import add_options, human_bytes, run
from agentlightning.rollout_records import FINISHED
from agentlightning.store import deletion
from agentlightning.store.database import Database

__all__ = ["main"]

DESCRIPTION = """\
Delete rollouts that have ended, with their attempts, spans and generations, and the blocks of prompts, texts and
vocabularies that nothing refers to any more. The space goes back to the file system."""
EPILOG = """\
A rollout is deleted if it matches all options that are given; without any, only what nothing refers to is deleted. With
--older-than alone, also rollouts that were recorded but never created, and calls and spans that name no rollout, if
they are older. Servers may go on reading and writing: each step is a short transaction. It may be stopped at any time;
the same command continues."""

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def main(arguments: Sequence[str]) -> int:
    """Run `agl prune` and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return run(parser, options, lambda database: _prune(database, options), read_only=options.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="agl prune", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--older-than", metavar="AGE", type=_age, help="only those that ended longer ago, such as 7d")
    parser.add_argument("--rollout", metavar="ID", action="append", help="only this rollout; may be repeated")
    parser.add_argument(
        "--status", choices=FINISHED, action="append", help="only those that ended with this; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    parser.add_argument(
        "--vacuum",
        action="store_true",
        help="then write the whole database anew, which keeps writers out until it is done (PostgreSQL: readers, too)",
    )
    add_options(parser)
    return parser


def _age(text: str) -> float:
    """Convert an age to seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write it like 90s, 30m, 12h, 7d or 2w")
    return float(found[1]) * SECONDS[found[2]]


def _prune(database: Database, options: argparse.Namespace) -> tuple[dict[str, object], str]:
    before = None if options.older_than is None else time.time() - options.older_than
    found = deletion.Selection(())
    if before is not None or options.rollout is not None or options.status is not None:
        found = deletion.select(database, rollout_ids=options.rollout, statuses=options.status, before=before)
    if options.dry_run:
        counted = deletion.estimate(database, found)
        told = {kind: counted[kind] for kind in deletion.ESTIMATED}
        text = f"Would delete {_listed(told)}: about {human_bytes(counted['bytes'])} come back."
        return {"dry_run": True, **told, "bytes": counted["bytes"]}, text
    size_before = database.size()
    deleted = Counter[str]()
    # disable=None: no progress bar unless stderr is a terminal.
    with tqdm(total=len(found.rollout_ids), unit=" rollouts", disable=None) as bar:
        for some in deletion.delete(database, found):
            deleted.update(some)
            bar.update(some["rollouts"])
    with tqdm(unit=" steps", desc="looking for what nothing refers to", disable=None) as bar:
        for some in deletion.finish(database):
            deleted.update(some)
            bar.update()
    if options.vacuum:
        database.rewrite()
    told = {kind: deleted[kind] for kind in deletion.KINDS}
    size_after = database.size()
    advice = None if options.vacuum else database.space_advice()
    result = {
        "dry_run": False,
        **told,
        "bytes": deleted["bytes"],
        "size_before": size_before,
        "size_after": size_after,
        "advice": advice,
    }
    sizes = f"the store took {human_bytes(size_before)}, and takes {human_bytes(size_after)}"
    text = f"Deleted {_listed(told)}; {sizes}."
    return result, text if advice is None else f"{text}\n{advice[0].upper()}{advice[1:]}."


def _listed(counted: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counted.items() if count) or "nothing"
