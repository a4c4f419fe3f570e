"""Run with Tinker: its types accept the rows, and have them as its loss functions read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tinker import types  # pyright: ignore[reportMissingImports]

from agentlightning.errors import UnusableRows
from agentlightning.trainers.tinker import datums
from tests.trainers.rows import conversation, forked


def main() -> None:
    first, second, third = datums([conversation("one", 1.0), *forked("two", 0.0)])

    assert isinstance(first, types.Datum)
    assert first.model_input.to_ints() == [1, 2, 3, 4, 5, 6, 7, 8]
    inputs = {name: each.to_numpy().tolist() for name, each in first.loss_fn_inputs.items()}
    assert inputs["target_tokens"] == [2, 3, 4, 5, 6, 7, 8, 9]
    # The mean of the two rollouts is 0.5, however many rows each has.
    assert inputs["advantages"] == [0, 0, 0.5, 0.5, 0, 0.5, 0.5, 0.5]
    assert inputs["logprobs"] == pytest.approx([0, 0, -0.04, -0.05, 0, -0.07, -0.08, -0.09])
    assert second.loss_fn_inputs["advantages"].to_numpy().tolist() == [0, -0.5, -0.5]
    assert third.loss_fn_inputs["advantages"].to_numpy().tolist() == [0, 0, 0, 0, -0.5]

    for advantages in (np.array([2.0, 0.0]), np.array([0.0, 2.0])):
        both = datums([conversation("one"), conversation("two")], advantages)
        assert [each.loss_fn_inputs["advantages"].to_numpy().max() for each in both] == advantages.tolist()
    with pytest.raises(ValueError, match="zip"):
        datums([conversation()], [])

    [own] = datums([conversation()], [2.0], with_mask=True)
    assert own.loss_fn_inputs["advantages"].to_numpy().tolist() == [0, 0, 2, 2, 0, 2, 2, 2]
    assert own.loss_fn_inputs["mask"].to_numpy().tolist() == [0, 0, 1, 1, 0, 1, 1, 1]

    with pytest.raises(UnusableRows, match="row 0 of rollout 'ro' belongs to no task"):
        datums([replace(conversation(), group=None)])
    with pytest.raises(UnusableRows, match="the whole of row 0 of rollout 'ro' has 9 ids, more than the 8"):
        datums([conversation()], max_length=8)
    with pytest.raises(UnusableRows, match="AGL_LOGPROBS=on"):
        datums([conversation(logprobs=None)])


if __name__ == "__main__":
    main()
