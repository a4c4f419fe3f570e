"""Tests of where our log lines go, to vLLM's handlers or the program's, on a made-up vLLM, which starts at once."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from agentlightning import __version__
from tests.common.made_up_vllm import VERSION, made_up_vllm
from tests.instrumentation.vllm.test_strict import python

pytestmark = pytest.mark.skipif(
    "exclude_if" not in FieldInfo.__slots__, reason="pydantic before 2.12 cannot have the field on chat responses"
)

# As vLLM's own module does it, whose format has more in it.
LOGGER = """\
import os
from logging.config import dictConfig

dictConfig({
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"vllm": {"format": "%(levelname)s [%(filename)s] %(message)s"}},
    "handlers": {"vllm": {"class": "logging.StreamHandler", "formatter": "vllm", "stream": "ext://sys.stdout"}},
    "loggers": {"vllm": {
        "handlers": ["vllm"], "level": os.environ.get("VLLM_LOGGING_LEVEL", "INFO"), "propagate": False
    }},
})
"""
SERVE = """\
import logging, multiprocessing, sys
{first}
from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", "serve"]
main()
"""


def served(folder: Path, first: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Serve in a program that does something else first."""
    made_up_vllm(folder, edits={"__version__ = ": "import vllm.logger\n__version__ = "})
    (folder / "vllm" / "logger.py").write_text(LOGGER)
    result = python(folder, "-c", SERVE.format(first=first), **{"AGL_INSTRUMENT": "1", **variables})
    assert result.returncode == 0, result.stderr
    assert "served\n" in result.stdout
    return result


def our_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "agentlightning: " in line]


def test_start_is_one_line_in_vllms_form_where_vllms_lines_go(tmp_path: Path) -> None:
    result = served(tmp_path)

    [line] = our_lines(result.stdout)
    assert re.fullmatch(
        rf"INFO \[_status\.py\] agentlightning: release {re.escape(__version__)} is on in vLLM {re.escape(VERSION)}; "
        r"\d+ patch sets applied, .*; answers carry prompt and response ids; "
        r"nothing is recorded, since AGL_STORE is not set",
        line,
    )
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("value", "said"),
    [("response", "answers carry response ids"), ("none", "answers carry ids only where a request asks for them")],
)
def test_start_says_what_answers_carry(tmp_path: Path, value: str, said: str) -> None:
    [line] = our_lines(served(tmp_path, AGL_RETURN_TOKEN_IDS=value).stdout)

    assert f"; {said}; " in line


@pytest.mark.parametrize(("name", "lines"), [("ApiServer_0", 1), ("ApiServer_1", 0), ("ApiServer_12", 0)])
def test_start_is_told_by_one_process_of_a_server(tmp_path: Path, name: str, lines: int) -> None:
    result = served(tmp_path, f"multiprocessing.current_process().name = {name!r}")

    assert len(our_lines(result.stdout)) == lines


def test_logger_has_the_level_of_vllms_log(tmp_path: Path) -> None:
    result = served(tmp_path, VLLM_LOGGING_LEVEL="WARNING", AGL_RETURN_TOKEN_IDS="some")

    [line] = our_lines(result.stdout)
    assert line.startswith("WARNING [settings.py] agentlightning: AGL_RETURN_TOKEN_IDS='some' is not one of ")


def test_logger_survives_that_vllm_configures_logging_again(tmp_path: Path) -> None:
    # As with --log-level, or a file for --log-config-file.
    again = 'logging.getLogger("vllm").handlers[0].setFormatter(logging.Formatter("again: %(message)s"))'
    new = 'handler = logging.StreamHandler(); logging.getLogger("vllm").handlers = [handler]'

    result = served(tmp_path, f"import vllm.logger; {new}; {again}")

    assert our_lines(result.stdout) == []
    [line] = our_lines(result.stderr)
    assert line.startswith("again: agentlightning: release ")


def test_logger_that_the_program_has_configured_stays_as_it_is(tmp_path: Path) -> None:
    handler = 'handler = logging.StreamHandler(); handler.setFormatter(logging.Formatter("mine: %(message)s"))'
    configure = 'logger = logging.getLogger("agentlightning"); logger.addHandler(handler); logger.setLevel("INFO")'

    result = served(tmp_path, f"{handler}; {configure}")

    assert our_lines(result.stdout) == []
    [line] = our_lines(result.stderr)
    assert line.startswith("mine: agentlightning: release ")


def test_line_that_cannot_be_made_stops_no_server(tmp_path: Path) -> None:
    result = served(tmp_path, "multiprocessing.current_process = None")

    [line] = our_lines(result.stdout)
    assert line.startswith("ERROR [_isolation.py] agentlightning: saying what is on failed; vLLM continues without it.")
