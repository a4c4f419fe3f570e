"""The output of `make demo-agent`, and the whole demo with an agent that needs no Node.js."""

from __future__ import annotations

import re
import subprocess
import sys
from array import array
from typing import Any

import pytest

from agentlightning.generation import Choice, Generation
from examples.agent import tree
from tests.common.environments import CHECKOUT

LONG = "a very long answer\n" * 10


def call(number: int, text: str, **fields: Any) -> Generation:
    return Generation(
        id=f"01a22d9d-4125-7631-accc-{number:012}",
        request_id=f"chatcmpl-{number}",
        finished_at=number,
        status="finished",
        prompt_token_ids=array("i", range(1000 * number)),
        choices=[Choice(text=text, token_ids=array("i", range(len(text))))],
        **fields,
    )


@pytest.mark.tier("check")
@pytest.mark.parametrize(("main", "parent"), [(None, None), (None, "session"), ("main", "main")])
def test_a_sub_agent_stands_below_the_main_agent_where_it_first_called(main: str | None, parent: str | None) -> None:
    """Calls as Claude Code, opencode and Codex make them."""
    calls = [
        call(1, "one", agent_id=main, purpose="main"),
        call(2, "two", agent_id="sub", parent_agent_id=parent),
        call(3, "three", agent_id=main),
        call(4, "four", agent_id="sub", parent_agent_id=parent),
    ]

    assert list(tree(calls)) == [
        f"main agent {main}" if main else "main agent",
        "  01a22d9d-4125-7631-accc-000000000001  1,000 + 3 ids     main",
        "    one",
        "    0 1 2",
        "  sub-agent sub",
        "    01a22d9d-4125-7631-accc-000000000002  2,000 + 3 ids",
        "      two",
        "      0 1 2",
        "    01a22d9d-4125-7631-accc-000000000004  4,000 + 4 ids",
        "      four",
        "      0 1 2 3",
        "  01a22d9d-4125-7631-accc-000000000003  3,000 + 5 ids",
        "    three",
        "    0 1 2 3 4",
    ]


@pytest.mark.tier("check")
def test_the_tree_fits_into_80_columns() -> None:
    calls = [
        call(1, LONG, purpose=LONG.replace("\n", " ")),
        call(2, LONG, agent_id="x" * 36),
        call(3, LONG, agent_id="x" * 36),
    ]

    assert max(map(len, tree(calls))) == 80


@pytest.mark.tier("all")
def test_the_demo_runs_an_agent_and_shows_its_calls_and_rows() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.agent", "mini"],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert re.search(r"^mini-SWE-agent, in rollout ro-\S+$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^  [0-9a-f-]{36}  \d,\d{3} \+ \d+ ids$", done.stdout, re.MULTILINE)) == 2
    assert re.search(r"^  1 +1 +\d,\d{3} +\d+  drifted$", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.tier("check")
def test_without_an_agent_it_says_which_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "examples.agent"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (
        1,
        "demo-agent: say which agent: make demo-agent AGENT=claude|codex|opencode|qwen|mini\n",
    )
