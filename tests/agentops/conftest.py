"""A store for the AgentOps SDK, and the SDK's environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agentops.client import SdkClient
from tests.common.vllm import without_agl
from tests.server.process import StoreServer
from tools.agentops import agentops

SCRIPTS = Path(__file__).parent / "sdk"
SECONDS = 180

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], str]) -> Iterator[StoreServer]:
    """`agl store --agentops` without a key, shared by tests with traces of their own."""
    path = tmp_path_factory.mktemp("store") / "shared.db"
    with StoreServer(path, "--agentops", store=new_store(path)) as server:
        yield server


@pytest.fixture
def client(store: StoreServer) -> Iterator[httpx.Client]:
    with store.client() as client:
        yield client


@pytest.fixture
def sdk(client: httpx.Client) -> SdkClient:
    """A client that is logged in."""
    return SdkClient(client)


@pytest.fixture(scope="session")
def sdk_python() -> Path:
    """The Python with the AgentOps SDK and OpenTelemetry 1.44."""
    return agentops() / "python"


@pytest.fixture(scope="session")
def run_sdk(sdk_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a script of the folder `sdk` against a server; return its last line of output, decoded as JSON."""
    # The SDK writes a log file into its working directory.
    folder = tmp_path_factory.mktemp("sdk")

    def run(server: StoreServer, script: str, *arguments: str, **variables: str) -> Any:
        environment = {
            "AGENTOPS_API_KEY": server.key or "any",
            "AGENTOPS_API_ENDPOINT": server.url,
            "AGENTOPS_EXPORTER_ENDPOINT": f"{server.url}/v1/traces",
            "AGENTOPS_APP_URL": server.url,
            # The SDK always sends its metrics to AgentOps: this proxy does not exist.
            "HTTPS_PROXY": "http://127.0.0.1:9",
        }
        result = subprocess.run(
            [str(sdk_python), str(SCRIPTS / script), *arguments],
            env={**without_agl(os.environ), **environment, **variables},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run
