"""The pictures of the page in the README: `pytest tests/page/test_pictures.py --pictures` makes them anew.

The data and the clock are always the same, so that they differ only where the page does, or the browser's fonts do.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.common.browser import Scheme, Visit
from tests.common.clock import standing_still
from tests.common.environments import CHECKOUT
from tests.common.rollouts import Rollout, fill
from tests.server.process import StoreServer

IMAGES = CHECKOUT / "docs" / "images"
NOW = datetime(2026, 11, 25, 10, 0, 0, tzinfo=timezone.utc)
COUNT = 250

PICTURES: dict[str, tuple[Scheme, Callable[[Rollout], str], str]] = {
    "rollouts": ("light", lambda _: "/", "Rollouts"),
    "rollout": ("light", lambda shown: f"/rollout?id={shown.rollout_id}", "Rollout ro-"),
    "generation": ("light", lambda shown: f"/generation?id={shown.generation_id(1, 1)}#t8", "Generation "),
    "senders": ("dark", lambda _: "/senders", "Senders"),
}
"""Each with what there is to see, and its heading."""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StoreServer, Rollout]]:
    """A store whose clock stands still, and a rollout of it that is worth looking at."""
    path = tmp_path_factory.mktemp("pictures") / "agl-store.db"
    # A few seconds ago: what has begun then has answers by now.
    rollouts = fill(str(path), COUNT, NOW.timestamp() - 2)
    rollout = next(each for each in reversed(rollouts) if each.status == "succeeded" and each.number % 3 == 0)
    with StoreServer(path, env=standing_still(f"{NOW:%Y-%m-%d %H:%M:%S}")) as server:
        yield server, rollout


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_is_of_the_page(
    shown: tuple[StoreServer, Rollout],
    visit: Callable[..., Visit],
    name: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    server, rollout = shown
    scheme, address, heading = PICTURES[name]
    page = visit(server, scheme=scheme).page
    page.goto(address(rollout))
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(f"^{heading}"))
    folder = IMAGES if request.config.getoption("--pictures", default=False) else tmp_path
    page.screenshot(path=folder / f"{name}.png")

    assert size(folder / f"{name}.png") == size(IMAGES / f"{name}.png")


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readme_shows_pictures_that_are_made_here(readme: str) -> None:
    found = re.findall(r"!\[[^\]]+\]\(docs/images/([^)]+)\.png\)", (CHECKOUT / readme).read_text())

    assert found
    assert set(found) <= PICTURES.keys()


def size(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG file, which its first chunk has."""
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    return width, height
