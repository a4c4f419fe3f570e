"""Errors in a browser are pages; for programs they are sentences in JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.common.browser import Visit
from tests.page.conftest import Filled, Open
from tests.server.process import StoreServer

ERRORS = {
    "an unknown page": ("/nothing/here", 404, "There is no such route"),
    "an unknown script": ("/page/0.0.0/nothing.js", 404, "There is no such route"),
    "an unknown record": ("/v1/agl/generations/nothing", 404, "There is no generation"),
    "a wrong query": ("/rollouts?page=first", 422, "page"),
    "a route of another method": ("/v1/agl/queues/rollouts/dequeue", 405, "POST"),
}


@pytest.mark.parametrize(("address", "status", "text"), ERRORS.values(), ids=ERRORS)
def test_error_in_a_browser_is_a_page(look: Open, filled: Filled, address: str, status: int, text: str) -> None:
    page = look(address)

    expect(page.get_by_role("main")).to_contain_text(text)
    page.get_by_role("link", name="All rollouts").click()
    expect(page.get_by_role("heading", name="Rollouts")).to_be_visible()
    # A program gets the same as JSON.
    answer = httpx.get(filled.server.url + address)
    assert answer.status_code == status
    assert text.lower() in answer.json()["detail"].lower()
    assert httpx.get(filled.server.url + address, headers={"Accept": "text/html"}).status_code == status


def test_missing_key_in_a_browser_is_a_page_that_says_how_to_send_it(
    visit: Callable[..., Visit], tmp_path: Path
) -> None:
    with StoreServer(tmp_path / "store.db", key="correct-horse") as server:
        page = visit(server, key="wrong").page
        page.goto("/")

        expect(page.get_by_role("heading", name="Unauthorized")).to_be_visible()
        expect(page.get_by_text("http://agl:KEY@HOST")).to_be_visible()
        answer = httpx.get(server.url, headers={"Accept": "text/html"})
        assert (answer.status_code, answer.headers["www-authenticate"][:5]) == (401, "Basic")
