"""Run as a trainer: reads groups, and saves what it has trained together with the reader's state.

It says what it is about to do, and waits for a line: so it can be killed there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import agentlightning as agl
from agentlightning.trainers.groups import GroupReader


def pause(what: str, number: int) -> None:
    sys.stdout.write(f"{what} {number}\n")
    sys.stdout.flush()
    sys.stdin.readline()


def main(path: str, checkpoint: Path) -> None:
    saved: dict[str, Any] = (
        json.loads(checkpoint.read_text()) if checkpoint.exists() else {"trained": [], "state": None}
    )
    trained = saved["trained"]
    with agl.open_store(path) as store:
        reader, number = GroupReader(store, 2, saved["state"]), 0
        while True:
            pause("reading", number)
            groups = reader.read(limit=1)
            if not groups:
                return
            pause("training", number)
            trained += [row.rollout_id for group in groups for row in group.rows]
            pause("saving", number)
            whole = checkpoint.with_suffix(".new")
            whole.write_text(json.dumps({"trained": trained, "state": reader.state}))
            os.replace(whole, checkpoint)
            pause("going on", number)
            number += 1


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
