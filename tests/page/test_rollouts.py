"""The table of rollouts: search, order, pages, and live updates."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

import agentlightning as agl
from tests.common.browser import Visit
from tests.common.rollouts import LONG, MODEL, Rollout, end_time
from tests.page.conftest import COUNT, LONG_IDS, Filled, Open, end, shown_time, started
from tests.server.process import StoreServer


def row(page: Page, text: str) -> Locator:
    return page.get_by_role("row").filter(has_text=text)


def cells(page: Page) -> list[dict[str, str]]:
    """Return the texts of the table by heading, row by row."""
    headings, *rows = (text.split("\t") for text in page.get_by_role("row").all_inner_texts())
    names = [each.rstrip(" ↓↑") for each in headings]
    return [dict(zip(names, row, strict=True)) for row in rows]


def number(text: str) -> int:
    return int(re.sub(r"\s", "", text))


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until the target has the focus."""
    for _ in range(100):
        page.keyboard.press("Tab")
        if target.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"Tab never reaches {target}")


def test_table_lists_all_rollouts_latest_first(look: Open, filled: Filled) -> None:
    page = look("/rollouts")

    expect(page.get_by_text(f"{COUNT + 1} rollouts")).to_be_visible()
    found = cells(page)
    # It began long before it ended.
    assert LONG in [each["Task"] for each in found[1:]]
    in_queue = [each for each in found if each["Task"] != LONG]
    for each, shown in zip(reversed(filled.rollouts), in_queue, strict=False):
        assert shown["Task"].startswith(each.question)
        assert each.rollout_id in shown["Task"]


def test_row_shows_status_calls_reward_and_attempt(look: Open, filled: Filled) -> None:
    page = look("/rollouts")
    ended, again = filled.rollout("succeeded"), filled.rollout("failed")

    [found] = [each for each in cells(page) if ended.rollout_id in each["Task"]]
    assert (found["Status"], found["Calls"], found["Reward"]) == ("succeeded", str(len(ended.answers)), "1")
    assert (found["Worker"], found["Tags"].strip()) == (f"runner-{ended.number % 4}", f"split={ended.number % 4}")
    expect(row(page, again.rollout_id)).to_contain_text("attempt 2")
    expect(row(page, LONG)).to_contain_text("recorded")
    expect(row(page, filled.rollout("running").rollout_id)).to_contain_text("so far")


def test_columns_tell_when_a_rollout_was_queued_and_started_and_how_long_it_took(look: Open, filled: Filled) -> None:
    page = look("/rollouts?sort=queued&order=asc&status=succeeded")
    first = filled.rollouts[0]
    [found] = [each for each in cells(page) if first.rollout_id in each["Task"]]

    # An attempt starts a quarter of a second after it was queued.
    seconds = end_time(first) - first.start_time - 0.25
    assert (found["Queued"], found["Started"], found["Took"]) == (
        shown_time(first.start_time),
        shown_time(first.start_time + 0.25),
        f"{seconds:.1f}\N{NO-BREAK SPACE}s",
    )
    waits = filled.rollout("queuing").rollout_id
    [waiting] = [each for each in cells(look("/rollouts")) if waits in each["Task"]]
    assert (waiting["Started"], waiting["Took"]) == ("\N{EN DASH}", "\N{EN DASH}")


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_times_are_local_and_in_utc_on_hover(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client, zone: str
) -> None:
    new = started(trainer, "When was that?")
    page = visit(living, timezone=zone).page
    page.goto("/rollouts")
    at = row(page, new["rollout_id"]).locator("time").first
    local = datetime.fromtimestamp(new["start_time"], ZoneInfo(zone))

    expect(at).to_have_text(f"{local:%Y-%m-%d\N{NO-BREAK SPACE}%H:%M:%S}")
    utc = shown_time(new["start_time"]) + "\N{NO-BREAK SPACE}UTC"
    expect(at).to_have_attribute("title", utc)
    # Updates keep it so.
    end(trainer, new)
    expect(row(page, new["rollout_id"])).to_contain_text("succeeded")
    expect(at).to_have_text(f"{local:%Y-%m-%d\N{NO-BREAK SPACE}%H:%M:%S}")
    expect(at).to_have_attribute("title", utc)


