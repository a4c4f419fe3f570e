"""The conversation of a rollout: what each call says that was not said before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentlightning.generation import Choice
from agentlightning.server.page.conversation import conversation_of
from agentlightning.store import open_database, open_store
from tests.common.generations import generation

pytestmark = pytest.mark.tier("check")


def said(path: Path, *calls: tuple[str | None, str | None], attempts: str = "aaaaa") -> list[tuple[str | None, bool]]:
    """What is new in each of these prompts, given with their answers; and whether it goes on from what was before."""
    with open_store(str(path)) as store:
        store.add(
            [
                generation(
                    number, rollout_id="r", attempt_id=attempt, prompt_text=prompt, choices=[Choice(text=answer)]
                )
                for number, ((prompt, answer), attempt) in enumerate(zip(calls, attempts, strict=False))
            ]
        )
    database = open_database(str(path))
    with database.reading() as connection:
        found, left_out = conversation_of(connection, "r")
    database.close()
    assert left_out == 0
    return [(call.new_text, call.is_continued) for call in found]


def test_a_prompt_has_what_was_said_since(tmp_path: Path) -> None:
    assert said(tmp_path / "store.db", ("Q1 A:", "one"), ("Q1 A:one Q2 A:", "two"), ("Q1 A:one Q2 A:two Q3", "")) == [
        ("Q1 A:", False),
        (" Q2 A:", True),
        (" Q3", True),
    ]


def test_what_a_template_has_left_out_of_an_answer_is_not_said_again(tmp_path: Path) -> None:
    assert said(tmp_path / "store.db", ("Q1 A:", "<think>hm</think>one"), ("Q1 A:one Q2 A:", "two")) == [
        ("Q1 A:", False),
        ("one Q2 A:", True),
    ]


def test_two_agents_that_take_turns_have_a_conversation_each(tmp_path: Path) -> None:
    calls = ("plan A:", "p"), ("write A:", "w"), ("plan A:p more", "q"), ("write A:w more", "x")

    assert said(tmp_path / "store.db", *calls) == [
        ("plan A:", False),
        ("write A:", False),
        (" more", True),
        (" more", True),
    ]


def test_an_attempt_begins_anew(tmp_path: Path) -> None:
    assert said(tmp_path / "store.db", ("Q A:", "1"), ("Q A:", "1"), attempts="ab") == [("Q A:", False)] * 2


@pytest.mark.parametrize("answer", [None, ""])
def test_where_no_text_is_kept_nothing_is_said(tmp_path: Path, answer: str | None) -> None:
    assert said(tmp_path / "store.db", (None, answer), (None, answer)) == [(None, False)] * 2
