"""Pages of a store with a key, and their scripts and stylesheets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

import agentlightning
from agentlightning.server import page as pages
from tests.common.browser import Visit
from tests.common.rollouts import Rollout, fill
from tests.page.conftest import started
from tests.server.process import StoreServer

KEY = "correct-horse:battery/staple@4747"
STATIC = Path(pages.__file__).parent / "static"


@dataclass(frozen=True)
class Locked:
    """A store with a key, and one of its rollouts."""

    server: StoreServer
    rollout: Rollout

    @property
    def addresses(self) -> list[str]:
        """Addresses of every page, script and stylesheet."""
        generation_id = self.rollout.generation_id(1, 0)
        of_one = [f"/rollout?id={self.rollout.rollout_id}", f"/generation?id={generation_id}"]
        files = [f"/page/{agentlightning.__version__}/{each.name}" for each in STATIC.iterdir()]
        return [
            "/",
            "/rollouts",
            "/rollouts/export",
            "/rollout",
            "/senders",
            "/docs",
            f"/generation/prompt?id={generation_id}",
            *of_one,
            *files,
        ]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    path = tmp_path_factory.mktemp("locked") / "store.db"
    rollouts = fill(str(path), 20)
    with StoreServer(path, key=KEY) as server:
        yield Locked(server, next(each for each in rollouts if each.status == "succeeded"))


@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1]])
def test_pages_without_the_key_answer_401(locked: Locked, key: str | None) -> None:
    with httpx.Client(base_url=locked.server.url, auth=None if key is None else ("agl", key)) as client:
        for address in locked.addresses:
            answer = client.get(address)
            assert answer.status_code == 401, address
            assert answer.headers["www-authenticate"].startswith("Basic ")
            assert locked.rollout.rollout_id not in answer.text
            assert "html" not in answer.text


def test_pages_with_the_key_answer_200(locked: Locked) -> None:
    with locked.server.client() as client:
        assert {client.get(address).status_code for address in locked.addresses} == {200}


def test_browser_with_the_key_shows_every_page(locked: Locked, visit: Callable[..., Visit]) -> None:
    page = visit(locked.server, key=KEY).page
    page.goto("/rollouts")
    page.get_by_role("link", name=locked.rollout.rollout_id).click()
    page.get_by_role("link", name="Call 1", exact=True).click()
    expect(page.get_by_role("img", name="Plot of logprobs").locator("canvas")).to_be_visible()
    page.get_by_role("region", name="Prompt").get_by_text("tokens").click()
    expect(page.get_by_role("group", name="Prompt: ")).to_be_visible()
    page.goto("/rollouts")
    with locked.server.client() as trainer:
        new = started(trainer, "Is it live?")
    expect(page.get_by_role("link", name=new["rollout_id"])).to_be_visible()


def test_browser_with_a_wrong_key_shows_the_reason(locked: Locked, visit: Callable[..., Visit]) -> None:
    page = visit(locked.server, key="wrong").page
    page.goto("/")
    expect(page.get_by_text("the key of this store is missing or wrong")).to_be_visible()
