"""The conversation of a rollout: the new part of each prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentlightning.generation import Choice
from agentlightning.server.page import conversation
from agentlightning.server.page.conversation import conversation_of
from agentlightning.store import open_database, open_store
from tests.common.generations import generation

pytestmark = pytest.mark.tier("check")


def new_texts(
    path: Path, *calls: tuple[str | None, str | None], attempts: str = "aaaaa"
) -> list[tuple[str | None, bool]]:
    """Return the new part of each prompt (given with its answer), and whether it continues earlier text."""
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
        found = conversation_of(connection, "r")
    database.close()
    assert found.left_out == 0
    return [(call.new_text, call.is_continued) for call in found.calls]


def test_call_shows_only_the_new_part_of_its_prompt(tmp_path: Path) -> None:
    assert new_texts(
        tmp_path / "store.db", ("Q1 A:", "one"), ("Q1 A:one Q2 A:", "two"), ("Q1 A:one Q2 A:two Q3", "")
    ) == [
        ("Q1 A:", False),
        (" Q2 A:", True),
        (" Q3", True),
    ]


def test_answer_without_its_reasoning_in_the_next_prompt_counts_as_repeated(tmp_path: Path) -> None:
    assert new_texts(tmp_path / "store.db", ("Q1 A:", "<think>hm</think>one"), ("Q1 A:one Q2 A:", "two")) == [
        ("Q1 A:", False),
        ("one Q2 A:", True),
    ]


def test_alternating_agents_continue_their_own_prompts(tmp_path: Path) -> None:
    calls = ("plan A:", "p"), ("write A:", "w"), ("plan A:p more", "q"), ("write A:w more", "x")

    assert new_texts(tmp_path / "store.db", *calls) == [
        ("plan A:", False),
        ("write A:", False),
        (" more", True),
        (" more", True),
    ]


def test_new_attempt_shows_its_whole_prompt(tmp_path: Path) -> None:
    assert new_texts(tmp_path / "store.db", ("Q A:", "1"), ("Q A:", "1"), attempts="ab") == [("Q A:", False)] * 2


@pytest.mark.parametrize("answer", [None, ""])
def test_call_without_text_has_no_new_text(tmp_path: Path, answer: str | None) -> None:
    assert new_texts(tmp_path / "store.db", (None, answer), (None, answer)) == [(None, False)] * 2


def test_calls_of_an_agent_are_found_behind_those_that_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "CALLS_SHOWN", 5)
    path = str(tmp_path / "store.db")
    late = {"agent_id": "late", "parent_agent_id": "main", "purpose": "review", "retry": 1}
    with open_store(path) as store:
        store.add([generation(number, rollout_id="r", agent_id="main", retry=0) for number in range(9)])
        store.add([generation(9, rollout_id="r", **late)])
    database = open_database(path)
    with database.reading() as connection:
        whole = conversation_of(connection, "r")
        found = {field: conversation_of(connection, "r", {field: value}) for field, value in late.items()}
        both = conversation_of(connection, "r", {"agent_id": "main", "purpose": "review"})
    database.close()

    assert (whole.count, len(whole.calls), len(whole.matching), whole.left_out) == (10, 5, 5, 5)
    assert whole.callers == {
        "agent_id": ["late", "main"],
        "parent_agent_id": ["main"],
        "purpose": ["review"],
        "retry": [0, 1],
    }
    for each in found.values():
        assert [call.agent_id for call in each.matching] == ["late"]
        assert (each.count, each.left_out) == (10, 0)
    assert not both.matching
