"""Rewards and notes that a person gives on the page."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from playwright.sync_api import Page, expect

from agentlightning.store import open_store
from tests.common.browser import Visit
from tests.common.generations import generation
from tests.page.conftest import end, started
from tests.page.test_every_page import violations
from tests.server.process import StoreServer

KEY = "s3cret"
NOTE = "<script>alert(1)</script>\nIt asked the wrong tool.\N{RIGHT-TO-LEFT OVERRIDE}"
# Calls of two tests never share an answer.
NUMBERS = itertools.count(70_000)


def with_calls(server: StoreServer, trainer: httpx.Client, question: str) -> tuple[dict[str, Any], list[str]]:
    """Start and end a rollout with two calls; returns it, and the ids of these."""
    rollout = started(trainer, question)
    ids = {"rollout_id": rollout["rollout_id"], "attempt_id": rollout["attempt"]["attempt_id"]}
    calls = [generation(next(NUMBERS), **ids, finished_at=time.time_ns()) for _ in range(2)]
    with open_store(server.url) as store:
        store.add(calls)
    end(trainer, rollout)
    return rollout, [each.id for each in calls]


def fill_in(page: Page, value: str, note: str = "") -> None:
    page.get_by_text("Rate or note").click()
    page.get_by_label("Reward", exact=True).fill(value)
    page.get_by_label("Note", exact=True).fill(note)
    page.get_by_role("button", name="Save").click()


def test_reward_and_note_on_the_page_are_a_span_like_any_other(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    rollout, calls = with_calls(living, trainer, "Is it good?")
    rollout_id = rollout["rollout_id"]
    page = visit(living).page
    page.goto(f"/rollout?id={rollout_id}")
    fill_in(page, "-0.25", NOTE)

    given = page.get_by_role("region", name="Rewards and notes").get_by_role("listitem")
    expect(given).to_have_count(1)
    expect(given).to_contain_text("reward -0.25")
    expect(given).to_contain_text("It asked the wrong tool.")
    assert page.url.endswith(f"/rollout?id={rollout_id}#annotations")
    assert violations(page) == []
    # Of one call, with a reward that takes precedence for that call alone.
    page.get_by_role("link", name="Call 1", exact=True).click()
    page.wait_for_url("**/generation?*")
    fill_in(page, "1e-3")
    expect(page.get_by_text("reward 0.001").first).to_be_visible()
    assert violations(page) == []
    with open_store(living.url) as store:
        spans = store.query_spans(rollout_id)
        rewards = [each.reward for each in store.triplets(rollout_id)]
    attributes = [dict(each.attributes) for each in spans]
    assert [each.name for each in spans] == ["agentlightning.annotation"] * 2
    assert attributes[0]["agentlightning.note"] == NOTE
    assert attributes[0]["agentlightning.reward.0.value"] == -0.25
    assert attributes[1]["agentlightning.generation_id"] == calls[0]
    assert rewards == [0.001, -0.25]


def test_note_alone_gives_no_reward_and_is_no_sign_of_life(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    rollout = started(trainer, "Is it alive?")
    before = trainer.get(f"/v1/agl/rollouts/{rollout['rollout_id']}").json()["attempt"]
    page = visit(living).page
    page.goto(f"/rollout?id={rollout['rollout_id']}")
    # By keyboard alone.
    page.get_by_text("Rate or note").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("Look at this one.")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    expect(page.get_by_role("listitem").filter(has_text="Look at this one.")).to_be_visible()
    expect(page.locator("dl.facts div").filter(has_text="Reward").locator("dd")).to_have_text("\N{EN DASH}")
    assert trainer.get(f"/v1/agl/rollouts/{rollout['rollout_id']}").json()["attempt"] == before


def test_rollout_that_was_only_recorded_is_rated(visit: Callable[..., Visit], living: StoreServer) -> None:
    rollout_id = f"only recorded {time.time_ns()}"
    with open_store(living.url) as store:
        store.add([generation(next(NUMBERS), rollout_id=rollout_id, attempt_id=None)])
    page = visit(living).page
    page.goto(f"/rollout?id={quote(rollout_id)}")
    fill_in(page, "1")

    expect(page.get_by_role("region", name="Rewards and notes")).to_contain_text("reward 1")


def test_page_without_scripts_takes_a_reward(
    visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client
) -> None:
    rollout, _ = with_calls(living, trainer, "Without scripts?")
    page = visit(living, javascript=False).page
    page.goto(f"/rollout?id={rollout['rollout_id']}")
    fill_in(page, "2")

    expect(page.get_by_role("region", name="Rewards and notes")).to_contain_text("reward 2")


def test_empty_form_says_what_to_do(visit: Callable[..., Visit], living: StoreServer, trainer: httpx.Client) -> None:
    rollout, _ = with_calls(living, trainer, "Nothing?")
    page = visit(living).page
    page.goto(f"/rollout?id={rollout['rollout_id']}")
    fill_in(page, "")

    expect(page.get_by_text("Give a reward, a note, or both")).to_be_visible()


OWN = {"Sec-Fetch-Site": "same-origin"}


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"value": "nan"}, 422),
        ({"value": "inf"}, 422),
        ({"value": "much"}, 422),
        ({"value": ""}, 422),
        ({"note": "x" * 10_001}, 422),
        ({"value": "1", "rollout_id": ""}, 422),
        ({"value": "1", "rollout_id": "a\0b"}, 422),
        ({"value": "1", "attempt_id": "another"}, 404),
        ({"value": "1", "generation_id": "another"}, 404),
        ({"value": "1", "rollout_id": "another"}, 404),
        ({f"field {number}": "" for number in range(100)}, 422),
    ],
)
def test_form_with_a_value_that_cannot_be_is_refused(
    living: StoreServer, trainer: httpx.Client, fields: dict[str, str], status: int
) -> None:
    rollout, _ = with_calls(living, trainer, "Which values?")
    answer = httpx.post(f"{living.url}/annotations", data={"rollout_id": rollout["rollout_id"], **fields}, headers=OWN)

    assert answer.status_code == status
    assert answer.json()["detail"]
    with open_store(living.url) as store:
        assert store.query_spans(rollout["rollout_id"]) == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://friend.example"},
        {"Origin": "http://friend.example", "Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
def test_nothing_but_a_page_of_the_store_rates(tmp_path: Path, headers: dict[str, str]) -> None:
    # Not even a page of an origin that may use the HTTP interface.
    with StoreServer(tmp_path / "store.db", "--cors-origin", "http://friend.example") as server:
        with open_store(server.url) as store:
            store.add([generation(1, rollout_id="r", attempt_id=None)])
        fields = {"rollout_id": "r", "value": "1"}
        refused = httpx.post(f"{server.url}/annotations", data=fields, headers=headers)
        accepted = [
            httpx.post(f"{server.url}/annotations", data=fields, headers=each) for each in (OWN, {"Origin": server.url})
        ]
        with open_store(server.url) as store:
            spans = store.query_spans("r")

    assert refused.status_code == 403
    assert [(each.status_code, each.headers["location"]) for each in accepted] == [
        (303, "./rollout?id=r#annotations")
    ] * 2
    assert len(spans) == 2


def test_only_the_holder_of_the_key_rates(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db", key=KEY) as server:
        with open_store(server.store) as store:
            store.add([generation(1, rollout_id="r", attempt_id=None)])
        refused = httpx.post(f"{server.url}/annotations", data={"rollout_id": "r", "value": "1"}, headers=OWN)
        page = visit(server, key=KEY).page
        page.goto("/rollout?id=r")
        fill_in(page, "3")

        expect(page.get_by_role("region", name="Rewards and notes")).to_contain_text("reward 3")
        assert refused.status_code == 401
        with open_store(server.store) as store:
            assert [dict(each.attributes)["agentlightning.reward.0.value"] for each in store.query_spans("r")] == [3]