def test_times_without_scripts_say_that_they_are_utc(look: Open, filled: Filled) -> None:
    page = look("/rollouts?sort=queued&order=asc", javascript=False)

    expect(page.locator("time").first).to_have_text(shown_time(filled.rollouts[0].start_time) + "\N{NO-BREAK SPACE}UTC")


def test_phone_shows_every_column_without_scrolling_sideways(look: Open, filled: Filled) -> None:
    page = look("/rollouts", size="phone")
    card = row(page, filled.rollout("succeeded").rollout_id)

    assert table_is_as_wide_as_the_window(page)
    cells_of_card = card.get_by_role("cell")
    expect(cells_of_card).to_have_count(11)
    for each in cells_of_card.all():
        each.scroll_into_view_if_needed()
        expect(each).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("columnheader", name="Calls")).to_be_visible()
    page.get_by_role("columnheader", name="Calls").get_by_role("link").click()
    expect(page.get_by_role("columnheader", name="Calls")).to_have_attribute("aria-sort", "descending")
    assert table_is_as_wide_as_the_window(page)


def table_is_as_wide_as_the_window(page: Page) -> bool:
    """Tell whether the table shows all of itself, without scrolling sideways."""
    return page.locator(".wide").evaluate("each => each.scrollWidth <= each.clientWidth")


def test_rollout_without_answers_gives_its_reason(look: Open, filled: Filled) -> None:
    page = look("/rollouts")

    expect(row(page, filled.rollout("queuing").rollout_id)).to_contain_text("it is waiting in the queue")
    expect(row(page, filled.rollout("cancelled").rollout_id)).to_contain_text("no recorded call names")


@pytest.mark.parametrize("javascript", [True, False])
def test_search_matches_the_input(look: Open, filled: Filled, javascript: bool) -> None:
    wanted = filled.rollouts[7]
    page = look("/rollouts", javascript=javascript)
    page.get_by_label("Search rollouts").fill(wanted.question.upper())
    page.get_by_role("button", name="Search").click()

    expect(page.get_by_text("1 rollout found")).to_be_visible()
    expect(row(page, wanted.rollout_id)).to_be_visible()


def test_typing_searches_and_updates_the_address(look: Open, filled: Filled) -> None:
    wanted = filled.rollouts[7].rollout_id
    page = look("/rollouts?sort=calls&order=asc")
    page.get_by_label("Search rollouts").press_sequentially(wanted)
    expect(page.get_by_text("1 rollout found")).to_be_visible()
    expect(page).to_have_url(re.compile(rf"[?&]q={wanted}(&|$)"))

    shared = look(page.url)
    expect(shared.get_by_label("Search rollouts")).to_have_value(wanted)
    expect(row(shared, wanted)).to_be_visible()
    expect(shared.get_by_role("columnheader", name="Calls")).to_have_attribute("aria-sort", "ascending")
    page.go_back()
    expect(page.get_by_text(f"{COUNT + 1} rollouts")).to_be_visible()


def test_status_filter_lists_only_that_status(look: Open, filled: Filled) -> None:
    page = look("/rollouts")
    page.get_by_role("combobox", name="Status").select_option("failed")

    expected = sum(each.status == "failed" for each in filled.rollouts)
    expect(page.get_by_text(f"{expected} rollouts found")).to_be_visible()
    assert {found["Status"].split()[0] for found in cells(page)} == {"failed"}


