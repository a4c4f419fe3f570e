"""Tests of `--help` and of wrong arguments, for every command."""

from __future__ import annotations

import pytest

from agentlightning.cli import COMMANDS
from tests.common.terminal import on_terminal
from tests.common.vllm import SCRIPTS

AGL = str(SCRIPTS / "agl")
# `agl vllm` passes all arguments on.
OURS = [command for command in COMMANDS if command != "vllm"]


@pytest.mark.parametrize("command", [None, *OURS], ids=lambda command: command or "agl")
@pytest.mark.parametrize("columns", [72, 140])
def test_help_wraps_to_the_terminal(command: str | None, columns: int) -> None:
    shown, status = on_terminal((AGL, *([command] if command else []), "--help"), columns)

    assert status == 0
    widths = [len(line) for line in shown.splitlines()]
    # It uses the width that there is, and no more. Only examples that must stay whole are longer than half of it.
    assert columns / 2 < max(widths) <= columns


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("exprot",),
            "agl: unknown command 'exprot'; the commands are vllm, doctor, export, drift, store, migrate, prune,",
        ),
        (("export", "--rolout", "a"), "agl export: unrecognized arguments: --rolout a"),
        (("doctor", "--rollout", "a"), "agl doctor: --rollout needs --store"),
        (("store", "--port", "http"), "agl store: argument --port: 'http' is not a port; ports go from 0 to 65535"),
        (("agentops", "--max-body-mb"), "agl agentops: argument --max-body-mb: expected one argument"),
        (("store", "--n-workers", "2"), "agl store: --n-workers is an option of Agent Lightning 0.3; one process is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_argument_is_answered_by_one_sentence_and_where_to_look(
    arguments: tuple[str, ...], sentence: str
) -> None:
    shown, status = on_terminal((AGL, *arguments), 1000, {"AGL_STORE": "a.db"})

    first, *rest = shown.splitlines()
    assert (status, rest) == (2, [f"see {first.partition(':')[0]} --help"])
    assert first.startswith(sentence)
