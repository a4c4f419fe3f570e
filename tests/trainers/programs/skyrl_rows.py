"""Run with SkyRL: its own validation accepts merged rows and steps."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
import typing_extensions

# SkyRL is for Python 3.12, where pydantic takes this one.
typing.TypedDict = typing_extensions.TypedDict

from skyrl.backends.skyrl_train.utils.sample_support import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    validate_sample_support,
)
from skyrl.train.generators.base import GeneratorOutput  # noqa: E402  # pyright: ignore[reportMissingImports]
from skyrl.train.utils.trainer_utils import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    validate_generator_output,
)

from agentlightning.errors import UnusableRows  # noqa: E402
from agentlightning.trainers.skyrl import generator_output  # noqa: E402
from tests.trainers.rows import conversation, forked, with_experts, with_masks  # noqa: E402


def main() -> None:
    merged = generator_output([conversation("one"), conversation("two", 0.0)])
    validate_generator_output(2, merged)
    assert {*merged} == {*GeneratorOutput.__annotations__}
    assert merged["response_ids"][0] == [4, 5, 6, 7, 8, 9]
    assert merged["loss_masks"][0] == [1, 1, 0, 1, 1, 1]
    assert merged["rewards"] == [[0, 0, 0, 0, 0, 1.0], [0, 0, 0, 0, 0, 0.0]]
    assert [each.to_string().rpartition("_")[2] for each in merged["trajectory_ids"]] == ["0", "1"]

    rows = [*forked("one"), conversation("two")]
    steps = generator_output(rows, step_wise=True)
    validate_generator_output(2, steps, step_wise=True)
    assert steps["is_last_step"] == [False, True, True]
    assert steps["rewards"] == [[0, 0], [1.0], [0, 0, 0, 0, 0, 1.0]]

    validate_generator_output(1, generator_output([with_experts()]), routes_expected=True)

    rows = [with_masks("one"), replace(conversation("two"), logprobs_mode="processed_logprobs")]
    supported = generator_output(rows)
    validate_generator_output(2, supported)
    # Of ids that the model did not sample, and of a row of which nothing was cut off, all of the vocabulary was left.
    nothing = [-1, -1, -1]
    first, second = (validate_sample_support(each).tolist() for each in supported["rollout_sample_support"])
    assert first == [[4, 1, 2], [5, -1, -1], nothing, [7, 1, -1], [8, -1, -1], [9, 2, -1]]
    assert second == [nothing] * 6
    assert generator_output([replace(rows[0], logprobs_mode="raw_logprobs")])["rollout_sample_support"] is None
    assert generator_output([rows[1]])["rollout_sample_support"] is None
    with pytest.raises(UnusableRows, match="row 0 of rollout 'two' has no sampling masks, but others have"):
        generator_output([rows[0], replace(rows[1], flags=["no_mask"])])
    rows = [*forked("one"), conversation("two")]

    with pytest.raises(
        UnusableRows, match="rollout 'one' has 2 rows, and SkyRL takes one a prompt: pass step_wise=True"
    ):
        generator_output(rows)
    with pytest.raises(UnusableRows, match="not next to each other: sort them by rollout_id"):
        generator_output([rows[0], rows[2], rows[1]], step_wise=True)
    assert generator_output([conversation(logprobs=None)])["rollout_logprobs"] is None
    with pytest.raises(UnusableRows, match=r"rollout 'two' has no logprobs, but other rows have: .*AGL_LOGPROBS=on"):
        generator_output([conversation("one"), conversation("two", logprobs=None)])
    with pytest.raises(UnusableRows, match="row 0 of rollout 'ro' belongs to no task"):
        generator_output([replace(conversation(), group=None)])
    with pytest.raises(UnusableRows, match="the whole of row 0 of rollout 'ro' has 9 ids, more than the 8"):
        generator_output([conversation()], max_length=8)
    with pytest.raises(UnusableRows, match="has no routed experts, but others have"):
        generator_output([conversation("one"), with_experts()])


if __name__ == "__main__":
    main()
