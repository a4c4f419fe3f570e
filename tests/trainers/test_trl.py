"""The function that TRL calls for its rows, over a store in a file; agents write the calls that a vLLM would record."""

from __future__ import annotations

import threading
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import agentlightning as agl
from agentlightning.generation import Choice
from agentlightning.trainers.trl import columns, reward, rollout_func
from tests.common.generations import generation
from tests.trainers.rows import PAD, conversation, forked

pytestmark = pytest.mark.tier("check")

TRAINER: Any = SimpleNamespace(
    state=SimpleNamespace(global_step=7),
    processing_class=SimpleNamespace(pad_token_id=PAD),
    temperature=1.0,
    max_completion_length=6,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[agl.Store]:
    with agl.open_store(str(tmp_path / "store.db")) as store:
        yield store


def answered(
    rollout: agl.Rollout,
    *calls: tuple[list[int], list[int]],
    finish_reason: str = "stop",
    version: str | None = None,
    **fields: Any,
) -> None:
    """Record calls of a rollout: the ids of each prompt and answer.

    Args:
        finish_reason: of the answers.
        version: of the weights.
        fields: of the generations.
    """
    assert rollout.store is not None
    assert rollout.attempt is not None
    for number, (prompt, answer) in enumerate(calls):
        choice = Choice(
            token_ids=array("i", answer),
            finish_reason=finish_reason,
            logprobs=array("f", [-each / 100 for each in answer]),
            weight_versions=None if version is None else [(version, 0, len(answer))],
        )
        recorded = generation(
            uuid.uuid4().int % 10**9,
            rollout_id=rollout.rollout_id,
            attempt_id=rollout.attempt.attempt_id,
            finished_at=number,
            prompt_token_ids=array("i", prompt),
            choices=[choice],
            **fields,
        )
        rollout.store.add([recorded])


def agent(rollout: agl.Rollout) -> None:
    """Answer with the number in the prompt, and be rewarded with it."""
    number = int(rollout.input)
    answered(rollout, ([1, 2], [number]), ([1, 2, number, 3], [4, number]))
    rollout.reward(number / 10)


def test_a_row_stands_where_its_prompt_does(store: agl.Store) -> None:
    found = rollout_func(store, agent)(["5", "6", "5"], TRAINER)

    assert found["prompt_ids"] == [[1, 2]] * 3
    assert found["completion_ids"] == [[5, 3, 4, 5], [6, 3, 4, 6], [5, 3, 4, 5]]
    assert found["env_mask"] == [[1, 0, 1, 1]] * 3
    assert found["logprobs"][1] == pytest.approx([-0.06, 0, -0.04, -0.06])
    assert reward(["", "", ""], **found) == pytest.approx([0.5, 0.6, 0.5])
    rollouts = [store.get_rollout_by_id(each) for each in found["rollout_id"]]
    assert [each.input for each in rollouts if each is not None] == ["5", "6", "5"]
    assert all(each is not None and each.metadata == {"trainer": "trl", "step": 7} for each in rollouts)


def test_runners_elsewhere_take_the_rollouts_from_the_queue(store: agl.Store) -> None:
    stop = threading.Event()

    def runner() -> None:
        while not stop.is_set():
            if (rollout := store.dequeue_rollout("runner")) is None:
                stop.wait(0.01)
                continue
            agent(rollout)
            rollout.finish("succeeded")

    thread = threading.Thread(target=runner)
    thread.start()
    try:
        found = rollout_func(store)(["5", "6"], TRAINER)
    finally:
        stop.set()
        thread.join()

    assert found["completion_ids"] == [[5, 3, 4, 5], [6, 3, 4, 6]]


@pytest.mark.parametrize("wrong", ["raises", "has no reward", "makes no call"])
def test_a_rollout_without_a_row_or_a_reward_is_masked_and_named(
    store: agl.Store, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    def run(rollout: agl.Rollout) -> None:
        if rollout.input == "5":
            agent(rollout)
        elif wrong == "raises":
            raise RuntimeError("no network")
        elif wrong == "has no reward":
            answered(rollout, ([1, 2], [3]))
        else:
            rollout.reward(1.0)

    found = rollout_func(store, run)(["6", "5"], TRAINER)

    assert found["completion_ids"] == [[PAD], [5, 3, 4, 5]]
    assert found["env_mask"] == [[0], [1, 0, 1, 1]]
    assert found["reward"] == [None, 0.5]
    assert f"Rollout {found['rollout_id'][0]!r} has" in caplog.text
    assert "It is masked: nothing of it is trained." in caplog.text


def test_a_failed_rollout_ends_the_training_where_that_is_asked_for(store: agl.Store) -> None:
    def run(rollout: agl.Rollout) -> None:
        raise RuntimeError("no network")

    with pytest.raises(agl.UnusableRows, match="has the status failed"):
        rollout_func(store, run, failed="raise")(["6"], TRAINER)
    with pytest.raises(agl.UnusableRows, match="there is no row to train"):
        rollout_func(store, run)(["6"], TRAINER)


def test_a_rollout_is_masked_with_the_padding_of_a_processors_tokenizer(store: agl.Store) -> None:
    def run(rollout: agl.Rollout) -> None:
        if rollout.input == "6":
            raise RuntimeError("no network")
        agent(rollout)

    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=77))
    trainer: Any = SimpleNamespace(**{**vars(TRAINER), "processing_class": processor})

    assert rollout_func(store, run)(["5", "6"], trainer)["completion_ids"] == [[5, 3, 4, 5], [77]]


