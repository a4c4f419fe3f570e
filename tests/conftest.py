"""The servers that tests share: each is started once, by the first test that asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.common.debian import skipped_parts
from tests.common.environments import CHECKOUT
from tests.common.postgresql import MISSING, PostgresServer, programs
from tests.common.script import arguments, environment, write
from tests.common.tool_loop import with_tool_loop
from tests.common.vllm import AGL, RemoteOpenAIServer
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer

# Before torch is imported, here and in what the tests start: several threads of the tiny model wait for each other by
# spinning, which takes forty times the CPU on busy cores.
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ("tests.common.tiers", "tests.common.forked", "tests.common.groups", "tests.common.ending")

PARSERS = (
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
    "--reasoning-parser=qwen3",
    # Random weights never end their reasoning by themselves: there too, the tests force what is said.
    '--structured-outputs-config={"enable_in_reasoning": true}',
)


# What is off in vLLM unless it is asked for.
OPTIONAL = ("--enable-prompt-embeds", "--enable-scale-out")
OPTIONAL_ENV = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}


def pytest_report_header() -> list[str]:
    return skipped_parts()


def pytest_sessionstart(session: pytest.Session) -> None:
    # Before any test is forked: each would make a base folder of its own, which nobody removes.
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def armed() -> Iterator[RemoteOpenAIServer]:
    """`AGL_INSTRUMENT=1 vllm serve`."""
    with RemoteOpenAIServer(*OPTIONAL, env={"AGL_INSTRUMENT": "1", **OPTIONAL_ENV}) as server:
        yield server


@pytest.fixture(scope="session")
def plain() -> Iterator[RemoteOpenAIServer]:
    """`vllm serve`, without us."""
    with RemoteOpenAIServer(*OPTIONAL, env=OPTIONAL_ENV, forks=True) as server:
        yield server


@pytest.fixture(scope="session")
def two_api_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    """`agl vllm serve` with two API server processes in front of one engine; both write one file, without any text."""
    path = tmp_path_factory.mktemp("store") / "generations.db"
    with RecordingServer(path, "--api-server-count=2", command=AGL, env={"AGL_RECORD_TEXT": "off"}) as server:
        yield server


@pytest.fixture(scope="session")
def guarded() -> Iterator[RemoteOpenAIServer]:
    """Strict, with a key, behind a proxy's path and two parsers, and `AGL_RETURN_TOKEN_IDS=response`."""
    env = {"AGL_INSTRUMENT": "strict", "AGL_RETURN_TOKEN_IDS": "response", **OPTIONAL_ENV}
    # The key is what the clients send.
    with RemoteOpenAIServer("--api-key=none", "--root-path=/root", *PARSERS, env=env, forks=True) as server:
        yield server


@pytest.fixture(scope="session")
def parsing(guarded: RemoteOpenAIServer) -> RemoteOpenAIServer:
    """The same one, under the name of what its parsers are about."""
    return guarded


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    """A server with a key, answers without ids unless a request asks, and two calls of the model for each response."""
    env = {
        "AGL_RETURN_TOKEN_IDS": "none",
        "PYTHONPATH": os.pathsep.join([str(with_tool_loop(tmp_path_factory.mktemp("loop"))), str(CHECKOUT)]),
        **OPTIONAL_ENV,
    }
    details = "--enable-prompt-tokens-details"
    arguments = (*OPTIONAL, details, "--api-key=none", "--middleware=tests.recording.under_way.UnderWay")
    path = tmp_path_factory.mktemp("store") / "generations.db"
    with RecordingServer(path, *arguments, env=env, forks=True) as server:
        yield server


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Servers that start within seconds."""
    with Nursery() as nursery:
        yield nursery


@dataclass(frozen=True)
class ScriptedServer:
    """A recording server whose tiny model says what a script has for a prompt.

    Attributes:
        script: the file that the server reads it from.
    """

    server: RecordingServer
    script: Path

    def follows(self, lines: Mapping[str, str]) -> None:
        """Let the model follow these lines, by cue, from now on."""
        write(self.script, lines)


@pytest.fixture(scope="session")
def scripted(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """A server for agents, with room for their long prompts."""
    folder = tmp_path_factory.mktemp("scripted")
    script = folder / "script.json"
    env = {"AGL_LOGPROBS": "on", **environment(script)}
    with nursery.server(folder / "generations.db", *arguments(), env=env) as server:
        yield ScriptedServer(server, script)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """An empty PostgreSQL, with a database for each test that asks for one."""
    found = programs()
    if found is None:
        pytest.skip(MISSING)
    with PostgresServer(found) as server:
        yield server


@pytest.fixture(scope="session", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.tier("test"))])
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Gives the URL of a store that is not there yet: of the file of this path, or of a database of PostgreSQL."""
    if request.param == "sqlite":
        return str
    postgresql: PostgresServer = request.getfixturevalue("postgresql")
    return lambda _: postgresql.new_database()