@pytest.mark.parametrize("name", ["Calls", "Prompt tokens", "Output tokens"])
def test_click_on_a_heading_sorts_by_it(look: Open, name: str) -> None:
    page = look("/rollouts")
    heading = page.get_by_role("columnheader", name=name)
    for how, is_reverse in (("descending", True), ("ascending", False)):
        heading.get_by_role("link").click()
        expect(heading).to_have_attribute("aria-sort", how)
        found = [number(each[name]) for each in cells(page)]
        assert found == sorted(found, reverse=is_reverse)
    page.get_by_role("columnheader", name="Output tokens").get_by_role("link").click()
    assert number(cells(page)[0]["Output tokens"]) == LONG_IDS


def test_sort_by_reward_puts_rollouts_without_one_last(look: Open) -> None:
    for order, best in (("desc", "1"), ("asc", "0")):
        found = [each["Reward"] for each in cells(look(f"/rollouts?sort=reward&order={order}"))]
        assert found[0] == best
        assert cells(look(f"/rollouts?sort=reward&order={order}&page=3"))[-1]["Reward"] == "\N{EN DASH}"


def test_paging_shows_each_rollout_once(look: Open, filled: Filled) -> None:
    page = look("/rollouts?sort=status")
    found: list[str] = []
    for number in (1, 2, 3):
        expect(page.get_by_text(f"Page {number} of 3")).to_be_visible()
        found += [each["Task"].splitlines()[0] for each in cells(page)]
        if number < 3:
            page.get_by_role("link", name="Next page").click()
    # No two have the same question.
    assert sorted(found) == sorted([LONG, *(each.question for each in filled.rollouts)])
    expect(page.get_by_role("link", name="Next page")).to_have_count(0)
    page.get_by_role("link", name="Previous page").click()
    expect(page.get_by_text("Page 2 of 3")).to_be_visible()


def test_keyboard_alone_searches_sorts_and_opens_a_rollout(look: Open, filled: Filled) -> None:
    wanted = filled.rollouts[11]
    page = look("/rollouts")
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_label("Search rollouts"))
    page.keyboard.type(wanted.question)
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 rollout found")).to_be_visible()
    tab_to(page, page.get_by_role("columnheader", name="Calls").get_by_role("link"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("columnheader", name="Calls")).to_have_attribute("aria-sort", "descending")
    tab_to(page, page.get_by_role("link", name=wanted.rollout_id))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=wanted.rollout_id)).to_be_visible()


def test_page_beyond_the_last_links_to_the_first(look: Open) -> None:
    page = look("/rollouts?page=99&sort=calls")
    page.get_by_role("link", name="Show the first").click()

    expect(page.get_by_text("Page 1 of 3")).to_be_visible()
    expect(page.get_by_role("columnheader", name="Calls")).to_have_attribute("aria-sort", "descending")


