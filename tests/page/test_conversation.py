"""The conversation of a rollout: the new part of each prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentlightning.server.page import conversation
from agentlightning.server.page.conversation import EarlierTexts, conversation_of
from agentlightning.store import open_database, open_store
from tests.common.generations import generation

pytestmark = pytest.mark.tier("check")


def beginnings(*calls: tuple[str | None, str | None]) -> list[tuple[str | None, str | None, int | None]]:
    """Return what is new in each prompt (given with its answer), how it begins, and as which call."""
    earlier = EarlierTexts()
    found: list[tuple[str | None, str | None, int | None]] = []
    for number, (prompt, answer) in enumerate(calls, 1):
        start, relation, before = earlier.add(number, prompt, [answer])
        found.append((None if prompt is None else prompt[start:], relation, before))
    return found


def test_call_shows_only_the_new_part_of_its_prompt() -> None:
    assert beginnings(("Q1 A:", "one"), ("Q1 A:one Q2 A:", "two"), ("Q1 A:one Q2 A:two Q3", "")) == [
        ("Q1 A:", None, None),
        (" Q2 A:", "continues", 1),
        (" Q3", "continues", 2),
    ]


def test_answer_without_its_reasoning_in_the_next_prompt_is_told_from_one_as_it_was() -> None:
    assert beginnings(("Q1 A:", "<think>hm</think>one"), ("Q1 A:one Q2 A:", "two"), ("Q1 A:one Q2 A:two Q3", "")) == [
        ("Q1 A:", None, None),
        ("one Q2 A:", "repeats", 1),
        (" Q3", "continues", 2),
    ]


def test_alternating_agents_continue_their_own_prompts() -> None:
    assert beginnings(("plan A:", "p"), ("write A:", "w"), ("plan A:p more", "q"), ("write A:w more", "x")) == [
        ("plan A:", None, None),
        ("write A:", None, None),
        (" more", "continues", 1),
        (" more", "continues", 2),
    ]


def test_branch_from_an_earlier_call_continues_that_call() -> None:
    assert beginnings(("Q1 A:", "one"), ("Q1 A:one Q2 A:", "two"), ("Q1 A:one Q3 A:", "three"))[2] == (
        " Q3 A:",
        "continues",
        1,
    )


def test_prompt_that_is_sent_again_has_nothing_new() -> None:
    prompt = f"{turn('user', 'Q')}<|im_start|>assistant\n"

    assert beginnings((prompt, "one"), (prompt, "two"))[1] == ("<|im_start|>assistant\n", "repeats", 1)


def test_prompts_with_the_same_system_message_differ_by_whole_messages() -> None:
    first, second = (turn("system", "Work.") + turn("user", f"Question {each}") for each in (1, 2))

    assert beginnings((first, ""), (second, ""))[1] == (turn("user", "Question 2"), "shares", 1)
    # Without a mark between messages, prompts that begin alike have nothing to do with each other.
    assert beginnings(("Question 1", ""), ("Question 2", ""))[1] == ("Question 2", None, None)


@pytest.mark.parametrize("answer", [None, ""])
def test_call_without_text_has_no_new_text(answer: str | None) -> None:
    assert beginnings((None, answer), (None, answer)) == [(None, None, None)] * 2


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def test_new_attempt_shows_its_whole_prompt_and_only_a_part_of_a_long_one(tmp_path: Path) -> None:
    path = str(tmp_path / "store.db")
    prompt = turn("system", "s" * 500_000) + turn("user", "Q")
    with open_store(path) as store:
        store.add(
            [generation(n, rollout_id="r", attempt_id=each, prompt_text=prompt) for n, each in enumerate("aab", 1)]
        )
    database = open_database(path)
    with database.reading() as connection:
        found = conversation_of(connection, "r")
    database.close()

    assert [call.beginning.relation for call in found.calls] == [None, "repeats", None]
    for call in (found.calls[0], found.calls[2]):
        assert call.new is not None
        assert [each.role for each in call.new.messages] == ["system", "user"]
        characters = sum(len(part.text) for each in call.new.messages for part in each.parts)
        assert characters + call.new.characters_left_out == 500_001
        assert characters < 50_000


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


def test_texts_beyond_what_is_kept_are_forgotten_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "CHARACTERS_KEPT", 25)
    calls = [(f"{letter * 10}", "") for letter in "abc"] + [("c" * 10 + "d", ""), ("a" * 10 + "d", "")]

    assert [relation for _, relation, _ in beginnings(*calls)] == [None, None, None, "continues", None]
