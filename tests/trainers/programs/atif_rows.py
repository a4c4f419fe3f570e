"""Run with ATIF: its models accept the documents."""

from __future__ import annotations

import json

from atif import Trajectory  # pyright: ignore[reportMissingImports]

from agentlightning.trainers.atif import SCHEMA_VERSION, documents
from agentlightning.trajectory import AttemptCalls, merge
from tests.trainers.rows import call, conversation


def text_of(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def main() -> None:
    [document] = documents([conversation()], text_of, "my-agent", "1.0")
    read = Trajectory.model_validate_json(json.dumps(document))

    assert read.schema_version == SCHEMA_VERSION
    assert [(step.source, step.message) for step in read.steps] == [
        ("user", "1 2 3"),
        ("agent", "4 5"),
        ("user", "6"),
        ("agent", "7 8 9"),
    ]
    last = read.steps[-1].metrics
    assert (last.prompt_token_ids, last.completion_token_ids) == ([1, 2, 3, 4, 5, 6], [7, 8, 9])
    assert len(last.logprobs) == 3
    assert read.extra["reward"] == 1.0

    # Two answers to one context: the second row copies what the first one trains.
    calls = [call("1", [1], [2]), call("2", [1, 2, 3], [4]), call("3", [1, 2, 5], [6])]
    rows = merge(AttemptCalls(calls=calls, rollout_id="ro", attempt_id="at", reward=1.0)).rows
    first, second = (Trajectory.model_validate(each) for each in documents(rows, text_of))
    assert [step.is_copied_context for step in first.steps if step.source == "agent"] == [False, False]
    assert [step.is_copied_context for step in second.steps if step.source == "agent"] == [True, False]
    assert {first.trajectory_id, second.trajectory_id} == {"at-0", "at-1"}


if __name__ == "__main__":
    main()
