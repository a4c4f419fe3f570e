"""The commands that `make demo` prints at its end, with which the tiny model is served by hand."""

from __future__ import annotations

import json
import os
import shlex

import pytest

from examples.demo import by_hand
from tests.common.environments import CHECKOUT
from tests.common.vllm import LITTLE_CACHE, QUIET, SMALL


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """The words of both commands, as a shell in the checkout splits them."""
    monkeypatch.chdir(CHECKOUT)
    _, serve, _, ask = by_hand().replace("\\\n", "").split("\n\n")
    return shlex.split(serve), shlex.split(ask)


def test_command_serves_the_tiny_model_as_the_demo_did(commands: tuple[list[str], list[str]]) -> None:
    serve, _ = commands
    variables = {"AGL_INSTRUMENT": "1", **QUIET}

    assert dict(word.split("=") for word in serve[: len(variables)]) == variables
    vllm, subcommand, model, *options = serve[len(variables) :]
    assert os.access(vllm, os.X_OK)
    assert (subcommand, options) == ("serve", [*SMALL, *LITTLE_CACHE])
    assert os.path.isfile(f"{model}/config.json")


def test_curl_asks_for_the_model_that_is_served(commands: tuple[list[str], list[str]]) -> None:
    serve, ask = commands

    assert json.loads(ask[-1])["model"] == serve[serve.index("serve") + 1]


def test_commands_fit_into_80_columns(commands: tuple[list[str], list[str]]) -> None:
    assert max(map(len, by_hand().splitlines())) <= 80
