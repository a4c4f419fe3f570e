"""Accessibility of every page, on a phone and a desktop, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.agentops.client import SdkClient
from tests.common.browser import Scheme, Size, Visit
from tests.page.conftest import Filled, Open
from tests.server.process import StoreServer

RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
TRACE = "ab" * 16


def _two_attempts(filled: Filled) -> str:
    rollout = filled.rollout("failed")
    one, other = (rollout.attempt_id(number) for number in (1, 2))
    return f"/compare?id={rollout.rollout_id}&attempt={one}&other={rollout.rollout_id}&other_attempt={other}"


PAGES: dict[str, Callable[[Filled], str]] = {
    "the overview": lambda _: "/",
    "the overview of a worker by weights": lambda _: "/?by=version&dimension=worker&name=runner-1",
    "the overview without steps": lambda _: "/?by=step",
    "rollouts": lambda _: "/rollouts",
    "rollouts, sorted, filtered": lambda _: "/rollouts?q=times&status=failed&sort=duration&order=asc&reward=..1",
    "rollouts, a filter that cannot be read": lambda _: "/rollouts?reward=much&columns=tags&columns=model",
    "no rollouts": lambda _: "/rollouts?q=nothing+is+like+that",
    "a rollout": lambda filled: f"/rollout?id={filled.rollout('succeeded').rollout_id}",
    "a rollout that was retried": lambda filled: f"/rollout?id={filled.rollout('failed').rollout_id}",
    "a rollout that waits": lambda filled: f"/rollout?id={filled.rollout('queuing').rollout_id}",
    "calls without a rollout": lambda _: "/rollout",
    "an unknown rollout": lambda _: "/rollout?id=nothing",
    "a generation": lambda filled: f"/generation?id={filled.rollout('succeeded').generation_id(1, 0)}#t3",
    "two attempts side by side": _two_attempts,
    "what a rollout can be compared with": lambda filled: f"/compare?id={filled.rollout('failed').rollout_id}",
    "drift": lambda _: "/drift",
    "senders": lambda _: "/senders",
    "the HTTP API": lambda _: "/docs",
}


def violations(page: Page) -> list[str]:
    """Run axe; return what it finds, with the elements concerned."""
    found = Axe().run(page, options={"runOnly": list(RULES), "resultTypes": ["violations"]}).response["violations"]
    return [f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']]}" for each in found]


def check(page: Page, scheme: Scheme) -> None:
    """Assert that a page is accessible, fits its window, and has the colours asked for."""
    assert violations(page) == []
    # Wide elements scroll inside themselves.
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).every(each => each < 128)")
    assert dark == (scheme == "dark")


# A phone by day and a desk by night have each size and each scheme once; the other pairs are in the largest tier.
on_each_screen = pytest.mark.parametrize(
    ("size", "scheme"),
    [
        pytest.param(size, scheme, marks=() if (size == "phone") == (scheme == "light") else pytest.mark.tier("all"))
        for size in get_args(Size)
        for scheme in get_args(Scheme)
    ],
)


@on_each_screen
@pytest.mark.parametrize("address", PAGES.values(), ids=PAGES)
def test_page_is_accessible_and_fits_the_screen(
    filled: Filled, look: Open, address: Callable[[Filled], str], size: Size, scheme: Scheme
) -> None:
    check(look(address(filled), size=size, scheme=scheme), scheme)


@on_each_screen
def test_unfolded_prompt_is_accessible_and_fits_the_screen(
    filled: Filled, look: Open, size: Size, scheme: Scheme
) -> None:
    generation_id = filled.rollout("succeeded").generation_id(1, 0)
    page = look(f"/generation?id={generation_id}", size=size, scheme=scheme)
    page.get_by_role("region", name="Prompt").get_by_text("tokens").click()
    page.get_by_role("group", name="Prompt: ").get_by_text("careful").click()

    expect(page.get_by_role("status").filter(has_text="careful")).to_be_visible()
    check(page, scheme)


@pytest.fixture(scope="module")
def with_sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A store with a session of the AgentOps SDK."""
    with StoreServer(tmp_path_factory.mktemp("sessions") / "store.db", "--agentops") as server:
        with server.client() as client:
            sdk = SdkClient(client)
            sdk.send(sdk.session(TRACE))
        yield server


@on_each_screen
def test_pages_of_agentops_are_accessible_and_fit_the_screen(
    with_sessions: StoreServer, visit: Callable[..., Visit], size: Size, scheme: Scheme
) -> None:
    page = visit(with_sessions, size=size, scheme=scheme).page
    page.goto("/")
    page.get_by_role("link", name="Sessions").click()
    expect(page.get_by_role("heading", name="Sessions")).to_be_visible()
    check(page, scheme)
    page.get_by_role("link", name=TRACE).click()
    expect(page.get_by_role("heading", name="Session")).to_contain_text(TRACE)
    check(page, scheme)
    page.get_by_role("link", name="HTTP API").click()
    expect(page.get_by_role("heading", name="AgentOps")).to_be_visible()
    check(page, scheme)
