"""The pictures of the page in the documentation: `python -m tools.pictures` makes them in `docs/images`.

Of the same page they are the same, whenever they are made, where the same fonts are installed.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import get_args

from tests.common.browser import MISSING, Scheme, Visit, chromium, program
from tests.common.clock import standing_still
from tests.common.rollouts import fill
from tests.server.process import StoreServer
from tools.make_env import CHECKOUT, say

IMAGES = CHECKOUT / "docs" / "images"
NOW = datetime(2026, 11, 25, 10, 0, 0, tzinfo=timezone.utc)
COUNT = 250


def main() -> None:
    found = program()
    if found is None:
        sys.exit(MISSING)
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="agl-pictures-") as folder, chromium(found) as browser:
        path = Path(folder) / "agl-store.db"
        # A few seconds ago: what has begun then has answers by now.
        rollouts = fill(str(path), COUNT, NOW.timestamp() - 2)
        shown = next(each for each in reversed(rollouts) if each.status == "succeeded" and each.number % 3 == 0)
        addresses = {
            "rollouts": "/",
            "rollout": f"/rollout?id={shown.rollout_id}",
            "generation": f"/generation?id={shown.generation_id(1, 1)}#t8",
            "senders": "/senders",
        }
        with StoreServer(path, env=standing_still(f"{NOW:%Y-%m-%d %H:%M:%S}")) as server:
            for scheme in get_args(Scheme):
                visit = Visit(browser, server.url, scheme=scheme)
                for name, address in addresses.items():
                    visit.page.goto(address)
                    picture = IMAGES / f"{name}-{scheme}.png"
                    visit.page.screenshot(path=picture)
                    say(f"{picture.relative_to(CHECKOUT)}")
                visit.close()


if __name__ == "__main__":
    main()
