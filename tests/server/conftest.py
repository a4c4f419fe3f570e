"""A store that tests share, and the environment of Agent Lightning 0.3."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.process import StoreServer
from tools.peer import peer

ON_EITHER = ("test_about.py", "test_agent_lightning.py", "test_hostile.py", "test_malformed.py", "test_senders.py")
"""Files about requests more than about storage: on PostgreSQL in the largest tier alone."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        is_one = item.path.parent == Path(__file__).parent and item.path.name in ON_EITHER
        if is_one and callspec and callspec.params.get("new_store") == "postgresql":
            item.add_marker(pytest.mark.tier("all"), append=False)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], str]) -> Iterator[StoreServer]:
    """`agl store`, without a key. Tests share it: each has rollouts of its own."""
    path = tmp_path_factory.mktemp("store") / "shared.db"
    with StoreServer(path, store=new_store(path)) as server:
        yield server


@pytest.fixture
def client(store: StoreServer) -> Iterator[httpx.Client]:
    with store.client() as client:
        yield client


@pytest.fixture(scope="session")
def lightning() -> Path:
    """The folder of the interpreter that has Agent Lightning 0.3 and OpenTelemetry 1.38."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("peers run beside the Python that vLLM is tested with")
    return peer()
