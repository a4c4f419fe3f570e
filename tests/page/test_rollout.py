"""One rollout: what happened in it and when, what was said, and why there is nothing where there is nothing."""

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
    """The timeline, from top to bottom."""
    return page.get_by_role("region", name="Timeline").get_by_role("listitem").all_inner_texts()


def calls(page: Page) -> Locator:
    return page.get_by_role("region", name="Conversation").get_by_role("listitem")


def test_its_timeline_has_the_attempt_its_spans_and_the_calls_below_them(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("succeeded")
    found = rows(look(f"/rollout?id={rollout.rollout_id}"))

    assert rollout.attempt_id(1) in found[0]
    names = ["Attempt 1", "agent", "openai.chat.completion", "/v1/chat/completions: ", "calculator"]
    assert all(text.startswith(name) for name, text in zip(names, found, strict=False))
    assert "agentlightning.annotation" in found[-1]
    assert "reward 1" in found[-1]
    assert sum("/v1/chat/completions" in each for each in found) == len(rollout.answers)


def test_one_that_was_tried_again_has_both_attempts_and_how_they_ended(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("failed")
    found = rows(look(f"/rollout?id={rollout.rollout_id}"))

    [first, second] = [each for each in found if each.startswith("Attempt")]
    assert rollout.attempt_id(1) in first
    assert "timeout" in first
    assert rollout.attempt_id(2) in second
    assert "failed" in second
    assert any("aborted" in each for each in found[1 : found.index(second)])


def test_what_was_said_is_read_in_order_and_once(look: Open, filled: Filled) -> None:
    rollout = next(each for each in filled.rollouts if each.number % 5 and each.status == "succeeded")
    page = look(f"/rollout?id={rollout.rollout_id}")

    expect(calls(page)).to_have_count(len(rollout.answers))
    expect(calls(page).first).to_contain_text(rollout.question)
    for place, answer in enumerate(rollout.answers):
        expect(calls(page).nth(place)).to_contain_text(answer)
    expect(calls(page).filter(has_text=rollout.question)).to_have_count(1)
    expect(calls(page).last).to_contain_text("reward 1")


def test_from_the_list_to_a_call_and_back(look: Open, filled: Filled) -> None:
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


def test_its_input_is_there(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("queuing")
    page = look(f"/rollout?id={rollout.rollout_id}")
    page.get_by_text("Input", exact=True).click()

    expect(page.get_by_text(rollout.question)).to_be_visible()


def test_one_that_waits_says_so(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('queuing').rollout_id}")

    expect(page.get_by_role("heading", name="Why there is nothing")).to_be_visible()
    expect(page.get_by_text("it is waiting in the queue")).to_be_visible()
    expect(page.get_by_text("What to do")).to_contain_text("runner")
    expect(page.get_by_text("No model call is recorded")).to_be_visible()


def test_one_of_which_nothing_was_recorded_says_why_that_may_be(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('preparing').rollout_id}")

    expect(page.get_by_text("What to do")).to_be_visible()
    expect(page.get_by_text("no recorded call names")).to_contain_text("some calls were lost")


def test_one_that_has_answers_needs_no_reason(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('succeeded').rollout_id}")

    expect(page.get_by_role("heading", name="Why there is nothing")).to_have_count(0)


def test_one_that_only_a_server_knows_is_shown_too(look: Open) -> None:
    page = look(f"/rollout?id={LONG}")

    expect(page.get_by_role("heading", name=LONG)).to_be_visible()
    expect(page.get_by_text("the queue of this store does not have it")).to_be_visible()
    expect(calls(page)).to_have_count(1)


def test_one_that_is_not_there_is_said_not_to_be(look: Open) -> None:
    page = look("/rollout?id=nothing")

    expect(page.get_by_role("heading", name="There is no rollout 'nothing'")).to_be_visible()
    page.get_by_role("link", name="All rollouts").click()
    expect(page.get_by_role("heading", name="Rollouts")).to_be_visible()


def test_its_triplets_are_a_click_away(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("succeeded")
    page = look(f"/rollout?id={rollout.rollout_id}")
    with page.expect_download() as download:
        page.get_by_role("link", name="triplets").click()

    found = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    expected = [rollout.generation_id(1, place) for place in range(len(rollout.answers))]
    # A call may have been asked for several answers.
    assert list(dict.fromkeys(each["generation_id"] for each in found)) == expected


def test_one_that_goes_on_is_shown_as_it_is(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    rollout = started(trainer, "Does it go on?")
    ids = {"rollout_id": rollout["rollout_id"], "attempt_id": rollout["attempt"]["attempt_id"]}
    page = visit(living).page
    page.goto(f"/rollout?id={ids['rollout_id']}")
    page.get_by_text("Input", exact=True).click()
    expect(page.get_by_text("No model call is recorded")).to_be_visible()
    with open_store(living.url) as store:
        store.add([generation(number, **ids, finished_at=time.time_ns()) for number in (1, 2)])

    expect(calls(page)).to_have_count(2)
    # What somebody has opened stays so.
    expect(page.get_by_text("Does it go on?")).to_be_visible()
    end(trainer, rollout)
    expect(page.get_by_text("succeeded").first).to_be_visible()


def test_calls_that_named_no_rollout_are_found(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    nobodys = generation(7, rollout_id=None, attempt_id=None, prompt_token_ids=array("i", range(77)))
    with open_store(living.url) as store:
        store.add([nobodys])
    page = visit(living).page
    page.goto("/")
    page.get_by_role("link", name="1 call without a rollout").click()
    expect(page.get_by_role("listitem")).to_contain_text("77 tokens")
    page.get_by_role("link", name="Call 1").click()
    expect(page.get_by_role("heading", name="Generation")).to_contain_text(nobodys.id)
    page.get_by_role("link", name="Calls without a rollout").click()
    expect(page.get_by_role("heading", name="Calls without a rollout")).to_be_visible()


def test_how_a_span_ended_is_not_looked_for_in_a_body_of_mebibytes(
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
