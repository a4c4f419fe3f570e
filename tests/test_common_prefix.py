"""The longest common prefix of two sequences, whatever they are."""

from __future__ import annotations

from array import array
from itertools import takewhile

import pytest
from hypothesis import given, strategies

from agentlightning.common_prefix import common_ids, common_length
from tests.common.unhurried import UNHURRIED

pytestmark = pytest.mark.tier("check")

LENGTHS = strategies.integers(0, 20_000)


@UNHURRIED
@given(LENGTHS, strategies.text(max_size=5), strategies.text(max_size=5), strategies.sampled_from("aé€"))
def test_texts_are_compared_and_their_common_length_is_found(length: int, one: str, other: str, letter: str) -> None:
    shared = letter * length
    known = length + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))

    assert common_length(shared + one, shared + other) == known
    assert common_length(shared + one, shared + other, length) == known


@UNHURRIED
@given(LENGTHS, strategies.lists(strategies.integers(0, 600), max_size=5), strategies.integers(0, 600))
def test_ids_are_compared_and_those_that_share_bytes_only_are_not_counted(
    length: int, rest: list[int], new: int
) -> None:
    shared = [7] * length
    one, other = [*shared, *rest], [*shared, new]
    known = length + (rest[:1] == [new])

    found = common_ids(array("i", one).tobytes(), array("i", other).tobytes())

    assert found == known == common_ids(array("i", other).tobytes(), array("i", one).tobytes(), length)
