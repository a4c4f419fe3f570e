"""Calls as texts, rewards and notes, and the rollouts beside one, as the page reads them from each database."""

from __future__ import annotations

import pytest

from agentlightning.errors import InvalidRecord, NotFound
from agentlightning.generation import Choice
from agentlightning.rollout_records import NewRollout
from agentlightning.store import annotation, ingestion, lifecycle, neighbours, open_store, rollouts, transcript
from agentlightning.store.database import Database
from tests.common.generations import HOSTILE, SECOND, START, generation

pytestmark = pytest.mark.tier("check")


def test_calls_are_read_as_texts_in_order(url: str, database: Database) -> None:
    # Long enough to be stored in blocks, which the calls share.
    begin = "The beginning of a long prompt. " * 400
    texts = {f"{begin}{number}": None if number == 2 else f"answer {number}" for number in range(3)}
    calls = [
        generation(
            number,
            rollout_id="r",
            attempt_id="a",
            agent_id="main",
            prompt_text=prompt,
            choices=[Choice(text=answer, finish_reason="stop", weight_versions=[("v1", 0, 1), ("v2", 1, 2)])],
        )
        for number, (prompt, answer) in enumerate(texts.items())
    ]
    with open_store(url) as store:
        store.add([*calls, generation(7, rollout_id=None), generation(8, rollout_id=None)])
    with database.reading() as connection:
        outline = transcript.outline_of(connection, "r")
        found = [*transcript.read(connection, [each.key for each in outline.positions])]
        unassigned = [*transcript.read(connection, transcript.latest_unassigned(connection, 1))]

    assert [each.id for each in outline.positions] == [each.id for each in calls]
    assert {(each.prompt_tokens, each.output_tokens) for each in outline.positions} == {(12, 0)}
    assert [(each.prompt, each.answers[0].text) for each in found] == [*texts.items()]
    assert found[0].answers[0].versions == ["v1", "v2"]
    assert found[0].caller["agent_id"] == "main"
    # The latest comes first.
    assert [each.answers[0].tokens for each in unassigned] == [5]
    assert unassigned[0].finished_at == START + 8 * SECOND


@pytest.mark.parametrize("note", HOSTILE.values(), ids=HOSTILE)
def test_reward_and_note_of_a_person_are_read_back_and_are_no_sign_of_life(
    database: Database, url: str, note: str
) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout("a task"), None)
        before = rollouts.find(connection, rollout_id)
        ingestion.annotate(connection, rollout_id, "latest", 0.5, None, note)
        ingestion.annotate(connection, rollout_id, "latest", None, None, "a note alone")
        after = rollouts.find(connection, rollout_id)
        found = annotation.of_rollout(connection, rollout_id, 10)

    assert before == after
    assert [(each.reward, each.note) for each in found] == [(None, "a note alone"), (0.5, note)]
    assert all(each.is_outcome for each in found)


def test_reward_of_nothing_is_refused(database: Database) -> None:
    with database.writing() as connection:
        rollout_id = lifecycle.start(connection, NewRollout("a task"), None)
        for wanted in (("nothing", "latest", None), (rollout_id, "another", None), (rollout_id, "latest", "another")):
            with pytest.raises(NotFound):
                ingestion.annotate(connection, *wanted[:2], 1.0, wanted[2], None)
        with pytest.raises(InvalidRecord):
            ingestion.annotate(connection, rollout_id, "latest", float("inf"), None, None)


def test_rollouts_beside_one_are_those_of_the_queue_or_of_the_calls(url: str, database: Database) -> None:
    with open_store(url) as store:
        store.add([generation(number, rollout_id=f"recorded {number}") for number in range(3)])
    with database.writing() as connection:
        queued = [lifecycle.start(connection, NewRollout(each), None) for each in ("a task", "another", "a task")]
        rows = [rollouts.find(connection, each) for each in queued]
        beside = [neighbours.neighbours_of(connection, *each) for each in zip(queued, rows, strict=True)]
        recorded = [neighbours.neighbours_of(connection, f"recorded {number}", None) for number in range(4)]
        same = [[each.rollout_id for each in neighbours.of_same_task(connection, row, 9)] for row in rows]

    assert beside == [(None, queued[1]), (queued[0], queued[2]), (queued[1], None)]
    names = [None, "recorded 0", "recorded 1", "recorded 2", None]
    assert recorded == [(names[at], names[at + 2]) for at in range(3)] + [(None, None)]
    assert same == [[queued[2]], [], [queued[0]]]
