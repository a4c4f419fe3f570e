"""The table of senders: calls, lag and losses."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from playwright.sync_api import expect

from tests.common.browser import Visit
from tests.common.clock import standing_still
from tests.common.rollouts import MODEL, fill
from tests.page.conftest import LONG_IDS, Filled, Open
from tests.server.process import StoreServer


def test_row_shows_model_counts_losses_and_lag(look: Open, filled: Filled) -> None:
    page = look("/senders")
    headings = page.get_by_role("columnheader").all_inner_texts()
    found = {text.split()[0]: text.split("\t") for text in page.get_by_role("row").all_inner_texts()[1:]}

    assert sorted(found) == ["gpu-7", "gpu-8"]
    one, other = (dict(zip(headings, found[each], strict=True)) for each in sorted(found))
    assert one["Model"] == other["Model"] == MODEL
    assert "vLLM 0.32.0" in one["Sender"]
    calls = sum(each.calls for each in filled.rollouts)
    assert (one["Calls"], other["Calls"]) == (str(calls), "1")
    assert "".join(other["Output tokens"].split()) == str(LONG_IDS)
    assert (one["Lost"], other["Lost"]) == ("3", "0")
    assert one["Lag"].endswith("s")


def test_calls_per_minute_count_from_the_start_of_the_server(visit: Callable[..., Visit], tmp_path: Path) -> None:
    now = datetime(2026, 11, 25, 10, 0, 0, tzinfo=timezone.utc)
    rollouts = fill(str(tmp_path / "store.db"), 60, now.timestamp() - 2)
    # `fill` starts the server a minute before the first rollout.
    minutes = (now.timestamp() - rollouts[0].start_time + 60) / 60
    assert 2 < minutes < 4
    with StoreServer(tmp_path / "store.db", env=standing_still(f"{now:%Y-%m-%d %H:%M:%S}")) as server:
        page = visit(server).page
        page.goto("/senders")
        headings = page.get_by_role("columnheader").all_inner_texts()
        [found] = [text.split("\t") for text in page.get_by_role("row").all_inner_texts()[1:]]

    calls = int(found[headings.index("Calls")])
    assert found[headings.index("Calls per minute")].strip() == f"{calls / minutes:.1f}"


def test_phone_shows_every_column_without_scrolling_sideways(look: Open) -> None:
    page = look("/senders", size="phone")
    cells = page.get_by_role("row").filter(has_text="gpu-7").get_by_role("cell")

    expect(cells).to_have_count(9)
    assert page.locator(".wide").evaluate("each => each.scrollWidth <= each.clientWidth")
    for each in cells.all():
        each.scroll_into_view_if_needed()
        expect(each).to_be_in_viewport(ratio=1)


def test_chart_of_calls_has_a_description(look: Open) -> None:
    page = look("/senders")

    drawn = page.get_by_role("img", name="Calls in each of the last 60 minutes")
    expect(drawn).to_have_count(2)
    expect(drawn.first).to_be_visible()


def test_new_sender_appears(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server:
        page = visit(server).page
        page.goto("/")
        page.get_by_role("link", name="Senders").click()
        expect(page.get_by_text("No server was heard from")).to_be_visible()
        fill(str(server.path), 1)
        expect(page.get_by_role("rowheader")).to_contain_text("gpu-7")
