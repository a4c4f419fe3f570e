"""Each page, on a phone and on a desk, light and dark: everybody can read it, and nothing of it is out of sight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.common.browser import Scheme, Size
from tests.page.conftest import Filled, Open

RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
PAGES: dict[str, Callable[[Filled], str]] = {
    "rollouts": lambda _: "/",
    "rollouts, sorted, filtered": lambda _: "/?q=times&status=failed&sort=duration&order=asc",
    "no rollouts": lambda _: "/?q=nothing+is+like+that",
    "a rollout": lambda filled: f"/rollout?id={filled.rollout('succeeded').rollout_id}",
    "a rollout that was tried again": lambda filled: f"/rollout?id={filled.rollout('failed').rollout_id}",
    "a rollout that waits": lambda filled: f"/rollout?id={filled.rollout('queuing').rollout_id}",
    "calls without a rollout": lambda _: "/rollout",
    "a rollout that is not there": lambda _: "/rollout?id=nothing",
    "a generation": lambda filled: f"/generation?id={filled.rollout('succeeded').generation_id(1, 0)}#t3",
    "senders": lambda _: "/senders",
}


def violations(page: Any) -> list[str]:
    """What axe finds, each with the elements that it is about."""
    found = Axe().run(page, options={"runOnly": list(RULES), "resultTypes": ["violations"]}).response["violations"]
    return [f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']]}" for each in found]


@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize("size", get_args(Size))
@pytest.mark.parametrize("address", PAGES.values(), ids=PAGES)
def test_everybody_can_read_it(
    filled: Filled, look: Open, address: Callable[[Filled], str], size: Size, scheme: Scheme
) -> None:
    page = look(address(filled), size=size, scheme=scheme)

    assert violations(page) == []
    # What is wide scrolls within itself.
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every(each => each < 128)")
    assert dark == (scheme == "dark")
