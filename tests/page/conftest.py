"""A browser, and stores to open with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from agentlightning.generation import Generation
from tests.common.browser import MISSING, Visit, chromium, program
from tests.common.rollouts import Rollout, fill, long_generation
from tests.server.process import StoreServer

COUNT = 250
LONG_IDS = 32_768

Open = Callable[..., Page]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pictures", action="store_true", help="make the pictures in docs/images, which the README shows")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    # For this package alone: while the browser is open, pytest's thread can run no event loop of its own.
    found = program()
    if found is None:
        pytest.skip(MISSING)
    with chromium(found) as browser:
        yield browser


@dataclass(frozen=True)
class Filled:
    """A served store and its contents.

    Attributes:
        rollouts: by start.
        long: a generation of 32,768 ids.
    """

    server: StoreServer
    rollouts: list[Rollout]
    long: Generation

    def rollout(self, status: str) -> Rollout:
        """Return the latest rollout with this status."""
        return next(each for each in reversed(self.rollouts) if each.status == status)


@pytest.fixture(scope="package")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    """A store that tests share and never change."""
    path = tmp_path_factory.mktemp("page") / "store.db"
    rollouts = fill(str(path), COUNT)
    long = long_generation(str(path), LONG_IDS)
    with StoreServer(path) as server:
        yield Filled(server, rollouts, long)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Open a window on a store; at its end, the test fails if a page did something forbidden."""
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
    """Open an address of the filled store; return the page."""

    def look(address: str, **options: Any) -> Page:
        page = visit(filled.server, **options).page
        page.goto(address)
        return page

    return look


@pytest.fixture(scope="package")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A store that tests change."""
    with StoreServer(tmp_path_factory.mktemp("living") / "store.db") as server:
        yield server


@pytest.fixture
def trainer(living: StoreServer) -> Iterator[httpx.Client]:
    with living.client() as client:
        yield client


def started(trainer: httpx.Client, question: str) -> dict[str, Any]:
    """Start a rollout."""
    return trainer.post("/v1/agl/rollouts", json={"input": {"question": question}}).raise_for_status().json()


def end(trainer: httpx.Client, rollout: dict[str, Any]) -> None:
    """End a rollout's attempt as succeeded."""
    path = f"/v1/agl/rollouts/{rollout['rollout_id']}/attempts/{rollout['attempt']['attempt_id']}"
    trainer.post(path, json={"status": "succeeded"}).raise_for_status()


def shown_time(seconds: float) -> str:
    """Return a moment as the page shows it to a browser in UTC."""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d\N{NO-BREAK SPACE}%H:%M:%S}"
