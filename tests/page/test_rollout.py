"""The page of one rollout: timeline, conversation, and the reason why there is no data."""

from __future__ import annotations

import json
import re
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from playwright.sync_api import Locator, Page, expect

from agentlightning.store import open_store
from agentlightning.store.attributes import RESPONSE
from tests.common.browser import Visit
from tests.common.clock import an_hour_ahead, standing_still
from tests.common.generations import SECOND, generation
from tests.common.rollouts import LONG, end_time, fill, long_prompts
from tests.page.conftest import Filled, Open, end, shown_time, started
from tests.server.process import StoreServer

REWARD = "agentlightning.reward.0.value"


def rows(page: Page) -> list[str]:
    """Return the texts of the timeline, from top to bottom."""
    return page.get_by_role("region", name="Timeline").get_by_role("listitem").all_inner_texts()


def send_span(
    trainer: httpx.Client, rollout_id: str, number: int, name: str, ended: int, attributes: dict[str, Any]
) -> None:
    """Send a span of a tenth of a second over OTLP, which names no attempt."""
    named = {"agentlightning.rollout_id": {"stringValue": rollout_id}, **attributes}
    span = {
        "traceId": f"{number:032x}",
        "spanId": f"{number:016x}",
        "name": name,
        "startTimeUnixNano": str(ended - SECOND // 10),
        "endTimeUnixNano": str(ended),
        "attributes": [{"key": key, "value": value} for key, value in named.items()],
    }
    trainer.post("/v1/traces", json={"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).raise_for_status()


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
    one, other = rollout.factors
    expect(calls(page).first).to_contain_text("Calls calculator")
    expect(calls(page).first).to_contain_text(f'"expression": "{one} * {other}"')
    expect(calls(page).nth(1)).to_contain_text("Continues call 1. New in this prompt:")
    expect(calls(page).nth(1)).to_contain_text(f"Tool result\n{one * other}", use_inner_text=True)
    expect(calls(page).last).to_contain_text(rollout.answers[-1])
    expect(calls(page).filter(has_text=rollout.question)).to_have_count(1)
    expect(calls(page).last).to_contain_text("reward 1")
    # The system prompt is folded, and the text as it was is one click away.
    system = calls(page).first.get_by_text("You are a careful assistant")
    expect(system).to_be_hidden()
    calls(page).first.get_by_text("System prompt (").click()
    expect(system).to_be_visible()
    calls(page).first.get_by_text("Raw text", exact=True).click()
    expect(calls(page).first.get_by_text("<|im_start|>system")).to_contain_text(rollout.question)
    expect(calls(page).first).to_contain_text(rollout.answers[0])


def test_header_has_task_reward_tokens_worker_model_and_weights(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("succeeded")
    page = look(f"/rollout?id={rollout.rollout_id}")

    expect(page.locator(".task")).to_have_text(rollout.question)
    facts = page.locator("dl.facts")
    for name, value in (
        ("Reward", "1"),
        ("Worker", f"runner-{rollout.number % 4}"),
        ("Model", "Qwen/Qwen3-0.6B"),
        ("Weights", "step-0"),
    ):
        expect(facts.locator("div").filter(has_text=name).locator("dd")).to_have_text(value)
    with open_store(filled.server.url) as store:
        found = [*store.generations(rollout_id=rollout.rollout_id)]
    inputs = sum(len(each.prompt_token_ids or ()) for each in found)
    outputs = sum(len(choice.token_ids or ()) for each in found for choice in each.choices)
    expect(facts.locator("div").filter(has_text="Tokens").locator("dd")).to_have_text(f"{inputs} in, {outputs} out")


def test_previous_and_next_go_through_the_rollouts(look: Open, filled: Filled) -> None:
    before, rollout, after = filled.rollouts[-4:-1]
    page = look(f"/rollout?id={rollout.rollout_id}")
    heading = page.get_by_role("heading", level=1)
    page.get_by_role("link", name="Previous rollout").click()
    expect(heading).to_contain_text(before.rollout_id)
    page.get_by_role("link", name="Next rollout").click()
    expect(heading).to_contain_text(rollout.rollout_id)
    page.get_by_role("link", name="Next rollout").click()
    expect(heading).to_contain_text(after.rollout_id)
    expect(look(f"/rollout?id={filled.rollouts[0].rollout_id}").get_by_text("Previous")).to_have_count(0)


def test_links_lead_from_the_table_to_a_call_and_back(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("succeeded")
    page = look("/rollouts")
    page.get_by_role("link", name=rollout.rollout_id).click()
    page.get_by_role("region", name="Timeline").get_by_role("link").first.click()
    expect(page.get_by_role("heading", name="Generation")).to_contain_text(rollout.generation_id(1, 0))
    page.get_by_role("link", name=rollout.rollout_id).click()
    page.get_by_role("link", name="Call 2", exact=True).click()
    expect(page.get_by_role("heading", name="Generation")).to_contain_text(rollout.generation_id(1, 1))
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="Rollouts").click()
    expect(page.get_by_role("heading", name="Rollouts")).to_be_visible()


def test_input_unfolds(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("queuing")
    page = look(f"/rollout?id={rollout.rollout_id}")
    page.get_by_text("Input", exact=True).click()

    expect(page.get_by_text(json.dumps({"question": rollout.question}))).to_be_visible()


def test_queued_rollout_says_that_it_waits(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('queuing').rollout_id}")

    expect(page.get_by_role("heading", name="Why there is no training data")).to_be_visible()
    expect(page.get_by_text("it is waiting in the queue")).to_be_visible()
    expect(page.get_by_text("What to do")).to_contain_text("runner")
    expect(page.get_by_text("No model calls are recorded")).to_be_visible()


def test_rollout_without_calls_names_possible_reasons(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('cancelled').rollout_id}")

    expect(page.get_by_text("What to do")).to_be_visible()
    expect(page.get_by_text("no recorded call names")).to_contain_text("some calls were lost")


def test_rollout_that_was_just_dequeued_is_just_started(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", env=standing_still("2026-11-25 10:00:00")) as server:
        with server.client() as trainer:
            rollout_id = started(trainer, "Has it begun?")["rollout_id"]
        page = visit(server).page
        page.goto("/rollouts")
        expect(page.get_by_role("row").filter(has_text=rollout_id)).to_contain_text("it has just started")
        page.get_by_role("link", name=rollout_id).click()

        expect(page.get_by_text("it has just started.")).to_be_visible()


def test_rollout_without_calls_for_minutes_gives_a_reason(visit: Callable[..., Visit], tmp_path: Path) -> None:
    rollouts = fill(str(tmp_path / "store.db"), 10)
    rollout_id = next(each.rollout_id for each in rollouts if each.status == "preparing")
    with StoreServer(tmp_path / "store.db", env=an_hour_ahead()) as server:
        page = visit(server).page
        page.goto(f"/rollout?id={rollout_id}")

        expect(page.get_by_text("no recorded call names")).to_be_visible()


def test_facts_tell_when_it_was_queued_and_started_and_how_long_it_took(look: Open, filled: Filled) -> None:
    rollout = filled.rollout("failed")
    page = look(f"/rollout?id={rollout.rollout_id}")

    def fact(name: str) -> str:
        return page.locator("dl.facts > div").filter(has_text=name).locator("dd").inner_text()

    # The first of two attempts starts a quarter of a second after it was queued.
    assert fact("Queued") == shown_time(rollout.start_time)
    assert fact("Started") == shown_time(rollout.start_time + 0.25)
    seconds = end_time(rollout) - rollout.start_time - 0.25
    assert fact("Took") == f"{seconds:.1f}\N{NO-BREAK SPACE}s"


def test_queued_rollout_has_not_started(look: Open, filled: Filled) -> None:
    page = look(f"/rollout?id={filled.rollout('queuing').rollout_id}")
    facts = page.locator("dl.facts")

    expect(facts).to_contain_text(re.compile("Queued.*Started\\s*\N{EN DASH}.*Took\\s*\N{EN DASH}", re.DOTALL))


def test_reward_over_otlp_stands_below_the_attempt_of_the_calls(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    rollout_id = f"never queued {time.time_ns()}"
    ended = time.time_ns()
    times = {"started_at": ended - SECOND // 2, "finished_at": ended}
    call = generation(1, rollout_id=rollout_id, attempt_id=None, **times)
    with open_store(living.url) as store:
        store.add([call])
    send_span(trainer, rollout_id, 1, "chat", ended, {RESPONSE: {"stringValue": call.response_id}})
    send_span(trainer, rollout_id, 2, "reward", ended + SECOND, {REWARD: {"doubleValue": 1 / 396}})
    page = visit(living).page
    page.goto(f"/rollout?id={rollout_id}")

    found = rows(page)
    names = ["Calls that name no attempt", "chat", "/v1/chat/completions", "reward"]
    assert [each for each, name in zip(found, names, strict=True) if not each.startswith(name)] == []
    # The call stands below the span that names its answer.
    expect(page.locator(".generation.d2")).to_have_count(1)
    expect(page.get_by_text("reward 0.002525").first).to_be_visible()
    # All digits on hover.
    expect(page.get_by_title(str(1 / 396)).first).to_have_text("0.002525")
    page.goto(f"/rollouts?q={quote(rollout_id)}")
    [row] = page.get_by_role("row").filter(has_text=rollout_id).all()
    expect(row).to_contain_text("500\N{NO-BREAK SPACE}ms")


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
    expect(page.get_by_text('{"question":"Does it go on?"}')).to_be_visible()
    end(trainer, rollout)
    expect(page.get_by_text("succeeded").first).to_be_visible()


def test_calls_without_a_rollout_are_listed(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    unassigned = generation(7, rollout_id=None, attempt_id=None, prompt_token_ids=array("i", range(77)))
    with open_store(living.url) as store:
        store.add([unassigned])
    page = visit(living).page
    page.goto("/rollouts")
    page.get_by_role("link", name="1 call without a rollout").click()
    expect(page.get_by_role("listitem")).to_contain_text("77 tokens")
    page.get_by_role("link", name="Call 1", exact=True).click()
    expect(page.get_by_role("heading", name="Generation")).to_contain_text(unassigned.id)
    page.get_by_role("link", name="Calls without a rollout").click()
    expect(page.get_by_role("heading", name="Calls without a rollout")).to_be_visible()


def test_calls_say_which_agent_made_them_and_are_filtered_by_it(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    def prompt(system: str) -> str:
        return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"

    said: list[dict[str, Any]] = [
        {"prompt_text": prompt("You plan.")},
        {"prompt_text": prompt("You are a title generator.")},
        {"agent_id": "child", "parent_agent_id": "main", "purpose": "review", "retry": 2},
        {"agent_id": "child", "purpose": "compaction"},
    ]
    with open_store(living.url) as store:
        store.add([generation(n, rollout_id="agents", attempt_id="a", **each) for n, each in enumerate(said)])
    page = visit(living).page
    page.goto("/rollout?id=agents")
    expect(calls(page)).to_have_count(4)
    expect(calls(page).nth(0)).to_contain_text("maybe agent 1 (a guess: system prompts or tools differ)")
    expect(calls(page).nth(1)).to_contain_text("maybe agent 2 (a guess: system prompts or tools differ)")
    expect(calls(page).nth(1)).to_contain_text("maybe for a title (a guess by its instructions)")
    expect(calls(page).nth(2)).to_contain_text("agent child · started by main · review · retry 2")
    expect(calls(page).nth(3)).not_to_contain_text("guess")

    page.get_by_role("navigation", name="Agents").get_by_role("link", name="child").click()
    expect(calls(page)).to_have_count(2)
    page.get_by_role("navigation", name="Purposes").get_by_role("link", name="review").click()
    expect(calls(page)).to_have_count(1)
    page.get_by_role("link", name="All agents").click()
    page.get_by_role("link", name="All purposes").click()
    expect(calls(page)).to_have_count(4)
    page.get_by_role("navigation", name="Started by").get_by_role("link", name="main").click()
    expect(calls(page)).to_have_count(1)
    page.get_by_role("link", name="Started by any").click()
    page.get_by_role("navigation", name="Retries").get_by_role("link", name="retry 2").click()
    expect(calls(page)).to_have_count(1)


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


def test_running_rollout_that_has_not_changed_sends_nothing(visit: Callable[..., Visit], tmp_path: Path) -> None:
    still = standing_still("2026-11-25 10:00:00")
    with StoreServer(tmp_path / "store.db", env=still) as server, server.client() as trainer:
        rollout = started(trainer, "Does anything happen?")
        page = visit(server).page
        with page.expect_response(lambda each: "seen=" in each.url) as unchanged:
            page.goto(f"/rollout?id={rollout['rollout_id']}")
        assert unchanged.value.status == 204
        end(trainer, rollout)
        expect(page.get_by_text("succeeded").first).to_be_visible()


def test_long_prompts_are_shortened_and_compared_on_demand(visit: Callable[..., Visit], tmp_path: Path) -> None:
    # More ids than are compared while a page loads.
    rollout_id = long_prompts(str(tmp_path / "store.db"), 60, 300_000)
    with StoreServer(tmp_path / "store.db") as server:
        page = visit(server).page
        opened = page.goto(f"/rollout?id={rollout_id}")

        assert opened is not None
        # Of 18 MB.
        assert len(opened.body()) < 2_000_000
        expect(calls(page)).to_have_count(60)
        expect(calls(page).first).to_contain_text(re.compile(r"Shortened by 29\d.\d{3} characters"))
        prompts = page.get_by_role("region", name="Prompts")
        prompts.get_by_role("link", name="Compare them").click()
        expect(prompts.get_by_role("listitem")).to_have_count(60)
        # The text itself comes when it is asked for.
        last = calls(page).last
        last.get_by_text("Raw text", exact=True).click()
        expect(last.get_by_text("It is minute 59.").last).to_contain_text("<|im_start|>assistant")
