"""The overview: its charts, what they lead to, and how it is divided."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.common.browser import Visit
from tests.common.rollouts import fill
from tests.page.conftest import COUNT, Filled, Open, end, started
from tests.server.process import StoreServer


def card(page: Page, title: str) -> Locator:
    return page.get_by_role("region", name=title, exact=True)


def test_cards_show_what_all_rollouts_did(look: Open, filled: Filled) -> None:
    page = look("/")
    succeeded, failed = (sum(each.status == status for each in filled.rollouts) for status in ("succeeded", "failed"))
    share = succeeded / (succeeded + failed)

    expect(card(page, "Mean reward")).to_contain_text(f"{share:.3g}")
    expect(card(page, "Success")).to_contain_text(f"{100 * share:.0f}\N{NARROW NO-BREAK SPACE}%")
    ended = sum(each.status in ("succeeded", "failed", "cancelled") for each in filled.rollouts)
    # One was never in the queue.
    expect(card(page, "Rollouts a minute")).to_contain_text(f"{ended + 1} ended")
    expect(card(page, "Lost calls").locator(".stat")).to_contain_text("3")
    expect(page.get_by_role("link", name="2 running")).to_be_visible()


def test_point_leads_to_its_rollouts(look: Open) -> None:
    page = look("/?time=hour")
    page.get_by_text("The numbers of these charts").click()
    row = page.get_by_role("region", name="Table of numbers").get_by_role("row").nth(1)
    expect(row).to_be_visible()
    row.get_by_role("link").click()

    expect(page.get_by_role("heading", name="Rollouts")).to_be_visible()
    expect(page).to_have_url(re.compile(r"/rollouts\?active=.+Z$"))
    expect(page.get_by_text(re.compile(r"^\d+ rollouts? found$"))).to_be_visible()
    page.go_back()
    # By the mouse, the place of a point in a chart leads there, too, and says what is there.
    point = card(page, "Tokens").locator("a").last
    point.locator(".hit").hover()
    expect(point.locator(".tip")).to_be_visible()
    point.locator(".hit").click()
    expect(page).to_have_url(re.compile(r"/rollouts\?active=.+Z$"))


def test_rollouts_of_all_points_are_all_rollouts(look: Open, filled: Filled) -> None:
    page = look("/?time=all")
    page.get_by_text("The numbers of these charts").click()
    links = page.get_by_role("region", name="Table of numbers").locator("tbody a")
    expect(links.first).to_be_visible()
    found = 0
    with filled.server.client() as client:
        for each in links.all():
            address = (each.get_attribute("href") or "").removeprefix(".")
            found += int(re.findall(r"(\d+) rollouts? found", client.get(address).text)[0])

    assert found == COUNT + 1


def test_worker_is_shown_alone_and_its_address_shows_the_same(look: Open, filled: Filled) -> None:
    page = look("/")
    page.get_by_role("navigation", name="By").get_by_role("link", name="worker").click()
    page.get_by_role("link", name="runner-1").click()
    expect(page.get_by_role("link", name="Show all, not only the worker runner-1")).to_be_visible()
    rewards = [each.reward for each in filled.rollouts if each.number % 4 == 1 and each.reward is not None]
    mean = f"{sum(rewards) / len(rewards):.3g}"
    expect(card(page, "Mean reward")).to_contain_text(mean)

    shared = look(page.url)
    expect(card(shared, "Mean reward")).to_contain_text(mean)
    shared.get_by_role("link", name="Show all, not only").click()
    expect(shared.get_by_role("link", name="Show all, not only")).to_have_count(0)


def test_weights_have_their_rollouts_and_steps_say_how_to_have_them(look: Open) -> None:
    page = look("/")
    page.get_by_role("link", name="Weights").click()
    expect(card(page, "Mean reward")).to_contain_text("step-0")
    page.get_by_role("link", name="Step", exact=True).click()
    expect(page.get_by_role("heading", name="No rollout has a step")).to_be_visible()


def test_keyboard_alone_reaches_the_rollouts_of_a_time(look: Open) -> None:
    page = look("/?time=all")
    summary = page.get_by_text("The numbers of these charts")
    for _ in range(80):
        page.keyboard.press("Tab")
        if summary.evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    expect(page.get_by_role("heading", name="Rollouts")).to_be_visible()


def test_overview_is_live_and_empty_at_first(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        page = visit(server).page
        page.goto("/")
        expect(page.get_by_text(f"AGL_STORE={server.url} AGL_INSTRUMENT=1 vllm serve")).to_be_visible()
        rollout = started(client, "Are you the first?")
        expect(page.get_by_role("link", name="1 preparing")).to_be_visible()
        end(client, rollout)
        expect(card(page, "Rollouts a minute")).to_contain_text("1 ended")
        expect(card(page, "Success")).to_contain_text("100\N{NARROW NO-BREAK SPACE}%")
        attempt = f"/v1/agl/rollouts/{rollout['rollout_id']}/attempts/{rollout['attempt']['attempt_id']}"
        client.post(f"{attempt}/reward", json={"value": 0.25}).raise_for_status()
        expect(card(page, "Mean reward")).to_contain_text("0.25")


def test_page_that_would_show_the_same_is_not_sent_again(tmp_path: Path) -> None:
    fill(str(tmp_path / "store.db"), 3, 1_000_000_000.0)
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        until_compared(client)
        for path in ("/", "/rollouts"):
            # Rollouts that are under way show how long they run, which changes.
            address = "/rollouts?status=queuing" if path == "/rollouts" else path
            [again] = set(re.findall(r'hx-get="\.(/[^"]*seen=[^"]*)"', client.get(address).text.replace("&amp;", "&")))
            assert client.get(again).status_code == 204
            started(client, "Is it seen?")
            assert client.get(again).status_code == 200


def until_compared(client: httpx.Client) -> None:
    while "not compared yet" in client.get("/drift").text:
        pass


@pytest.mark.parametrize(
    "address", ["/?by=nothing", "/?time=never", "/?dimension=status", "/rollouts/export?format=csv"]
)
def test_strange_parameter_is_refused(filled: Filled, address: str) -> None:
    with filled.server.client() as client:
        assert client.get(address).status_code == 422
