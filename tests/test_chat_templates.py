"""The table of chat templates in docs/continuation.md is what the templates do."""

from __future__ import annotations

import pytest

from tools.chat_templates import PAGE, outcomes, table, templates

pytestmark = [pytest.mark.tier("all"), pytest.mark.takes_long("downloads the wheel with the templates")]


def test_the_page_has_the_table_of_the_templates() -> None:
    assert table() in PAGE.read_text()


def test_the_templates_of_qwen_append() -> None:
    assert outcomes(templates()["qwen2_5"])[:2] == ["yes", "yes"]
    assert outcomes(templates()["qwen3"]) == ["yes", "yes", "reasoning dropped", "yes"]
