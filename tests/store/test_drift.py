"""The drift of rollouts, in stores of every kind."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agentlightning.errors import NotFound
from agentlightning.sender import Sender, Vocabulary
from agentlightning.store import Store
from tests.common.generations import START
from tests.drift.conversations import TEMPLATE, conversation, record
from tests.store.conftest import EVERY_KIND, new_store_of

pytestmark = pytest.mark.tier("check")


@pytest.fixture(scope="session", params=EVERY_KIND)
def new_store(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return new_store_of(request.param, request)


def test_attempts_follow_one_another_with_their_breaks(store: Store) -> None:
    record(store, *conversation("whole", "It is."), *conversation("broken/größe", "It is.\n\n", 3, "other"))

    whole, broken = store.drift()

    assert (whole.rollout_id, whole.attempt_id, whole.calls, whole.breaks) == ("whole", "a", 2, [])
    assert (broken.rollout_id, broken.calls, broken.cached) == ("broken/größe", 2, 16)
    [found] = broken.breaks
    assert (found.cause, found.is_certain, found.message, found.role) == ("answer_end", True, 2, "assistant")
    assert any(each.differs and each.text == "\n" for each in found.before)
    assert (
        [*store.drift("broken/größe", "a")]
        == [*store.drift(model="other")]
        == [*store.drift(after="whole")]
        == [broken]
    )
    assert [*store.drift("none")] == [*store.drift(model="none")] == []
    with pytest.raises(NotFound):
        [*store.drift(after="none")]


def test_a_vocabulary_that_changes_within_a_rollout_is_compared_as_text(store: Store, url: str) -> None:
    first, second = conversation("r", "It is.")
    record(store, first)
    larger = Vocabulary([*TEMPLATE.vocabulary.tokens, "more"], TEMPLATE.vocabulary.special)
    other = Sender(host="h", pid=2, started_at=START, version="1", vocabulary=larger)
    store.register_sender(other)
    second.prompt_token_ids = array("i", TEMPLATE.retokenised(list(second.prompt_token_ids or ()), _First()))
    store.add([second], other.id)

    [attempt] = store.drift("r")

    assert [each.cause for each in attempt.breaks] == ["retokenised"]


class _First:
    def choice(self, some: Sequence[int]) -> int:
        return some[0]
