"""Two rollouts, or two attempts, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from agentlightning.generation import Choice
from agentlightning.server.page.comparison import marked
from agentlightning.store import open_store
from tests.common.browser import Visit
from tests.common.generations import SECOND, START, generation
from tests.page.conftest import Filled, Open, end, started
from tests.page.test_every_page import violations
from tests.server.process import StoreServer


def halves(page: Page) -> list[str]:
    return page.locator(".half").all_inner_texts()


def test_two_rollouts_of_a_task_differ_where_they_are_marked(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    rollouts: list[dict[str, Any]] = []
    for number, answer in enumerate(("It is 42, I think.", "It is 43, I think.")):
        rollout = started(trainer, "What is 6 times 7, twice asked?")
        ids = {"rollout_id": rollout["rollout_id"], "attempt_id": rollout["attempt"]["attempt_id"]}
        prompt = "<|im_start|>user\nWhat is 6 times 7?<|im_end|>\n<|im_start|>assistant\n"
        times = {"finished_at": START + number * SECOND, "started_at": START}
        said = [Choice(text=answer)]
        with open_store(living.url) as store:
            store.add([generation(880 + number, **ids, **times, prompt_text=prompt, choices=said)])
        end(trainer, rollout)
        rollouts.append(rollout)
    one, other = (each["rollout_id"] for each in rollouts)
    page = visit(living).page
    page.goto(f"/rollout?id={one}")
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_role("heading", name="Of the same task")).to_be_visible()
    assert violations(page) == []
    page.get_by_role("listitem").get_by_role("link", name=other).click()

    expect(page.locator("mark")).to_have_text(["42", "43"])
    assert [("What is 6 times 7?" in each, "I think" in each) for each in halves(page)] == [(True, True)] * 2
    assert violations(page) == []
    # The address shows somebody else the same.
    shared = visit(living).page
    shared.goto(page.url)
    expect(shared.locator("mark")).to_have_text(["42", "43"])
    # Any other rollout is found by its id.
    page.goto(f"/compare?id={one}")
    page.get_by_label("Id of another rollout").fill(one)
    page.keyboard.press("Enter")
    expect(page.locator("mark")).to_have_count(0)
    expect(page.locator(".half").get_by_text("the same")).to_have_count(2)


@pytest.mark.parametrize(("size", "scheme"), [("phone", "light"), ("desktop", "dark")])
def test_attempts_stand_beside_each_other(look: Open, filled: Filled, size: str, scheme: str) -> None:
    rollout = filled.rollout("failed")
    page = look(f"/rollout?id={rollout.rollout_id}", size=size, scheme=scheme)
    page.get_by_role("link", name="Compare with the one before").click()

    facts = page.get_by_role("row").filter(has_text="Status").locator("mark")
    expect(facts).to_have_text(["timeout", "failed"])
    found = halves(page)
    assert len(found) == 2 * len(rollout.answers)
    assert "has no such call" in found[2]
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


@pytest.mark.parametrize("query", ["id=nothing", "id={}&other=nothing", "id={}&attempt=nothing"])
def test_unknown_id_says_so(look: Open, filled: Filled, query: str) -> None:
    page = look(f"/compare?{query.format(filled.rollouts[0].rollout_id)}")

    expect(page.get_by_role("heading", name="One of these is not here")).to_be_visible()


def without_marks(text: str) -> str:
    return text.replace("<mark>", "").replace("</mark>", "")


@pytest.mark.tier("check")
@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("", "", ("", "")),
        ("a b", "a b", ("a b", "a b")),
        ("", "a", ("", "<mark>a</mark>")),
        ("a b c", "a x c", ("a <mark>b</mark> c", "a <mark>x</mark> c")),
        ("a a", "a", ("a<mark> a</mark>", "a")),
        ("<b>", "<i>", ("&lt;<mark>b</mark>&gt;", "&lt;<mark>i</mark>&gt;")),
    ],
)
def test_words_that_differ_are_marked(one: str, other: str, expected: tuple[str, str]) -> None:
    assert marked(one, other) == expected


@pytest.mark.tier("check")
def test_very_long_texts_are_marked_in_linear_time() -> None:
    one, other = (f"begin {each * 10_000}end" for each in ("a ", "b "))

    found = marked(one, other)
    assert [each.count("<mark>") for each in found] == [1, 1]
    assert [without_marks(each) for each in found] == [one, other]
    assert found[0].startswith("begin <mark>a ")
