"""The pictures in the documentation: `pytest tests/page/test_pictures.py --pictures` makes them again.

The data and the clock never change, so the pictures differ only if the page or the browser's fonts do. Their texts are
compared exactly, with the folder `pictures`, and their looks approximately.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageChops, ImageStat
from playwright.sync_api import expect

from tests.common.browser import Scheme, Size, Visit
from tests.common.clock import standing_still
from tests.common.environments import CHECKOUT
from tests.common.rollouts import Rollout, fill
from tests.recording.server import until
from tests.server.process import StoreServer

IMAGES = CHECKOUT / "docs" / "images"
TEXTS = Path(__file__).parent / "pictures"
ADDRESS = "127.0.0.1:4747"
"""Address in the texts, in place of the port of the run."""
NOW = datetime(2026, 11, 25, 10, 0, 0, tzinfo=timezone.utc)
COUNT = 250

PICTURES: dict[str, tuple[Callable[[Rollout], str], str]] = {
    "overview": (lambda _: "/?dimension=worker", "Overview"),
    "rollouts": (lambda _: "/rollouts", "Rollouts"),
    "rollout": (lambda shown: f"/rollout?id={shown.rollout_id}", "Rollout ro-"),
    "generation": (lambda shown: f"/generation?id={shown.generation_id(1, 1)}#t8", "Generation "),
    "drift": (lambda _: "/drift", "Drift"),
    "senders": (lambda _: "/senders", "Senders"),
}
"""Each page's address and heading."""
SCREENS: dict[str, tuple[Size, Scheme]] = {
    "": ("desktop", "light"),
    "-dark": ("desktop", "dark"),
    "-phone": ("phone", "light"),
    "-phone-dark": ("phone", "dark"),
}
"""Theme and width of each picture, by the end of its name."""
PLOTS = {"training"}
"""Pictures in the README that a benchmark makes."""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StoreServer, Rollout]]:
    """A store whose clock stands still, and the rollout to show."""
    path = tmp_path_factory.mktemp("pictures") / "agl-store.db"
    # Two seconds ago, so that rollouts that began then have answers.
    rollouts = fill(str(path), COUNT, NOW.timestamp() - 2)
    rollout = next(each for each in reversed(rollouts) if each.status == "succeeded" and each.number % 3 == 0)
    with StoreServer(path, env=standing_still(f"{NOW:%Y-%m-%d %H:%M:%S}")) as server:
        # Rollouts are compared while somebody looks, so how many a first look shows depends on the machine.
        until(lambda: "not compared yet" not in httpx.get(f"{server.url}/drift").text, "all rollouts compared")
        # Nor are they counted at once.
        until(lambda: "being counted" not in httpx.get(f"{server.url}/").text, "all rollouts counted")
        yield server, rollout


@pytest.mark.parametrize("name", PICTURES)
def test_picture_matches_the_page(
    shown: tuple[StoreServer, Rollout],
    visit: Callable[..., Visit],
    name: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    server, rollout = shown
    address, heading = PICTURES[name]
    taken: dict[str, Image.Image] = {}
    text = ""
    for ending, (size, scheme) in SCREENS.items():
        page = visit(server, size=size, scheme=scheme).page
        page.goto(address(rollout))
        expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(f"^{heading}"))
        # What is known of a token is asked for once the page is there.
        page.wait_for_load_state("networkidle")
        page.screenshot(path=tmp_path / "now.png")
        taken[ending] = Image.open(tmp_path / "now.png").convert("RGB")
        text = text or page.locator("body").aria_snapshot().replace(server.url.removeprefix("http://"), ADDRESS)
    if request.config.getoption("--pictures", default=False):
        TEXTS.mkdir(exist_ok=True)
        (TEXTS / f"{name}.txt").write_text(f"{text}\n")
        for ending, picture in taken.items():
            picture.save(IMAGES / f"{name}{ending}.png", optimize=True)

    assert text == (TEXTS / f"{name}.txt").read_text().removesuffix("\n")
    kept = {ending: Image.open(IMAGES / f"{name}{ending}.png").convert("RGB") for ending in SCREENS}
    # The fonts of another machine make less of a difference than anything that a reader would notice.
    for ending, other_colours, other_size in (("", "-dark", "-phone"), ("-phone-dark", "-phone", "-dark")):
        assert taken[ending].size == kept[ending].size
        away = difference(taken[ending], kept[ending])
        assert away < difference(taken[other_colours], kept[ending]) / 4
        assert away < difference(taken[other_size].resize(kept[ending].size), kept[ending]) / 2


def test_page_of_the_documentation_shows_every_picture() -> None:
    text = (CHECKOUT / "docs" / "page.md").read_text()

    assert {f"images/{name}{ending}.png" for name in PICTURES for ending in SCREENS} == set(
        re.findall(r"\((images/[^)]+\.png)\)", text)
    )


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_readme_shows_pictures_made_here(readme: str) -> None:
    found = re.findall(r"!\[[^\]]+\]\(docs/images/([^)]+)\.png\)", (CHECKOUT / readme).read_text())

    assert found
    assert set(found) <= PICTURES.keys() | PLOTS


def difference(one: Image.Image, other: Image.Image) -> float:
    """Return the mean difference of colours, 0 to 255, at a resolution at which no letter can be read."""
    width, height = one.size
    seen = [each.resize((width // 12, height // 12), Image.Resampling.BOX) for each in (one, other)]
    return sum(ImageStat.Stat(ImageChops.difference(*seen)).mean) / 3