def test_ended_rollout_updates_its_row_and_keeps_the_focus(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    ends = started(trainer, "Does it end?")
    page = visit(living).page
    page.goto("/rollouts")
    link = page.get_by_role("link", name=ends["rollout_id"])
    link.focus()
    page.evaluate("window.isTheSame = true")
    expect(row(page, ends["rollout_id"])).to_contain_text("preparing")
    end(trainer, ends)

    expect(row(page, ends["rollout_id"])).to_contain_text("succeeded")
    new = started(trainer, "Is there one more?")
    expect(row(page, new["rollout_id"])).to_be_visible()
    # The page was neither reloaded nor lost its focus.
    assert page.evaluate("window.isTheSame")
    expect(link).to_be_focused()


def test_live_updates_keep_the_search(visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client) -> None:
    apples, pears = started(trainer, "How many apples?"), started(trainer, "How many pears?")
    page = visit(living).page
    page.goto("/rollouts")
    expect(row(page, pears["rollout_id"])).to_be_visible()
    page.get_by_label("Search rollouts").press_sequentially("APPLES")
    expect(row(page, pears["rollout_id"])).to_have_count(0)
    end(trainer, pears)
    end(trainer, apples)

    expect(row(page, apples["rollout_id"])).to_contain_text("succeeded")
    expect(row(page, pears["rollout_id"])).to_have_count(0)
    expect(page.get_by_label("Search rollouts")).to_have_value("APPLES")
    expect(page.get_by_label("Search rollouts")).to_be_focused()


def test_stopped_live_updates_send_no_requests_until_started(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    stopped, live = visit(living).page, visit(living).page
    live.goto("/rollouts")
    stopped.goto("/rollouts")
    stopped.get_by_role("link", name="Live updates on: stop").click()
    expect(stopped.get_by_role("link", name="Live updates off: start")).to_be_visible()
    requests: list[str] = []
    stopped.on("request", lambda request: requests.append(request.url))
    for question in ("Who looks?", "And now?", "And now?"):
        new = started(trainer, question)
        expect(row(live, new["rollout_id"])).to_be_visible()
    # The browser may request the icon last.
    assert [url for url in requests if not url.endswith("/icon.svg")] == []
    stopped.get_by_role("link", name="Live updates off: start").click()
    expect(row(stopped, new["rollout_id"])).to_be_visible()
    end(trainer, new)
    expect(row(stopped, new["rollout_id"])).to_contain_text("succeeded")


def test_unreachable_store_is_reported_until_it_answers(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server:
        visitor = visit(server)
        visitor.page.goto("/rollouts")
        trouble = visitor.page.get_by_text("The store does not answer")
        server.kill()
        expect(trouble).to_be_visible()
        server.start()
        expect(trouble).to_be_hidden()
        # The browser and htmx report the failed requests in the console.
        assert visitor.complaints
        visitor.complaints.clear()


def test_empty_store_shows_how_to_record_to_it(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server:
        page = visit(server).page
        page.goto("/rollouts")
        expect(page.get_by_text("There are no rollouts yet")).to_be_visible()
        expect(page.get_by_text(f"AGL_STORE={server.url} AGL_INSTRUMENT=1 vllm serve")).to_be_visible()
        with server.client() as client:
            started(client, "Are you the first?")
        expect(page.get_by_text("1 rollout", exact=True)).to_be_visible()


def test_filters_are_in_an_address_to_share_and_each_is_removed_alone(look: Open, filled: Filled) -> None:
    page = look("/rollouts")
    page.get_by_label("Reward", exact=True).first.fill("0.5..")
    page.get_by_role("combobox", name="Worker").select_option("runner-1")
    expect(page.get_by_role("link", name="Remove the filter worker: runner-1")).to_be_visible()
    wanted = [each for each in filled.rollouts if each.reward == 1 and each.number % 4 == 1]
    expect(page.get_by_text(f"{len(wanted)} rollouts found")).to_be_visible()
    # Fields that are empty are not in it.
    expect(page).to_have_url(re.compile(r"/rollouts\?worker=runner-1&reward=0\.5\.\.$"))

    shared = look(page.url)
    assert {found["Worker"] for found in cells(shared)} == {"runner-1"}
    expect(shared.get_by_label("Reward", exact=True).first).to_have_value("0.5..")
    shared.get_by_role("link", name="Remove the filter worker").click()
    rewarded = sum(each.reward == 1 for each in filled.rollouts)
    expect(shared.get_by_text(f"{rewarded} rollouts found")).to_be_visible()


@pytest.mark.parametrize(
    ("address", "matches"),
    [
        ("calls=3..", lambda each: each.calls >= 3),
        ("calls=0", lambda each: each.calls == 0),
        ("tag=split=2", lambda each: each.number % 4 == 2),
        ("reward=..0.5", lambda each: each.reward == 0),
        (
            "duration=..3.0",
            lambda each: each.status in ("succeeded", "failed") and end_time(each) - each.start_time <= 3.25,
        ),
        ("status=failed&worker=runner-2", lambda each: each.status == "failed" and each.number % 4 == 2),
    ],
)
def test_filter_finds_those_that_match(filled: Filled, address: str, matches: Callable[[Rollout], bool]) -> None:
    with filled.server.client() as client:
        lines = client.get(f"/rollouts/export?{address}").text.splitlines()

    found = {json.loads(line)["rollout_id"] for line in lines} - {LONG}
    assert found == {each.rollout_id for each in filled.rollouts if matches(each)}
    assert found


def test_times_filter_from_one_day_or_moment_to_another(filled: Filled) -> None:
    # A moment cannot have all digits of a number of seconds.
    times = (filled.rollouts[10].start_time - 1e-3, filled.rollouts[20].start_time + 1e-3)
    first, last = (datetime.fromtimestamp(each, timezone.utc) for each in times)
    with filled.server.client() as client:
        lines = client.get(f"/rollouts/export?queued={first.isoformat()}..{last.isoformat()}".replace("+", "%2B")).text
        of_days = client.get(f"/rollouts/export?queued={first:%Y-%m-%d}..{datetime.now(timezone.utc):%Y-%m-%d}").text

    assert len(lines.splitlines()) == 11
    assert len(of_days.splitlines()) >= len(filled.rollouts) - 10


@pytest.mark.parametrize(
    "address", ["statuss=failed", "Status=failed", "status=failed&status=queuing", "active=..9999-12-31"]
)
def test_export_with_a_filter_that_cannot_be_meant_is_refused(filled: Filled, address: str) -> None:
    with filled.server.client() as client:
        assert client.get(f"/rollouts/export?{address}").status_code == 422


def test_export_is_whole_however_many_rollouts_are_new(tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server, server.client() as client:
        with agl.open_store(str(server.path)) as store:
            store.enqueue_rollouts([agl.NewRollout({"question": str(n)}) for n in range(5_000)])
        assert len(client.get("/rollouts/export").text.splitlines()) == 5_000


def test_filter_that_cannot_be_read_says_how_to_write_it(look: Open) -> None:
    page = look("/rollouts?reward=much&queued=yesterday..&status=done")

    expect(
        page.get_by_text("Reward: 'much' is not a number; write a range like 0.5.., ..1 or 0.2..0.8.")
    ).to_be_visible()
    expect(page.get_by_text("Queued: 'yesterday' is not a time")).to_be_visible()
    expect(page.get_by_text("Status: 'done' is not one of")).to_be_visible()


def test_columns_are_chosen_and_stay_in_the_address(look: Open) -> None:
    page = look("/rollouts")
    page.get_by_text("Columns", exact=True).click()
    page.get_by_role("checkbox", name="Model").check()
    expect(page.get_by_role("columnheader", name="Model")).to_be_visible()
    page.get_by_role("checkbox", name="Started").uncheck()
    expect(page.get_by_role("columnheader", name="Started")).to_have_count(0)

    shared = look(page.url)
    assert cells(shared)[-1]["Model"] == MODEL
    expect(shared.get_by_role("columnheader", name="Started")).to_have_count(0)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("Rollouts as JSON Lines", "jsonl"), ("Triplets as JSON Lines", "jsonl"), ("Trajectories as JSON Lines", "jsonl")],
)
def test_export_has_what_is_filtered(look: Open, filled: Filled, name: str, suffix: str) -> None:
    page = look("/rollouts?status=failed&sort=rollout&order=asc")
    page.get_by_text("Export", exact=True).click()
    with page.expect_download() as download:
        page.get_by_role("link", name=name).click()
    lines = [json.loads(line) for line in download.value.path().read_text().splitlines()]

    assert download.value.suggested_filename == f"{name.split()[0].lower()}.{suffix}"
    failed = sorted(each.rollout_id for each in filled.rollouts if each.status == "failed")
    assert [*dict.fromkeys(each["rollout_id"] for each in lines)] == failed


def test_parquet_has_the_rows_of_the_list(filled: Filled) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with filled.server.client() as client:
        answer = client.get("/rollouts/export?format=parquet&tag=split=1")
        lines = client.get("/rollouts/export?format=jsonl&tag=split=1").text.splitlines()

    rows = parquet.read_table(io.BytesIO(answer.content)).to_pylist()
    assert rows == [json.loads(line) for line in lines]
    assert rows[0]["tags"] == ["split=1"]
    assert rows[0]["task"].startswith("What is ")
