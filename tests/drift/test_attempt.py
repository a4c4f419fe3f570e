"""The drift of an attempt: which call continues which, what breaks cost, and the report of many attempts."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlightning.drift import AttemptDrift, CallDetails, Report, analyse
from agentlightning.drift import _attempt as attempt_module
from agentlightning.drift._turns import turn_names
from agentlightning.token_text import TokenTexts
from agentlightning.trajectory import AttemptCalls, Call, merge
from tests.common.unhurried import UNHURRIED
from tests.drift.templates import CHATML, Message, Template

pytestmark = pytest.mark.tier("check")

TEMPLATE = Template("chatml", CHATML)
SYSTEM = {"role": "system", "content": "You are a careful assistant."}
SAMPLING = '{"temperature": 0.7}'


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text, "tool_calls": [], "reasoning": ""}


def call(number: int, messages: Sequence[Message], answer: str, **fields: Any) -> Call:
    """Make the call that finishes as number N, whose model answers so."""
    usual = {"generation_id": f"g{number}", "finished_at": number, "model": "m", "finish_reason": "stop"}
    ids = {
        "prompt_token_ids": array("i", TEMPLATE.prompt(messages)),
        "response_token_ids": array("i", [*TEMPLATE.encode(answer), TEMPLATE.id_of("<|im_end|>")]),
    }
    return Call(**{**usual, **ids, **fields})


def drift(*calls: Call, cached: int | None = None, knows: bool = True, model: str | None = None) -> AttemptDrift:
    details = {each.generation_id: CallDetails(cached, b"d" if knows else None) for each in calls}
    attempt = AttemptCalls(calls=calls, rollout_id="r", attempt_id="a")
    return analyse(attempt, details, lambda digest: TEMPLATE.texts if digest else None, model)


def causes(found: AttemptDrift) -> list[tuple[str, str, str]]:
    return [(each.before_id, each.generation_id, each.cause) for each in found.breaks]


FIRST = [SYSTEM, user("Is it cold?")]
SECOND = [*FIRST, said("It is."), user("And tomorrow?")]
THIRD = [*SECOND, said("So it will be."), user("Thank you.")]


def test_a_history_that_is_kept_has_no_breaks_and_one_row() -> None:
    found = drift(call(1, FIRST, "It is."), call(2, SECOND, "So it will be."), call(3, THIRD, "Bye."), cached=0)

    assert (found.breaks, found.calls, found.conversations, found.broken) == ([], 3, 1, 0)
    assert (found.rows_before, found.rows_after, found.lost) == (3, 1, 0)
    assert (found.cached, found.cacheable) == (
        0,
        sum(len(TEMPLATE.prompt(each)) - _new(each) for each in (SECOND, THIRD)),
    )


def _new(messages: Sequence[Message]) -> int:
    """Count the ids of a prompt from the end of the last answer on."""
    return len(TEMPLATE.encode(f"\n<|im_start|>user\n{messages[-1]['content']}<|im_end|>\n<|im_start|>assistant\n"))


def test_a_break_loses_what_stands_behind_it_and_is_shown_side_by_side() -> None:
    blank = call(1, FIRST, "It is. \n")
    found = drift(blank, call(2, SECOND, "So it will be."), call(3, THIRD, "Bye."), cached=16)

    assert causes(found) == [("g1", "g2", "answer_end")]
    assert (found.conversations, found.broken, found.rows_before, found.rows_after) == (1, 1, 3, 2)
    [broken] = found.breaks
    assert blank.response_token_ids is not None
    assert found.lost == broken.lost == len(blank.response_token_ids) - len(TEMPLATE.encode("It is."))
    assert "".join(each.text or "" for each in broken.before if each.differs) == " \n"
    assert not any(each.differs for each in broken.after[:3])
    assert (broken.message, broken.role, broken.model) == (2, "assistant", "m")
    assert found.cached == 32


def test_all_answers_behind_a_break_are_lost_to_the_row_of_the_conversation() -> None:
    changed = [{**SYSTEM, "content": "You are a careless assistant."}, *THIRD[1:]]
    found = drift(call(1, FIRST, "It is."), call(2, SECOND, "So it will be."), call(3, changed, "Bye."))

    assert causes(found) == [("g2", "g3", "header")]
    assert found.kept == len(TEMPLATE.encode("Bye.")) + 1
    assert (
        found.lost
        == found.breaks[0].lost
        == len(TEMPLATE.encode("It is.")) + len(TEMPLATE.encode("So it will be.")) + 2
    )


def test_retries_sub_agents_and_compactions_are_named_but_break_no_conversation() -> None:
    title = [{**SYSTEM, "content": "Write a title for what follows, in three words."}, user("Is it cold?")]
    short = [SYSTEM, user("Summary of the conversation so far: it is cold. Go on.")]
    found = drift(
        call(1, title, "The cold"),
        call(2, FIRST, "It is.", call_id="one"),
        call(3, FIRST, "It is.", call_id="two"),
        call(4, SECOND, "So it will be."),
        call(5, [*THIRD[:-1], user("Tell me all that you know about tomorrow.")], "No."),
        call(6, short, "Yes."),
    )

    assert [each.cause for each in found.breaks] == ["sub_agent", "retry", "compaction"]
    assert (found.conversations, found.broken) == (2, 0)


@pytest.mark.parametrize(
    "prompts",
    [
        [[SYSTEM, user(f"What is {number} plus 2?")] for number in range(5)],
        [[user(f"Judge whether this answer to question {number} is right: it is cold.")] for number in range(5)],
        [
            [{**SYSTEM, "content": f"You work in a team. Follow its rules: be brief, be kind, cite. Be {role}."}, each]
            for role, each in zip(
                "ABCDE", map(user, ("Plan it.", "Write it.", "Read it.", "Run it.", "Ship it.")), strict=True
            )
        ],
        [[SYSTEM, user(each), user("Answer with a number alone.")] for each in ("One and two?", "Six less one?")],
    ],
    ids=["questions", "judges without a system message", "roles of a team", "a common end"],
)
def test_prompts_that_only_begin_alike_are_conversations_of_their_own(prompts: Sequence[Sequence[Message]]) -> None:
    found = drift(*(call(number, each, f"{number}.") for number, each in enumerate(prompts, 1)))

    assert (found.breaks, found.conversations, found.broken) == ([], len(prompts), 0)
    assert (found.rows_after, found.lost) == (len(prompts), 0)


def test_each_of_several_similar_conversations_goes_on_with_its_own_break() -> None:
    questions = [f"What is {number} plus 2?" for number in range(4)]
    first = [call(number, [SYSTEM, user(each)], f"{number}. \n") for number, each in enumerate(questions)]
    histories = [[SYSTEM, user(each), said(f"{number}."), user("Sure?")] for number, each in enumerate(questions)]
    found = drift(*first, *(call(10 + number, each, "Yes.") for number, each in enumerate(histories)))

    assert causes(found) == [(f"g{number}", f"g{10 + number}", "answer_end") for number in range(4)]
    assert (found.conversations, found.broken) == (4, 4)


@pytest.mark.parametrize(
    ("first", "again", "is_certain"),
    [({}, {}, False), ({}, {"retry": 1}, True), ({"status": "aborted"}, {}, True), ({}, {"retry": 0}, False)],
)
def test_a_retry_is_certain_where_the_client_says_so_or_the_first_call_was_aborted(
    first: dict[str, Any], again: dict[str, Any], is_certain: bool
) -> None:
    found = drift(call(1, FIRST, "It is.", **first), call(2, FIRST, "No.", **again))

    assert [(each.cause, each.is_certain) for each in found.breaks] == [("retry", is_certain)]


def test_a_call_of_a_host_whose_clock_is_behind_still_continues_the_one_before() -> None:
    calls = call(1, SECOND, "So it will be."), call(2, FIRST, "It is."), call(3, THIRD, "Bye.")
    found = drift(*calls)

    assert (found.breaks, found.conversations, found.rows_after) == ([], 1, 1)
    assert found.parents == {"g2": None, "g1": "g2", "g3": "g1"}


def test_of_a_long_conversation_each_turn_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    def counted(ids: Sequence[int], texts: TokenTexts) -> list[bytes]:
        looked_at.append(len(ids))
        return turn_names(ids, texts)

    monkeypatch.setattr(attempt_module, "turn_names", counted)
    messages = list(FIRST)
    calls: list[Call] = []
    for number in range(50):
        calls.append(call(number, messages, "It is."))
        messages += [said("It is."), user("And then?")]

    found = drift(*calls)

    longest = calls[-1].prompt_token_ids
    assert found.rows_after == 1
    assert longest is not None
    assert sum(looked_at) < 2 * len(longest)


def test_rows_without_breaks_are_those_of_last_calls_however_many_broke() -> None:
    other = [*FIRST, said("It was."), user("And tomorrow?")]
    empty = call(2, other, "", response_token_ids=array("i"), status="aborted", finish_reason="abort")
    found = drift(call(1, FIRST, "It is."), empty)

    assert (found.rows_before, found.rows_after, found.rows_unbroken, found.lost) == (1, 1, 1, 0)

    beside = drift(call(1, FIRST, "It is."), call(2, other, "Yes."), call(3, SECOND, "So it will be."))
    assert (beside.rows_after, beside.rows_unbroken) == (2, 2)


def test_a_branch_is_no_break() -> None:
    other = [*FIRST, said("It is."), user("And in the evening?")]
    found = drift(call(1, FIRST, "It is."), call(2, SECOND, "So it will be."), call(3, other, "Yes."))

    assert (found.breaks, found.rows_after, found.lost) == ([], 2, 0)


def test_a_longer_branch_with_none_of_the_other_ones_turns_is_no_break() -> None:
    other = [*FIRST, said("It is."), user("Where is it warm?"), said("In Oslo, they say."), user("Since when?")]
    found = drift(call(1, FIRST, "It is."), call(2, SECOND, "So it will be."), call(3, other, "Since May."))

    assert (found.breaks, found.conversations) == ([], 1)
    assert found.parents == {"g1": None, "g2": "g1", "g3": "g1"}


def test_an_edited_result_in_the_middle_is_a_break_though_the_beginning_is_exact() -> None:
    edited = [*FIRST, said("It is."), user("[cleared]"), said("So it will be."), user("Thank you.")]
    found = drift(call(1, FIRST, "It is."), call(2, SECOND, "So it will be."), call(3, edited, "Bye."))

    assert causes(found) == [("g2", "g3", "other")]
    assert not found.breaks[0].is_certain


def test_choices_of_one_call_are_one_call_and_the_continued_one_is_found() -> None:
    choices = [call(1, FIRST, text, index=index) for index, text in enumerate(("It is.", "No.", "Maybe."))]
    found = drift(*choices, call(2, [*FIRST, said("No."), user("And tomorrow?")], "Yes."))

    assert (found.breaks, found.calls, found.rows_before) == ([], 2, 4)


def test_calls_of_two_models_never_continue_each_other() -> None:
    calls = call(1, FIRST, "It is. "), call(2, SECOND, "So it will be.", model="other")

    assert drift(*calls).breaks == []
    assert drift(*calls).conversations == 2
    assert (drift(*calls, model="m").calls, drift(*calls, model="none").calls) == (1, 0)


def test_an_agent_that_names_itself_is_another_conversation() -> None:
    calls = call(1, FIRST, "It is.", agent_id="main"), call(2, SECOND, "So it will be.", agent_id="other")

    found = drift(*calls, call(3, [*SECOND, said("No."), user("Why?")], "Bye.", agent_id="main"))

    assert [(each.cause, each.is_certain, each.agent_id) for each in found.breaks if each.cause == "sub_agent"] == [
        ("sub_agent", True, "other")
    ]
    assert found.parents == {"g1": None, "g2": None, "g3": "g1"}


def test_without_a_vocabulary_the_first_difference_is_known_and_no_cause() -> None:
    found = drift(call(1, FIRST, "It is. "), call(2, SECOND, "So it will be."), knows=False)

    assert (causes(found), found.without_vocabulary) == ([("g1", "g2", "other")], 2)
    assert not found.breaks[0].is_certain
    assert {each.text for each in found.breaks[0].before} == {None}


def test_without_a_vocabulary_prompts_that_leave_another_are_no_break() -> None:
    system = {**SYSTEM, "content": "You are a careful assistant. " * 20}
    prompts = [[system, user(each)] for each in ("Where is Oslo?", "Sort these: 3 1 2", "Who wrote Faust?")]
    found = drift(*(call(number, each, "Yes.") for number, each in enumerate(prompts)), knows=False)

    assert (found.breaks, found.conversations, found.lost) == ([], 3, 0)


def test_what_is_unfit_in_other_ways_is_counted() -> None:
    logprobs = {"logprobs": array("f", [-0.5] * 20), "logprobs_mode": "raw_logprobs"}
    found = drift(
        call(1, FIRST, "It is.", sampling_params=SAMPLING, weight_versions=[("1", 0, 3)], **logprobs),
        call(2, SECOND, "So it will be.", sampling_params='{"temperature": 0.0}', finish_reason="length"),
        call(3, THIRD, "Bye.", status="aborted", weight_versions=[("2", 0, 3)]),
        call(4, FIRST, "", prompt_token_ids=None),
    )

    assert found.unfit == {
        "mixed_sampling": 1,
        "mixed_weights": 1,
        "old_weights": 1,
        "greedy": 1,
        "raw_logprobs": 1,
        "missing_logprobs": 2,
        "truncated": 1,
        "aborted": 1,
        "without_ids": 1,
    }


@pytest.mark.parametrize("params", ['{"top_p":null}', '{"top_k":"x"}', '{"top_k":-1}', '{"logit_bias":{}}'])
def test_parameters_that_change_nothing_leave_raw_logprobs_fit(params: str) -> None:
    logprobs = {"logprobs": array("f", [-0.5] * 20), "logprobs_mode": "raw_logprobs"}

    assert "raw_logprobs" not in drift(call(1, FIRST, "It is.", sampling_params=params, **logprobs)).unfit


def test_a_report_adds_attempts_and_has_the_names_of_other_tools() -> None:
    report = Report()
    for _ in range(3):
        report.add(drift(call(1, FIRST, "It is. \n"), call(2, SECOND, "So it will be."), cached=16))
    report.add(drift(call(1, FIRST, "It is."), call(2, SECOND, "So it will be."), cached=40))

    found = json.loads(json.dumps(report.as_dict()))
    two = Report()
    two.add(drift(call(1, FIRST, "It is. \n"), call(2, SECOND, "So."), call(3, [SYSTEM, user("Who?")], "I.")))

    assert (found["calls"], found["conversations"], found["broken"], found["share_broken"]) == (8, 4, 3, 0.75)
    assert [(each["cause"], each["count"], each["certain"]) for each in found["causes"]] == [("answer_end", 3, 3)]
    assert found["causes"][0]["example"]["generation_id"] == "g2"
    assert found["training/others_mismatch_triplets"] == 3
    assert found["training/others_mismatch_ratio"] == 0.75
    assert found["tito_session_mismatch_rate"] == found["tito_session_mismatch_rate/assistant_text"] == 0.75
    assert found["cached"] == 3 * 16 + 40
    # A session of miles is an attempt, whatever number of conversations is in it.
    assert two.share_broken == 0.5
    sessions = two.as_dict()
    assert sessions["tito_session_mismatch_rate"] == sessions["tito_session_mismatch_rate/assistant_text"] == 1


@UNHURRIED
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=3)), max_size=8)
)
def test_any_calls_are_counted_and_survive_json(made: list[tuple[list[int], list[int]]]) -> None:
    calls = [
        Call(
            generation_id=f"g{number}",
            finished_at=number,
            prompt_token_ids=array("i", prompt),
            response_token_ids=array("i", answer),
        )
        for number, (prompt, answer) in enumerate(made)
    ]
    found = drift(*calls)

    assert AttemptDrift.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    assert found.kept + found.lost == sum(len(answer) for _, answer in made)
    assert found.calls == len(made)
    assert found.rows_after == len(merge(AttemptCalls(calls=calls)).rows)
    assert found == drift(*reversed(calls))
