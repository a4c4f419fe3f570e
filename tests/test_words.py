"""Docstrings begin with a verb or a noun."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.tier("check")

ROOT = Path(__file__).parents[1]
FOLDERS = ("agentlightning", "benchmarks", "examples", "tests", "tools")
HEADLESS = {
    *("As", "By", "For", "How", "If", "In", "Of", "That", "These", "Those", "What", "Whatever", "When", "Where"),
    *("Whether", "Which", "Who", "Whoever", "Whose", "Why", "With", "Without"),
}
"""Words that begin a clause without a head."""


def test_docstrings_are_read_and_none_begins_with_a_headless_clause() -> None:
    files = [ROOT / "_agentlightning.py", *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    first_lines = [
        (str(file.relative_to(ROOT)), found[0].strip(), found[1])
        for file in files
        for found in re.finditer(r'^ *"""(\w+).*', file.read_text(), re.MULTILINE)
    ]

    assert len(first_lines) > 3_000
    assert [(file, line) for file, line, word in first_lines if word in HEADLESS] == []
