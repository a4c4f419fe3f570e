"""The page of one rollout: timeline, conversation, and the reason why there is no data."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable

import httpx
from playwright.sync_api import Locator, Page, expect

from agentlightning.store import open_store
from tests.common.browser import Visit
from tests.common.generations import generation
from tests.common.rollouts import LONG
from tests.page.conftest import Filled, Open, end, started
from tests.server.process import StoreServer


def rows(page: Page) -> list[str]:
    """Return the texts of the timeline, from top to bottom."""
    return page.get_by_role("region", name="Timeline").get_by_role("listitem").all_inner_texts()


def calls(page: Page) -> Locator:
    return page.get_by_role("region", name="Conversation").get_by_role("listitem")


def test_timeline_nests_spans_and_calls_below_the_attempt(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("succeeded")
    found = rows(look(f"/rollout?id={rollout.rollout_id}"))

    assert rollout.attempt_id(1) in found[0]
    names = ["Attempt 1", "agent", "openai.chat.completion", "/v1/chat/completions: ", "calculator"]
    assert all(text.startswith(name) for name, text in zip(names, found, strict=False))
    assert "agentlightning.annotation" in found[-1]
    assert "reward 1" in found[-1]
    assert sum("/v1/chat/completions" in each for each in found) == len(rollout.answers)


def test_retried_rollout_shows_both_attempts_and_their_status(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("failed")
    found = rows(look(f"/rollout?id={rollout.rollout_id}"))

    [first, second] = [each for each in found if each.startswith("Attempt")]
    assert rollout.attempt_id(1) in first
    assert "timeout" in first
    assert rollout.attempt_id(2) in second
    assert "failed" in second
    assert any("aborted" in each for each in found[1 : found.index(second)])


def test_conversation_shows_each_text_once_in_order(look: Open, filled: Filled) -> None:
    rollout = next(each for each in filled.rollouts if each.number % 5 and each.status == "succeeded")
    page = look(f"/rollout?id={rollout.rollout_id}")

    expect(calls(page)).to_have_count(len(rollout.answers))
    expect(calls(page).first).to_contain_text(rollout.question)
    for place, answer in enumerate(rollout.answers):
        expect(calls(page).nth(place)).to_contain_text(answer)
    expect(calls(page).filter(has_text=rollout.question)).to_have_count(1)
    expect(calls(page).last).to_contain_text("reward 1")


def test_links_lead_from_the_table_to_a_call_and_back(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("succeeded")
    page = look("/")
    page.get_by_role("link", name=rollout.rollout_id).click()
    page.get_by_role("region", name="Timeline").get_by_role("link").first.click()
    expect(page.get_by_role("heading", name="Generation")).to_contain_text(rollout.generation_id(1, 0))
    page.get_by_role("link", name=rollout.rollout_id).click()
    page.get_by_role("link", name="Call 2").click()
    expect(page.get_by_role("heading", name="Generation")).to_contain_text(rollout.generation_id(1, 1))
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="Rollouts").click()
    expect(page.get_by_role("heading", name="Rollouts")).to_be_visible()


def test_input_unfolds(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("queuing")
    page = look(f"/rollout?id={rollout.rollout_id}")
    page.get_by_text("Input", exact=True).click()

    expect(page.get_by_text(rollout.question)).to_be_visible()


def test_queued_rollout_says_that_it_waits(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('queuing').rollout_id}")

    expect(page.get_by_role("heading", name="Why there is no training data")).to_be_visible()
    expect(page.get_by_text("it is waiting in the queue")).to_be_visible()
    expect(page.get_by_text("What to do")).to_contain_text("runner")
    expect(page.get_by_text("No model calls are recorded")).to_be_visible()


def test_rollout_without_calls_names_possible_reasons(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('preparing').rollout_id}")

    expect(page.get_by_text("What to do")).to_be_visible()
    expect(page.get_by_text("no recorded call names")).to_contain_text("some calls were lost")


def test_rollout_with_answers_gives_no_reason(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('succeeded').rollout_id}")

    expect(page.get_by_role("heading", name="Why there is no training data")).to_have_count(0)


def test_rollout_known_only_from_a_call_is_shown(look: Open) -> None:
    page = look(f"/rollout?id={LONG}")

    expect(page.get_by_role("heading", name=LONG)).to_be_visible()
    expect(page.get_by_text("never queued here")).to_be_visible()
    expect(calls(page)).to_have_count(1)


def test_unknown_id_says_so_and_links_to_the_table(look: Open) -> None:
    page = look("/rollout?id=nothing")

    expect(page.get_by_role("heading", name="There is no rollout 'nothing'")).to_be_visible()
    page.get_by_role("link", name="All rollouts").click()
    expect(page.get_by_role("heading", name="Rollouts")).to_be_visible()


def test_triplets_link_downloads_them(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("succeeded")
    page = look(f"/rollout?id={rollout.rollout_id}")
    with page.expect_download() as download:
        page.get_by_role("link", name="triplets").click()

    found = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    expected = [rollout.generation_id(1, place) for place in range(len(rollout.answers))]
    # One call may have several answers.
    assert list(dict.fromkeys(each["generation_id"] for each in found)) == expected


def test_running_rollout_updates_and_keeps_unfolded_parts(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    rollout = started(trainer, "Does it go on?")
    ids = {"rollout_id": rollout["rollout_id"], "attempt_id": rollout["attempt"]["attempt_id"]}
    page = visit(living).page
    page.goto(f"/rollout?id={ids['rollout_id']}")
    page.get_by_text("Input", exact=True).click()
    expect(page.get_by_text("No model calls are recorded")).to_be_visible()
    with open_store(living.url) as store:
        store.add([generation(number, **ids, finished_at=time.time_ns()) for number in (1, 2)])

    expect(calls(page)).to_have_count(2)
    # Unfolded parts stay unfolded.
    expect(page.get_by_text("Does it go on?")).to_be_visible()
    end(trainer, rollout)
    expect(page.get_by_text("succeeded").first).to_be_visible()


def test_calls_without_a_rollout_are_listed(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    unassigned = generation(7, rollout_id=None, attempt_id=None, prompt_token_ids=array("i", range(77)))
    with open_store(living.url) as store:
        store.add([unassigned])
    page = visit(living).page
    page.goto("/")
    page.get_by_role("link", name="1 call without a rollout").click()
    expect(page.get_by_role("listitem")).to_contain_text("77 tokens")
    page.get_by_role("link", name="Call 1").click()
    expect(page.get_by_role("heading", name="Generation")).to_contain_text(unassigned.id)
    page.get_by_role("link", name="Calls without a rollout").click()
    expect(page.get_by_role("heading", name="Calls without a rollout")).to_be_visible()


def test_outcome_of_a_very_large_span_is_not_read(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    rollout_id = started(trainer, "Is it long?")["rollout_id"]
    of_rollout = {"key": "agentlightning.rollout_id", "value": {"stringValue": rollout_id}}
    spans = [
        {
            "traceId": f"{number:032x}",
            "spanId": f"{number:016x}",
            "name": name,
            "attributes": [of_rollout],
            "status": {"code": 2, "message": "x" * length},
        }
        for number, (name, length) in enumerate({"short": 10, "long": 1 << 20}.items(), start=1)
    ]
    trainer.post("/v1/traces", json={"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).raise_for_status()
    page = visit(living).page
    page.goto(f"/rollout?id={rollout_id}")

    assert ["failed" in each for each in rows(page) if each.startswith(("short", "long"))] == [True, False]
