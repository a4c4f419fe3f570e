"""Strange ids and texts are shown exactly, link correctly, and are never executed."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urljoin

import pytest
from playwright.sync_api import expect

from agentlightning.generation import Choice
from agentlightning.sender import Sender, Vocabulary
from agentlightning.store import generations, open_database, senders
from tests.common.browser import Visit
from tests.common.generations import HOSTILE, generation
from tests.page.conftest import started
from tests.page.test_every_page import violations
from tests.server.process import StoreServer
from tests.server.test_queue import span

# Ids that no route accepts, and ids that are invisible.
LISTED = {name: HOSTILE[name] for name in ("a NUL", "a NUL alone", "long", "blanks", "nothing")}
STRANGE = {
    "a script": "<script>alert(1)</script>",
    "an image": "\"'><img src=x onerror=alert(1)>",
    "a template": "{{ 7 * 7 }}${7 * 7}{% raw %}",
    "a query": "a&b=c#d?e%20+f",
    "an element of htmx": '<div hx-get="/" hx-trigger="load">',
    "from right to left": "\N{RIGHT-TO-LEFT OVERRIDE}abc \N{HEBREW LETTER ALEF}",
    "as long as it may be": "y" * 512,
    **{name: text for name, text in HOSTILE.items() if name not in LISTED},
}
AT_LEAST = ("a script", "a query", "from right to left", "as long as it may be", "a path", "any Unicode")
"""All are on the first page of each test; only these are followed to their pages outside of the largest tier."""
EVERYTHING = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>{{ 7 * 7 }}<b hx-get='/' hx-trigger='load'>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A store of strange ids and texts."""
    sender = Sender(
        host=EVERYTHING,
        pid=1,
        started_at=0,
        version=EVERYTHING,
        vllm=EVERYTHING,
        model=EVERYTHING,
        vocabulary=Vocabulary([EVERYTHING, "\0", "\ud800", None], frozenset([1])),
    )
    choice = Choice(
        token_ids=array("i", [0, 1, 2, 3, 4, -1]), text=EVERYTHING, finish_reason=EVERYTHING, stop_reason=EVERYTHING
    )
    texts: dict[str, Any] = dict.fromkeys(("model", "endpoint", "prompt_text", "session_id"), EVERYTHING)
    ids = {**LISTED, **STRANGE}.values()
    made = [generation(number, rollout_id=each, choices=[choice], **texts) for number, each in enumerate(ids)]
    with StoreServer(tmp_path_factory.mktemp("strange") / "store.db") as server:
        with closing(open_database(server.store)) as database, database.writing() as connection:
            senders.register(connection, sender)
            generations.add(connection, made, sender.id)
        yield server


@pytest.mark.parametrize(
    "rollout_id",
    [
        pytest.param(text, id=name, marks=() if name in AT_LEAST else pytest.mark.tier("all"))
        for name, text in STRANGE.items()
    ],
)
def test_strange_id_is_shown_and_links_to_its_rollout(
    server: StoreServer, visit: Callable[..., Visit], rollout_id: str
) -> None:
    page = visit(server, size="phone").page
    page.goto("/rollouts")
    # Ids with invisible characters are shown as JSON.
    name = rollout_id if rollout_id.isprintable() else json.dumps(rollout_id)
    page.get_by_role("link", name=name, exact=True).click()
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_contain_text("Rollout")
    assert heading.text_content() == f"Rollout {rollout_id}"
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    page.get_by_role("link", name="Call 1", exact=True).click()
    page.get_by_role("link", name=rollout_id, exact=True).click()
    expect(heading).to_contain_text("Rollout")
    assert heading.text_content() == f"Rollout {rollout_id}"
    with server.client() as client:
        triplet = client.get(urljoin(page.url, page.get_by_role("link", name="triplets").get_attribute("href"))).json()
    assert triplet["rollout_id"] == rollout_id


def test_markup_in_texts_is_shown_as_text(server: StoreServer, visit: Callable[..., Visit]) -> None:
    with server.client() as client:
        rollout = started(client, EVERYTHING)
        failed = {"status_code": "ERROR", "description": EVERYTHING}
        attributes = {EVERYTHING: EVERYTHING}
        sent = {**span(rollout, 1), "name": EVERYTHING, "status": failed, "attributes": attributes}
        client.post("/v1/agl/spans", json=sent).raise_for_status()
    page = visit(server).page
    page.goto(f"/rollout?id={rollout['rollout_id']}")
    expect(page.get_by_role("region", name="Timeline").get_by_text(EVERYTHING)).to_be_visible()
    page.get_by_text("Input", exact=True).click()
    expect(page.get_by_text(json.dumps(EVERYTHING))).to_be_visible()
    for address in (
        "/senders",
        f"/?name={EVERYTHING}",
        f"/rollouts?q={EVERYTHING}&tag={EVERYTHING}&reward={EVERYTHING}",
        f"/rollout?id={EVERYTHING}",
        f"/generation?id={EVERYTHING}",
    ):
        page.goto(address)
        assert violations(page) == []
    expect(page.get_by_role("heading", level=1)).to_contain_text("alert(1)")


def test_strange_generation_shows_each_token(server: StoreServer, visit: Callable[..., Visit]) -> None:
    page = visit(server).page
    page.goto("/rollouts?q=y")
    page.get_by_role("link", name=STRANGE["as long as it may be"]).click()
    expect(page.get_by_role("region", name="Conversation").get_by_text(EVERYTHING).first).to_be_visible()
    page.get_by_role("link", name="Call 1", exact=True).click()
    # Loaded with its scripts, without which a click on a token shows nothing.
    page.wait_for_url("**/generation?*")
    answer = page.get_by_role("group", name="Answer")
    answer.get_by_text(EVERYTHING).click()
    expect(page.get_by_text("Token 0:")).to_contain_text(json.dumps(EVERYTHING))
    answer.focus()
    page.keyboard.press("End")
    expect(page.get_by_text("Token 5:")).to_contain_text('"[-1]", id -1')
    page.get_by_text("12 tokens", exact=True).click()
    expect(page.get_by_role("group", name="Prompt: ")).to_contain_text("[21]")