@pytest.mark.parametrize("error", [agl.StoreUnavailable("the store is away"), SystemExit("enough")])
def test_an_error_of_the_store_or_an_exit_in_an_agent_ends_the_step(store: agl.Store, error: BaseException) -> None:
    def run(rollout: agl.Rollout) -> None:
        if rollout.input == "6":
            raise error
        agent(rollout)

    with pytest.raises(type(error), match=str(error)):
        rollout_func(store, run)(["5", "6"], TRAINER)

    assert {each.input: each.status for each in store.query_rollouts()}["6"] == "failed"


def test_rollouts_that_have_not_ended_in_time_are_masked(store: agl.Store, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(agl.UnusableRows, match="no row"):
        rollout_func(store, timeout=0.01)(["6"], TRAINER)

    assert "has not ended, or its calls are not written: raise timeout" in caplog.text
    assert [each.status for each in store.query_rollouts()] == ["cancelled"]
    assert store.dequeue_rollout("runner") is None


def test_an_agent_that_hangs_does_not_hold_up_the_trainer(store: agl.Store, caplog: pytest.LogCaptureFixture) -> None:
    go_on = threading.Event()
    ran: list[str] = []

    def run(rollout: agl.Rollout) -> None:
        ran.append(rollout.input)
        go_on.wait()

    try:
        with pytest.raises(agl.UnusableRows, match="no row"):
            rollout_func(store, run, workers=1, timeout=0.1)(["5", "6"], TRAINER)
        assert {each.status for each in store.query_rollouts()} == {"cancelled"}
    finally:
        go_on.set()

    assert ran in ([], ["5"])
    assert caplog.text.count("has not ended, or its calls are not written: raise timeout") == 2


def test_a_rollout_that_was_tried_again_has_the_rows_of_its_last_attempt(store: agl.Store) -> None:
    def run(rollout: agl.Rollout) -> None:
        answered(rollout, ([1, 2], [9, 9, 9]))
        again = store.start_attempt(rollout.rollout_id)
        agent(again)
        again.finish("succeeded")

    assert rollout_func(store, run)(["5"], TRAINER)["completion_ids"] == [[5, 3, 4, 5]]


def test_a_store_that_goes_away_ends_the_step(store: agl.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **options: object) -> None:
        raise agl.StoreUnavailable("the store is away")

    monkeypatch.setattr(store, "wait_for_rollouts", away)

    with pytest.raises(agl.StoreUnavailable, match="the store is away"):
        rollout_func(store, agent)(["5"], TRAINER)


def test_of_several_rows_the_one_with_the_most_trained_ids_is_taken_and_the_others_are_counted(
    store: agl.Store, caplog: pytest.LogCaptureFixture
) -> None:
    def run(rollout: agl.Rollout) -> None:
        # The second prompt has another id than the first answer.
        answered(rollout, ([1, 2], [3, 4]), ([1, 2, 3, 9], [5, 6, 7]))
        rollout.reward(1.0)

    found = rollout_func(store, run)(["a", "b"], TRAINER)

    assert found["completion_ids"] == [[5, 6, 7]] * 2
    assert "2 rows are not trained: TRL takes one row a prompt, and 2 rollouts have several." in caplog.text


@pytest.mark.parametrize(
    ("long", "completion"),
    [({"status": "aborted", "finish_reason": "abort"}, [3]), ({"finish_reason": "length"}, [3]), ({}, [4, 5, 6])],
    ids=["aborted", "truncated", "finished"],
)
def test_a_longer_row_is_not_taken_where_its_answer_was_not_finished(
    store: agl.Store, long: dict[str, Any], completion: list[int]
) -> None:
    def run(rollout: agl.Rollout) -> None:
        answered(rollout, ([1, 2], [3]))
        answered(rollout, ([7, 8], [4, 5, 6]), **long)
        rollout.reward(1.0)

    found = rollout_func(store, run)(["a"], TRAINER)
    assert found["completion_ids"] == [completion]


def test_rows_of_a_judge_are_not_trained_in_place_of_the_policys(store: agl.Store) -> None:
    def run(rollout: agl.Rollout) -> None:
        answered(rollout, ([1, 2], [3]), model="policy")
        answered(rollout, ([1, 2], [4, 5, 6]), model="judge")
        rollout.reward(1.0)

    with pytest.raises(agl.UnusableRows, match=r"several models \(judge, policy\): .*option model"):
        rollout_func(store, run)(["a"], TRAINER)

    assert rollout_func(store, run, model="policy")(["a"], TRAINER)["completion_ids"] == [[3]]


def test_options_and_read_decide_which_rows_there_are(store: agl.Store) -> None:
    cut = rollout_func(store, agent, max_response_length=1)(["5"], TRAINER)
    read = rollout_func(store, agent, read=lambda rollout: [conversation(rollout.rollout_id)])(["5"], TRAINER)

    assert cut["completion_ids"] == [[5]]
    assert cut["flags"] == [["cut"]]
    assert read["completion_ids"] == [[4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("params", "mode", "says"),
    [
        ('{"temperature": 0.6, "top_k": 20}', "raw_logprobs", "temperature 0.6, top_k 20 and has raw_logprobs"),
        ('{"temperature": 0.6}', "processed_logprobs", "temperature 0.6 and has processed_logprobs"),
        ('{"top_p": 0.9}', None, "top_p 0.9 and has raw_logprobs"),
        ('{"top_p": 0.9}', "processed_logprobs", "top_p 0.9 and has processed_logprobs"),
        ('{"presence_penalty": 1}', "processed_logprobs", "presence_penalty 1 and has processed_logprobs"),
        ("{}", "raw_logprobs", None),
    ],
)
def test_logprobs_that_importance_sampling_cannot_use_are_named(
    store: agl.Store, caplog: pytest.LogCaptureFixture, params: str, mode: str | None, says: str | None
) -> None:
    def run(rollout: agl.Rollout) -> None:
        answered(rollout, ([1, 2], [3]), sampling_params=params, logprobs_mode=mode)
        rollout.reward(1.0)

    rollout_func(store, run)(["a"], TRAINER)

    if says is None:
        assert "was sampled with" not in caplog.text
    else:
        assert f"was sampled with {says}, but TRL computes at temperature 1." in caplog.text
        assert "from the whole vocabulary, as AGL_SAMPLING pins it, and start vLLM with" in caplog.text


def test_logprobs_at_the_trainers_own_temperature_are_right_where_they_are_processed(
    store: agl.Store, caplog: pytest.LogCaptureFixture
) -> None:
    def run(rollout: agl.Rollout) -> None:
        answered(rollout, ([1, 2], [3]), sampling_params='{"temperature": 0.6}', logprobs_mode=rollout.input)
        rollout.reward(1.0)

    cooler: Any = SimpleNamespace(**{**vars(TRAINER), "temperature": 0.6})
    rollout_func(store, run)(["processed_logprobs"], cooler)
    assert "was sampled with" not in caplog.text
    rollout_func(store, run)(["raw_logprobs"], cooler)
    assert "was sampled with temperature 0.6 and has raw_logprobs, but TRL computes at temperature 0.6." in caplog.text


def test_a_row_that_is_longer_than_the_trainer_takes_is_masked_or_ends_the_training(
    store: agl.Store, caplog: pytest.LogCaptureFixture
) -> None:
    def run(rollout: agl.Rollout) -> None:
        answered(rollout, ([1, 2], [*range(3, 3 + int(rollout.input))]))
        rollout.reward(1.0)

    found = rollout_func(store, run)(["6", "7"], TRAINER)
    cut = rollout_func(store, run, max_response_length=6)(["6", "7"], TRAINER)

    assert found["completion_ids"] == [[3, 4, 5, 6, 7, 8], [PAD]]
    assert (found["env_mask"][1], found["reward"]) == ([0], [1.0, None])
    why = "has a response of 7 ids, more than the 6 that the trainer takes: raise GRPOConfig(max_completion_length=…)"
    assert caplog.text.count(f"Rollout {found['rollout_id'][1]!r} {why}") == 1
    assert cut["completion_ids"] == [[3, 4, 5, 6, 7, 8]] * 2
    assert cut["flags"] == [[], ["cut"]]
    with pytest.raises(agl.UnusableRows, match="has a response of 7 ids, more than the 6"):
        rollout_func(store, run, failed="raise")(["6", "7"], TRAINER)
    unlimited: Any = SimpleNamespace(**{**vars(TRAINER), "max_completion_length": None})
    assert [*map(len, rollout_func(store, run)(["6", "7"], unlimited)["completion_ids"])] == [6, 7]


def test_columns_have_a_line_for_each_row() -> None:
    found = columns([conversation("one"), *forked("two", 0.5)])

    assert found["rollout_id"] == ["one", "two", "two"]
    assert found["reward"] == [1.0, 0.5, 0.5]
    with pytest.raises(agl.UnusableRows, match="AGL_LOGPROBS=on"):
        columns([conversation(logprobs=None)])
    with pytest.raises(agl.UnusableRows, match=r"response of row 0 of rollout 'ro' has 6 ids, more than the 5"):
        columns([conversation()], max_response_length=5)
