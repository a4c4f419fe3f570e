"""`docs/commands.md`: what the commands print today."""

from __future__ import annotations

import sys

import pytest

from tools.commands import ERRORS, PAGE, page


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse of Python 3.11 has formatted the page")
def test_the_page_of_the_commands_has_what_they_print() -> None:
    assert page() == PAGE.read_text(), "run: make commands"


def test_the_page_has_the_twenty_commonest_errors_and_nothing_of_this_machine() -> None:
    text = PAGE.read_text()

    assert len(ERRORS) == 20
    assert all(f"$ agl {arguments}\n" in text for arguments in ERRORS)
    for of_this_machine in (sys.prefix, sys.executable, "/tmp", "Traceback"):
        assert of_this_machine not in text
