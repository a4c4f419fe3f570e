"""The releases that are tested, a server of each, and the page that tells what came of it."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import plugins
from tests.common.environments import CHECKOUT
from tests.common.tiny_model import TOOLS_FIRST, tiny_model
from tests.common.vllm import PLAIN, SMALL, RemoteOpenAIServer
from tests.releases.engine import Engine, engine_of
from tests.releases.environments import folder, named, scripts
from tests.releases.report import Report, release_of
from tests.releases.table import COMPILED, RELEASES, Release

CONTINUES_SINCE = (0, 14, 0)
"""The first release in which a chat goes on from exact ids."""
PARSERS = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")
# Before 0.10.2 by this package's command.
AGL = ("python", "-m", "agentlightning.cli.vllm", "serve")


def pytest_addoption(parser: pytest.Parser) -> None:
    releases = "tests/releases on these: versions, or an empty text for all (make test-releases)"
    parser.addoption("--releases", help=releases)
    parser.addoption("--keep-results", action="store_true", help="for docs/releases.md, which tells those of all")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    # Each needs an environment of its own, which `make test-releases` makes.
    return True if config.getoption("--releases", default=None) is None else None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "check(name): what the table may leave out of the checks of a release")
    if (selection := config.getoption("--releases", default=None)) is not None:
        try:
            releases = named(selection.split())
        except ValueError as error:
            raise pytest.UsageError(error) from None
        config.stash[SELECTED] = releases
        if config.getoption("--keep-results"):
            config.pluginmanager.register(Report(releases))


SELECTED = pytest.StashKey[list[Release]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "release" in metafunc.fixturenames:
        releases = metafunc.config.stash[SELECTED]
        metafunc.parametrize("release", releases, ids=[release.name for release in releases], scope="session")


def is_of_a_release(item: pytest.Item) -> bool:
    return "release" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # One release after the other, whose servers are started once: pytest's own order comes back to each.
    names = [release.name for release in RELEASES]
    # Of each release the plugins first: what they are shown later is also the end of what other tests have asked.
    items.sort(
        key=lambda item: (
            names.index(release_of(item).name) if is_of_a_release(item) else -1,
            item.path.name != "test_user_plugins.py",
        )
    )
    for item in items:
        check = item.get_closest_marker("check")
        if check and (why := release_of(item).left_out.get(check.args[0])):
            item.add_marker(pytest.mark.skip(why))


@pytest.fixture(scope="session")
def model(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model; where transformers is older than the one that wrote it, under a name that this knows."""
    if not any(pin.startswith("transformers==4") for pin in release.pins):
        return tiny_model()
    model = shutil.copytree(tiny_model(), tmp_path_factory.mktemp(release.name) / "tiny-model")
    tokenizer = model / "tokenizer_config.json"
    tokenizer.write_text(
        json.dumps({**json.loads(tokenizer.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return model


def server(
    release: Release, model: Path, *arguments: str, armed: bool, store: Path | None = None, shown: Path | None = None
) -> RemoteOpenAIServer:
    command = AGL if armed and release.numbers < (0, 10, 2) else PLAIN
    env = {
        # For the worker that is not vLLM's.
        "PYTHONPATH": str(CHECKOUT),
        # GiB, which every release knows.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **({"AGL_INSTRUMENT": "1"} if armed else {}),
        **({"AGL_STORE": str(store), "AGL_LOGPROBS": "on"} if store else {}),
        **({"AGL_CONTINUE": "on"} if store and release.numbers >= CONTINUES_SINCE else {}),
        "LD_PRELOAD": ":".join(str(folder(release) / "lib" / library) for library in release.preload),
        # Said by name: 0.8.5 falls back to V0 where nobody does.
        **({"VLLM_USE_V1": release.engine.removeprefix("V")} if release.numbers < (0, 11) else {}),
    }
    # The V0 engine has other schedulers.
    if shown is not None and release.engine == "V1":
        env |= plugins.environment(shown)
        arguments = (*plugins.arguments(release.numbers, release.worker == COMPILED), *arguments)
    # Without a model the type of its weights is nothing, but 0.8.5 has V1 only for half precision.
    worker = () if release.worker == COMPILED else (f"--worker-cls={release.worker}", "--dtype=bfloat16")
    # One that appends, where tools come first.
    template = (f"--chat-template={TOOLS_FIRST}",) if release.numbers >= CONTINUES_SINCE else ()
    arguments = (*PARSERS, *worker, *template, *arguments)
    return RemoteOpenAIServer(*arguments, command=command, env=env, model=model, small=SMALL, scripts=scripts(release))


@pytest.fixture
def rollout() -> str:
    """An id that no other test uses."""
    return f"ro-{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def engine(release: Release) -> Engine:
    return engine_of(release)


@pytest.fixture(scope="session")
def armed(release: Release, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteOpenAIServer]:
    """The release's server with us, which records too, and a user's plugins in it."""
    folder = tmp_path_factory.mktemp("armed")
    shown = folder / "shown.jsonl"
    with server(release, model, armed=True, store=folder / "generations.db", shown=shown) as armed:
        yield armed


@pytest.fixture(scope="session")
def plain(release: Release, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteOpenAIServer]:
    """The same without."""
    with server(release, model, armed=False, shown=tmp_path_factory.mktemp("plain") / "shown.jsonl") as plain:
        yield plain


@pytest.fixture(scope="session")
def two_api_servers(release: Release, model: Path) -> Iterator[RemoteOpenAIServer]:
    with server(release, model, "--api-server-count=2", armed=True) as two:
        yield two
