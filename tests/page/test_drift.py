"""Drift on the page: a column and a filter of the table, the tree of a rollout's prompts, and causes over time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
from playwright.sync_api import Page, expect

from agentlightning.drift import AttemptDrift
from agentlightning.server.page.conversation import CALLS_SHOWN
from agentlightning.server.page.drift_page import CALLS_COMPARED, trees_of
from agentlightning.store import open_store
from tests.common.browser import Visit
from tests.drift.conversations import TEMPLATE, call_of, conversation, record
from tests.page.test_every_page import violations
from tests.server.process import StoreServer
from tests.server.test_drift import until_compared

BROKEN, WHOLE = "drift-broken", "drift-whole"


@pytest.fixture(scope="module")
def drifted(living: StoreServer) -> StoreServer:
    """Record a rollout whose second prompt drifts, and one whose does not, just now."""
    now = time.time_ns()
    with open_store(living.url) as store:
        for number, (rollout, answer) in enumerate(((BROKEN, "It is.\n\n"), (WHOLE, "It is."))):
            calls = conversation(rollout, answer, 1000 + 2 * number, "drifting")
            record(store, *(replace(each, finished_at=now + place) for place, each in enumerate(calls)))
    until_compared(living)
    return living


@pytest.fixture
def page(visit: Callable[..., Visit], drifted: StoreServer) -> Page:
    return visit(drifted).page


def test_the_table_has_breaks_and_a_filter_for_them(page: Page) -> None:
    page.goto(f"/rollouts?q={BROKEN[:6]}")
    rows = page.get_by_role("row").filter(has_text="drift-")
    expect(rows).to_have_count(2)
    expect(rows.filter(has_text=BROKEN).get_by_role("link", name="1", exact=True)).to_be_visible()

    page.get_by_role("textbox", name="Breaks").fill("1..")
    page.get_by_role("button", name="Search").click()

    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(BROKEN)


def test_a_rollout_shows_its_prompts_as_a_tree_and_both_sides_of_a_break(page: Page) -> None:
    page.goto(f"/rollout?id={BROKEN}")
    tree = page.get_by_role("region", name="Prompts")
    lines = tree.get_by_role("list").get_by_role("listitem")
    expect(lines).to_have_count(2)
    sides = tree.get_by_role("table")
    expect(sides).to_be_hidden()

    tree.get_by_text("answer_end").click()

    expect(tree.get_by_text("Message 2 (assistant)")).to_be_visible()
    expect(sides.get_by_role("row", name="before").locator(".differs")).to_have_text(["↵", "↵"])
    expect(sides.get_by_role("row", name="now")).to_contain_text("<|im_end|>")
    expect(tree.get_by_text("remove its `trim`")).to_be_visible()
    assert violations(page) == []


def test_calls_that_continue_one_another_stand_in_one_line(page: Page) -> None:
    page.goto(f"/rollout?id={WHOLE}")
    tree = page.get_by_role("region", name="Prompts")

    expect(tree.get_by_role("listitem")).to_have_count(1)
    expect(tree.get_by_role("link")).to_have_text(["1", "2"])


def test_a_long_rollout_has_a_tree_of_each_attempt(page: Page, drifted: StoreServer) -> None:
    rollout, calls = "drift-long", CALLS_SHOWN // 2 + 1
    prompts = [TEMPLATE.prompt([{"role": "user", "content": f"How many are {number}?"}]) for number in range(2 * calls)]
    with open_store(drifted.url) as store:
        asked = [call_of(rollout, 2000 + number, prompt, "Few.", "long") for number, prompt in enumerate(prompts)]
        record(store, *(replace(each, attempt_id="ab"[number // calls]) for number, each in enumerate(asked)))

    page.goto(f"/rollout?id={rollout}")
    trees = page.get_by_role("region", name="Prompts")

    expect(trees.get_by_role("heading", level=3)).to_have_text(["Attempt a", "Attempt b"])
    expect(trees.get_by_role("link")).to_have_count(2 * calls)


def test_what_is_left_out_of_a_tree_is_counted() -> None:
    attempt = AttemptDrift(rollout_id="r", attempt_id="a", parents={f"{number}": None for number in range(210)})

    [tree] = trees_of([attempt, AttemptDrift(rollout_id="r", attempt_id="b")])

    assert (tree.attempt_id, len(tree.lines), tree.left_out) == ("a", 200, 10)


def test_a_rollout_of_too_many_calls_says_how_they_are_compared(page: Page, drifted: StoreServer) -> None:
    with open_store(drifted.url) as store:
        record(
            store,
            *(call_of("drift-many", 4000 + number, [1, 2, 3], "Few.", "many") for number in range(CALLS_COMPARED + 1)),
        )

    page.goto("/rollout?id=drift-many")

    expect(page.get_by_role("region", name="Prompts")).to_contain_text("agl drift --rollout")


def test_causes_are_bars_over_time_of_all_models_or_one(page: Page) -> None:
    page.goto("/drift?time=hour&model=drifting")
    row = page.get_by_role("row").filter(has_text="answer_end")

    expect(row.get_by_role("img", name="answer_end in 48 equal parts of the last hour")).to_be_visible()
    expect(row.get_by_role("link", name=BROKEN)).to_be_visible()
    assert violations(page) == []

    page.goto("/drift?model=none")
    expect(page.get_by_text("No prompt broke in the last day.")).to_be_visible()


def test_metrics_count_breaks_by_cause_and_what_can_be_trained(drifted: StoreServer) -> None:
    text = httpx.get(f"{drifted.url}/metrics").text

    [broken] = [
        line for line in text.splitlines() if line.startswith('agentlightning_prefix_breaks_total{cause="answer_end"}')
    ]
    assert float(broken.split()[1]) >= 1
    assert 'agentlightning_trainable_tokens_total{fate="lost"}' in text
