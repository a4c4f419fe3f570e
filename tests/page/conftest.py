"""A browser, and stores to look at with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from agentlightning.generation import Generation
from tests.common.browser import MILLISECONDS, MISSING, Visit, chromium, program
from tests.common.rollouts import Rollout, fill, long_generation
from tests.server.process import StoreServer

COUNT = 250
LONG_IDS = 32_768

Open = Callable[..., Page]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", action="store_true", help="make the pictures of docs/images, which the README shows")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    # For these tests alone: while it is there, the thread that pytest runs in can have no event loop of its own.
    found = program()
    if found is None:
        pytest.skip(MISSING)
    expect.set_options(timeout=MILLISECONDS)
    with chromium(found) as browser:
        yield browser


@dataclass(frozen=True)
class Filled:
    """A store that is served, and what is in it.

    Attributes:
        rollouts: in the order of their start.
        long: a generation of 32,768 ids.
    """

    server: StoreServer
    rollouts: list[Rollout]
    long: Generation

    def rollout(self, status: str) -> Rollout:
        """The latest of those that have this status."""
        return next(each for each in reversed(self.rollouts) if each.status == status)


@pytest.fixture(scope="package")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """Tests share it, and change nothing in it."""
    path = tmp_path_factory.mktemp("page") / "store.db"
    rollouts = fill(str(path), COUNT)
    long = long_generation(str(path), LONG_IDS)
    with StoreServer(path) as server:
        yield Filled(server, rollouts, long)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens a window on a store; what no page may do in it fails the test at its end."""
    visits: list[Visit] = []

    def visit(server: StoreServer, **options: Any) -> Visit:
        visits.append(Visit(browser, server.url, **options))
        return visits[-1]

    yield visit
    complaints = [complaint for each in visits for complaint in each.complaints]
    for each in visits:
        each.close()
    assert not complaints


@pytest.fixture
def look(visit: Callable[..., Visit], filled: Filled) -> Open:
    """Opens an address of the filled store, and gives the page."""

    def look(address: str, **options: Any) -> Page:
        page = visit(filled.server, **options).page
        page.goto(address)
        return page

    return look


@pytest.fixture(scope="package")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A store in which something happens."""
    with StoreServer(tmp_path_factory.mktemp("living") / "store.db") as server:
        yield server


@pytest.fixture
def trainer(living: StoreServer) -> Iterator[httpx.Client]:
    with living.client() as client:
        yield client


def started(trainer: httpx.Client, question: str) -> dict[str, Any]:
    """A rollout that has begun."""
    return trainer.post("/v1/agl/rollouts", json={"input": {"question": question}}).raise_for_status().json()


def end(trainer: httpx.Client, rollout: dict[str, Any]) -> None:
    """Let its attempt succeed."""
    path = f"/v1/agl/rollouts/{rollout['rollout_id']}/attempts/{rollout['attempt']['attempt_id']}"
    trainer.post(path, json={"status": "succeeded"}).raise_for_status()
