"""`agl migrate`: cut prompts that an older version stored whole into shared blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing

from tqdm import tqdm

from agentlightning.cli.arguments import Parser
from agentlightning.cli.upkeep import add_options, existing_database, human_bytes, run
from agentlightning.store import migration
from agentlightning.store.database import Database

__all__ = ["main"]

DESCRIPTION = """\
Store prompts that an older version wrote whole as blocks that they share with other prompts, as new ones are stored."""
EPILOG = """\
Servers may go on reading and writing: each step is a short transaction. It may be stopped at any time; the next run
continues. A store without such prompts is left unchanged."""


def main(arguments: Sequence[str]) -> int:
    """Run `agl migrate` and return its exit status."""
    parser = Parser(prog="agl migrate", description=DESCRIPTION, epilog=EPILOG)
    add_options(parser, "the path of a SQLite file, or postgresql://...")
    options = parser.parse_args(arguments)

    def work() -> tuple[dict[str, object], str]:
        with closing(existing_database(options.store)) as database:
            return _migrate(database)

    return run(parser, options, work)


def _migrate(database: Database) -> tuple[dict[str, object], str]:
    before = database.size()
    migrated = 0
    # disable=None: no progress bar unless stderr is a terminal.
    with tqdm(total=migration.count(database), unit=" generations", disable=None) as bar:
        for step in migration.migrate(database):
            migrated += step.migrated
            bar.update(step.seen)
    if migrated:
        for _ in database.shrink():
            time.sleep(migration.SECONDS_BETWEEN)
    after, advice = database.size(), database.space_advice()
    found = {"migrated": migrated, "size_before": before, "size_after": after, "advice": advice if migrated else None}
    if not migrated:
        return found, "No prompt is stored whole that could be shared: nothing to do."
    text = f"{migrated} generations migrated; the store took {human_bytes(before)}, and takes {human_bytes(after)}."
    return found, text if advice is None else f"{text}\n{advice[0].upper()}{advice[1:]}."
