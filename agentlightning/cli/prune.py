"""`agl prune`: delete rollouts that have ended, and what nothing refers to any more."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from tqdm import tqdm

from agentlightning.cli.arguments import Parser
from agentlightning.cli.upkeep import add_options, existing_database, human_bytes, is_served, run
from agentlightning.rollout_records import FINISHED, Pruned
from agentlightning.store import Store, open_store
from agentlightning.store.database_store import DatabaseStore
from agentlightning.store.deletion import ESTIMATED

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
    return run(parser, options, lambda: _prune(options))


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
        help="then write the whole database anew, which keeps writers out until it is done (PostgreSQL: readers, too); "
        "not over HTTP",
    )
    add_options(parser, "the path of a SQLite file, postgresql://..., or the URL of an agl store")
    return parser


def _age(text: str) -> float:
    """Convert an age to seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age; write it like 90s, 30m, 12h, 7d or 2w")
    return float(found[1]) * SECONDS[found[2]]


def _prune(options: argparse.Namespace) -> tuple[dict[str, object], str]:
    if is_served(options.store) and not options.vacuum:
        with open_store(options.store) as store:
            done = _done(store, options)
    else:
        with closing(existing_database(options.store, read_only=options.dry_run)) as database:
            done = _done(DatabaseStore(database), options)
            if options.vacuum and not options.dry_run:
                database.rewrite()
                done = replace(done, size_after=database.size(), advice=None)
    if options.dry_run:
        told = {kind: done.records[kind] for kind in ESTIMATED}
        text = f"Would delete {_listed(told)}: about {human_bytes(done.bytes)} come back."
        return {"dry_run": True, **told, "bytes": done.bytes}, text
    sizes = f"the store took {human_bytes(done.size_before or 0)}, and takes {human_bytes(done.size_after or 0)}"
    text = f"Deleted {_listed(done.records)}; {sizes}."
    if done.advice is not None:
        text += f"\n{done.advice[0].upper()}{done.advice[1:]}."
    about = {name: getattr(done, name) for name in ("bytes", "size_before", "size_after", "advice")}
    return {"dry_run": False, **done.records, **about}, text


def _done(store: Store, options: argparse.Namespace) -> Pruned:
    """Prune, with a bar that shows how far it is."""
    done = Pruned(0)
    # disable=None: no progress bar unless stderr is a terminal.
    with tqdm(unit=" rollouts", disable=None) as bar:
        for done in store.prune(
            rollout_ids=options.rollout,
            status_in=options.status,
            older_than=options.older_than,
            dry_run=options.dry_run,
        ):
            bar.total = done.selected
            bar.update(done.records.get("rollouts", 0) - bar.n)
            if done.records and bar.n == done.selected:
                bar.set_description("looking for what nothing refers to")
    return done


def _listed(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counted.items() if count) or "nothing"
