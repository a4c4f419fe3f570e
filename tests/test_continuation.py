"""Decisions about what a request continues, and where its prompt goes on, without a server."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlightning.continuation import (
    CONTINUED,
    MOST_CANDIDATES,
    NO_MATCH,
    NOT_APPEND_ONLY,
    REASONING_DROPPED,
    SEAM,
    Answer,
    Call,
    Histories,
    Match,
    NotText,
    Rendered,
    canonical_calls,
    fingerprints,
)
from tests.common.continued import END, Served
from tests.common.templates import CHATML, QWEN3, TEMPLATES, TOOLS_LAST, rendered
from tests.common.unhurried import UNHURRIED

pytestmark = pytest.mark.tier("check")

END_TEXT = "<|im_end|>"
LIMIT = 1 << 20
USER = {"role": "user", "content": "Paris?"}
MORE = {"role": "user", "content": "And Rome?"}


def tool_call(arguments: Any = '{"city": "Paris", "unit": "c"}') -> dict[str, Any]:
    return {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def called(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [tool_call({"city": "Paris", "unit": "c"})], **fields}


TOOL = {"role": "tool", "content": "sunny", "tool_call_id": "call-1"}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_conversation_goes_on_from_what_the_model_wrote(template: str) -> None:
    served = Served(template)
    served.call([USER], "  It is\n", Answer("It is"))

    result, prompt = served.call([USER, {"role": "assistant", "content": "It is"}, MORE], "yes", Answer("yes"))

    assert result == CONTINUED
    assert prompt == rendered(template, [USER]) + "  It is\n" + END_TEXT + after(template, MORE)


def after(template: str, *messages: Any) -> str:
    """Return what a template adds behind the end of an answer."""
    answer = {"role": "assistant", "content": "x"}
    return rendered(template, [USER, answer, *messages]).partition(f"x{END_TEXT}")[2]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_tool_call_is_left_as_the_model_wrote_it(template: str) -> None:
    said = '<tool_call>\n{"name":  "weather", "arguments": {"unit":"c","city":"Paris"}}</tool_call>'
    served = Served(template)
    served.call([USER], said, Answer("", canonical_calls([tool_call()])))

    result, prompt = served.call([USER, called(), TOOL], "yes", Answer("yes"))

    assert result == CONTINUED
    assert prompt == rendered(template, [USER]) + said + END_TEXT + after(template, TOOL)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_an_answer_that_was_cut_gets_its_end_from_the_template(template: str) -> None:
    served = Served(template)
    served.call([USER], "It i", Answer("It i"), ended=False)

    result, prompt = served.call([USER, {"role": "assistant", "content": "It i"}, MORE], "yes", Answer("yes"))

    assert result == CONTINUED
    assert prompt == rendered(template, [USER]) + "It i" + END_TEXT + after(template, MORE)


REASONED = Answer("", canonical_calls([tool_call()]), "Hm,\nParis.")
REASONED_TEXT = "<think>\nHm,\nParis.\n</think>\n\n<tool_call>…</tool_call>"


@pytest.mark.parametrize("sent", [{}, {"reasoning": "Hm,\nParis.", "reasoning_content": "Hm,\nParis."}])
def test_reasoning_stays_while_the_template_keeps_it_whether_or_not_it_is_sent_back(sent: dict[str, str]) -> None:
    served = Served(QWEN3)
    served.call([USER], REASONED_TEXT, REASONED)

    result, prompt = served.call([USER, called(**sent), TOOL], REASONED_TEXT, REASONED)
    assert result == CONTINUED
    assert prompt == rendered(QWEN3, [USER]) + REASONED_TEXT + END_TEXT + after(QWEN3, TOOL)

    # Once more: the first answer's reasoning is known from the call that the second continued.
    result, longer = served.call([USER, called(), TOOL, called(), TOOL], "yes", Answer("yes"))
    assert result == CONTINUED
    assert longer == prompt + REASONED_TEXT + END_TEXT + after(QWEN3, TOOL)


def test_the_marks_of_a_tools_result_are_seen_by_a_template_whatever_stands_in_for_it() -> None:
    """Template like that of Qwen 3: text of a user within these marks is no new question."""
    is_user = "message['role'] == 'user'"
    served = Served(QWEN3.replace(is_user, f"{is_user} and not message['content'].startswith('<tool_response>')"))
    served.call([USER], REASONED_TEXT, REASONED)

    result = {"role": "user", "content": "<tool_response>\nsunny\n</tool_response>"}

    assert served.call([USER, called(), result], "yes", Answer("yes"))[0] == CONTINUED
    assert served.call([USER, called(), MORE], "yes", Answer("yes"))[0] == REASONING_DROPPED


@pytest.mark.parametrize(("keep", "result"), [(False, REASONING_DROPPED), (True, CONTINUED)])
def test_reasoning_that_the_template_takes_out_goes_with_it_unless_it_is_to_be_kept(keep: bool, result: str) -> None:
    served = Served(QWEN3, keep)
    served.call([USER], "<think>\nHm.\n</think>\n\nIt is.", Answer("It is.", (), "Hm."))

    messages = [USER, {"role": "assistant", "content": "It is."}, MORE]
    found, prompt = served.call(messages, "yes", Answer("yes"))

    assert found == result
    kept = f"{rendered(QWEN3, [USER])}<think>\nHm.\n</think>\n\nIt is.{END_TEXT}{after(QWEN3, MORE)}"
    assert prompt == (kept if keep else rendered(QWEN3, messages))


def test_a_thought_that_is_only_within_the_words_of_an_answer_is_left_out() -> None:
    served = Served(CHATML)
    served.call([USER], "<think>\neat\n</think>\n\nThe weather.", Answer("The weather.", (), "eat"))

    messages = [USER, {"role": "assistant", "content": "The weather.", "reasoning": "eat"}, MORE]

    assert served.call(messages, "yes", Answer("yes"))[0] == REASONING_DROPPED


@pytest.mark.parametrize(("keep", "result"), [(False, REASONING_DROPPED), (True, CONTINUED)])
def test_a_template_that_has_the_model_not_think_takes_that_out_later(keep: bool, result: str) -> None:
    served = Served(QWEN3, keep)
    served.call([USER], "It is.", Answer("It is."), enable_thinking=False)

    messages = [USER, {"role": "assistant", "content": "It is."}, MORE]

    assert served.call(messages, "yes", Answer("yes"), enable_thinking=False)[0] == result


SYSTEM_LAST = (
    "{% for message in messages %}{% if message.role == 'user' %}<|im_start|>"
    "{% if loop.last %}{{ messages[0].content }}\n{% endif %}{{ message.content }}<|im_start|>"
    "{% elif message.role == 'assistant' %}{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
)
"""A template in the style of Mistral's: what the system says goes to the last question."""
THINKS_AND_TOOLS_LAST = TOOLS_LAST + "{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.mark.parametrize("template", [TOOLS_LAST, SYSTEM_LAST, THINKS_AND_TOOLS_LAST])
def test_whoever_keeps_reasoning_keeps_nothing_else_that_a_template_has_changed(template: str) -> None:
    served = Served(template, keep=True)
    start = [{"role": "system", "content": "Be brief."}, USER]
    served.call(start, "<think>\nHm.\n</think>\n\nIt is.", Answer("It is.", (), "Hm."))

    messages = [*start, {"role": "assistant", "content": "It is."}, MORE]

    assert served.call(messages, "yes", Answer("yes")) == (NOT_APPEND_ONLY, rendered(template, messages))


def test_reasoning_of_several_turns_is_kept() -> None:
    served = Served(QWEN3, keep=True)
    said = "<think>\nHm.\n</think>\n\n"
    answer = {"role": "assistant", "content": "It is."}
    messages: list[Any] = [USER]
    prompts: list[str] = []
    for follows in (TOOL, MORE, TOOL, MORE):
        calls = {"tool_calls": called()["tool_calls"]} if follows is TOOL else {}
        result, prompt = served.call(
            messages, f"{said}It is.", Answer("It is.", canonical_calls(calls.get("tool_calls")), "Hm.")
        )
        assert result == (CONTINUED if prompts else NO_MATCH)
        assert prompt.startswith("".join(prompts[-1:]))
        prompts.append(f"{prompt}{said}It is.{END_TEXT}")
        messages = [*messages, {**answer, **calls}, follows]


@pytest.mark.parametrize("field", ["tools", "task", "tool_call_id"])
def test_a_message_with_other_tools_for_another_task_or_of_another_call_is_another(field: str) -> None:
    one, other = ({**USER, field: [{"name": name}]} for name in "ab")

    assert fingerprints([one]) == fingerprints([dict(one)])
    assert fingerprints([one]) != fingerprints([other])


def test_a_billing_header_counts_for_nothing_where_clients_write_it_alone() -> None:
    one, other = (f"x-anthropic-billing-header: {number}\nBe brief." for number in "12")

    def differ(role: str) -> bool:
        return fingerprints([{"role": role, "content": one}]) != fingerprints([{"role": role, "content": other}])

    assert not differ("system")
    assert differ("user")


def test_a_template_that_moves_a_turn_is_not_append_only() -> None:
    served = Served(THINKS_AND_TOOLS_LAST)
    served.call([USER], "It is.", Answer("It is."))

    messages = [USER, {"role": "assistant", "content": "It is."}, MORE]

    assert served.call(messages, "yes", Answer("yes")) == (NOT_APPEND_ONLY, rendered(THINKS_AND_TOOLS_LAST, messages))


def test_an_answer_with_the_end_of_a_turn_in_its_text_is_not_continued() -> None:
    served = Served(CHATML)
    text = f"It is{END_TEXT} not"
    served.call([USER], text, Answer(text))

    assert served.call([USER, {"role": "assistant", "content": text}, MORE], "yes", Answer("yes"))[0] == SEAM


MESSAGES = [USER, {"role": "assistant", "content": "It is."}, MORE]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": " It is.\n"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It"}, {"type": "text", "text": " is."}]},
        {"role": "assistant", "content": "It is.", "reasoning": "", "tool_calls": [], "id": "msg_1"},
    ],
)
def test_clients_may_send_an_answer_back_in_their_own_way(message: dict[str, Any]) -> None:
    assert found([USER, message, MORE])


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": "It is not."}, MORE],
        [USER, {"role": "assistant", "content": "It is.", "tool_calls": [tool_call()]}, MORE],
        [USER, {"role": "assistant", "content": "It is.", "reasoning": "It said so."}, MORE],
        [MORE, {"role": "assistant", "content": "It is."}, MORE],
        [USER, USER, {"role": "assistant", "content": "It is."}, MORE],
        [{"role": "system", "content": "Be brief."}, *MESSAGES],
        [USER, {"role": "user", "content": "It is."}, MORE],
        [USER, {"role": "assistant", "content": "It is."}],
    ],
)
def test_another_conversation_finds_nothing(messages: list[Any]) -> None:
    assert not found(messages)


def found(messages: list[Any], key: str = "ro-1") -> Match | None:
    histories = Histories(LIMIT)
    histories.add("ro-1", fingerprints([USER])[-1], made_up(1))
    return histories.find(key, messages, fingerprints(messages), lambda call: [Answer("It is.")])


def made_up(position: int, ids: int = 3, continued: Call | None = None) -> Call:
    return Call(position, Rendered.of(""), array("i", range(ids)), array("i", [7]), [END], False, None, continued)


def test_rollouts_with_equal_messages_do_not_mix() -> None:
    assert found(MESSAGES)
    assert not found(MESSAGES, "ro-2")


def test_other_tools_or_another_model_find_nothing_and_are_told_from_other_messages() -> None:
    histories, fingerprint = Histories(LIMIT), fingerprints([USER])[-1]
    histories.add("ro-1", fingerprint, replace(made_up(1), kind=b"one"))

    def is_found(kind: bytes) -> bool:
        found = histories.find("ro-1", MESSAGES, fingerprints(MESSAGES), lambda call: [Answer("It is.")], kind)
        return found is not None

    assert [is_found(kind) for kind in (b"one", b"other")] == [True, False]
    assert [histories.has_of_other_kind("ro-1", fingerprint, kind) for kind in (b"one", b"other")] == [False, True]
    assert not histories.has_of_other_kind("ro-1", fingerprints([MORE])[-1], b"other")


ACT = "Act: look\nObservation:"


@pytest.mark.parametrize(
    ("text", "result"),
    [
        pytest.param(f"{ACT} a fox.", CONTINUED, id="added behind the stop string"),
        pytest.param("Act: look a fox.", NO_MATCH, id="in the place of the stop string"),
        pytest.param("Act: see\nObservation: a fox.", NO_MATCH, id="to another answer"),
    ],
)
def test_what_a_client_adds_to_an_answer_that_its_stop_string_ended_stands_behind_it(text: str, result: str) -> None:
    served = Served(CHATML)
    served.call([USER], f"  {ACT}", Answer(f"  {ACT}"), ended=False, is_open=True)

    messages = [USER, {"role": "assistant", "content": text}, MORE]
    found, prompt = served.call(messages, "yes", Answer("yes"))

    assert found == result
    added = f"{rendered(CHATML, [USER])}  {ACT} a fox.{END_TEXT}{after(CHATML, MORE)}"
    assert prompt == (added if result == CONTINUED else rendered(CHATML, messages))


def test_nothing_can_be_added_to_an_answer_that_the_model_has_ended_or_that_was_cut() -> None:
    served = Served(CHATML)
    served.call([USER], ACT, Answer(ACT))
    served.call([USER], ACT, Answer(ACT), ended=False)

    messages = [USER, {"role": "assistant", "content": f"{ACT} a fox."}, MORE]

    assert served.call(messages, "yes", Answer("yes"))[0] == NO_MATCH


def test_the_answer_that_a_message_is_goes_before_those_that_it_begins_with() -> None:
    histories, fingerprint = Histories(LIMIT), fingerprints([USER])[-1]
    calls = [replace(made_up(1), answers=[Answer(text)], is_open=True) for text in ("It is.", "It", "It is")]
    for call in calls:
        histories.add("ro-1", fingerprint, call)

    def found(text: str) -> Match | None:
        messages = [USER, {"role": "assistant", "content": text}, MORE]
        return histories.find("ro-1", messages, fingerprints(messages), lambda call: call.answers or ())

    assert found("It is.") == Match(calls[0], Answer("It is."))
    assert found("It is. So!") == Match(calls[0], Answer("It is."), " So!")
    assert found("It was.") == Match(calls[1], Answer("It"), " was.")


@UNHURRIED
@given(st.data())
def test_equal_json_is_equal_however_it_is_written(data: st.DataObject) -> None:
    import json

    leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4)
    value = data.draw(st.dictionaries(st.text(max_size=4), leaves | st.lists(leaves, max_size=2), max_size=3))
    written = json.dumps(value, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=data.draw(st.booleans()))

    assert canonical_calls([tool_call(written)]) == canonical_calls([tool_call(value)])


def test_of_several_equal_answers_the_latest_is_continued_and_each_branch_its_own() -> None:
    histories = Histories(LIMIT)
    answers = {call: Answer(text) for call, text in ((made_up(1), "a"), (made_up(1), "b"), (made_up(1), "b"))}
    for call in answers:
        histories.add("ro-1", fingerprints([USER])[-1], call)
    first, _, latest = answers

    def continued(text: str) -> Call | None:
        messages = [USER, {"role": "assistant", "content": text}, MORE]
        match = histories.find("ro-1", messages, fingerprints(messages), lambda call: [answers[call]])
        return match and match.call

    assert continued("a") is first
    assert continued("b") is latest
    assert continued("c") is None


def test_of_many_retries_only_the_latest_are_parsed() -> None:
    histories = Histories(LIMIT)
    calls = [made_up(1) for _ in range(100)]
    for call in calls:
        histories.add("ro-1", fingerprints([USER])[-1], call)
    parsed: list[Call] = []

    def answers_of(call: Call) -> list[Answer]:
        parsed.append(call)
        return [Answer("It is not.")]

    assert histories.find("ro-1", MESSAGES, fingerprints(MESSAGES), answers_of) is None
    assert parsed == calls[: -MOST_CANDIDATES - 1 : -1]


def test_the_longest_call_is_continued() -> None:
    histories = Histories(LIMIT)
    messages = [*MESSAGES, {"role": "assistant", "content": "It is."}, MORE]
    short, long = made_up(1), made_up(3)
    histories.add("ro-1", fingerprints(messages)[1], short)
    histories.add("ro-1", fingerprints(messages)[3], long)

    match = histories.find("ro-1", messages, fingerprints(messages), lambda call: [Answer("It is.")])

    assert match
    assert match.call is long


def test_an_image_is_not_text() -> None:
    with pytest.raises(NotText):
        fingerprints([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "…"}}]}])


def test_the_cache_stays_within_its_bound_and_counts_what_it_drops() -> None:
    histories = Histories(100_000)
    continued: Call | None = None
    for number in range(10_000):
        continued = made_up(number, 100, continued if number % 20 else None)
        histories.add(f"ro-{number // 20}", number.to_bytes(4, "big"), continued)
        assert histories.nbytes <= 100_000

    assert len(histories) + histories.dropped == 10_000
    assert 40 < len(histories) < 100
    assert not histories.knows("ro-0")
    assert histories.knows("ro-499")


def test_a_rollout_that_is_used_stays_in_the_cache() -> None:
    histories = Histories(10_000)
    for number in range(100):
        histories.add("used", fingerprints([USER])[-1], made_up(1)) if not number else None
        assert histories.find("used", MESSAGES, fingerprints(MESSAGES), lambda call: [Answer("It is.")])
        histories.add(f"ro-{number}", b"", made_up(1))


def test_a_call_whose_forerunner_was_dropped_keeps_all_ids() -> None:
    histories = Histories(3_000)
    first = made_up(1)
    histories.add("ro-1", b"1", first)
    second = made_up(3, 2, first)
    for number in range(9):
        histories.add(f"ro-{number + 2}", b"", made_up(1))
    before = second.token_ids()

    histories.add("ro-1", b"3", second)

    assert second.continued is None
    assert second.token_ids() == before == [0, 1, 2, 7, 0, 1, 7]


def alike(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def replaced(own: str, exact: str) -> list[tuple[str, str]]:
    """Return what the template makes, and what a prompt has in its place, for each turn that differs."""
    pairs: list[tuple[str, str]] = []
    for one, other in zip(own.split(END_TEXT), exact.split(END_TEXT), strict=True):
        if one != other:
            start = alike(one, other)
            one, other = one[start:], other[start:]
            end = alike(one[::-1], other[::-1])
            pairs.append((one[: len(one) - end], other[: len(other) - end]))
    return pairs


WRITTEN = '<tool_call>\n{"name":  "weather", "arguments": {"unit":"c","city":"Paris"}}</tool_call>'


@pytest.mark.parametrize(
    ("said", "answer", "message", "follows", "expected"),
    [
        pytest.param("It is.", Answer("It is."), {"content": "It is."}, MORE, [], id="nothing"),
        pytest.param(
            "  It is\n", Answer("It is"), {"content": "It is"}, MORE, [("It is", "  It is\n")], id="white space"
        ),
        pytest.param(
            WRITTEN,
            Answer("", canonical_calls([tool_call()])),
            called(),
            TOOL,
            [
                (
                    '"weather", "arguments": {"city": "Paris", "unit": "c"}}\n',
                    ' "weather", "arguments": {"unit":"c","city":"Paris"}}',
                )
            ],
            id="JSON",
        ),
        pytest.param(
            "<think>Hm.</think>It is.",
            Answer("It is.", (), "Hm."),
            {"content": "It is."},
            TOOL,
            [("", "<think>Hm.</think>")],
            id="reasoning",
        ),
    ],
)
def test_what_stands_in_a_prompt_is_shown_as_a_diff_for_each_cause(
    said: str, answer: Answer, message: dict[str, Any], follows: Any, expected: list[tuple[str, str]]
) -> None:
    served = Served(QWEN3 if answer.reasoning else CHATML)
    served.call([USER], said, answer)
    messages = [USER, {"role": "assistant", **message}, follows]

    result, prompt = served.call(messages, "yes", Answer("yes"))

    assert result == CONTINUED
    assert replaced(rendered(served.template, messages), prompt) == expected


@UNHURRIED
@given(st.data())
def test_a_prompt_differs_from_the_templates_own_in_the_models_answers_alone(data: st.DataObject) -> None:
    """Property: whatever is asked, answered and called, each difference is all of what the model wrote, in the place
    where the template has the answer."""
    template = TEMPLATES[data.draw(st.sampled_from(sorted(TEMPLATES)))]
    served = Served(template)
    messages: list[Any] = data.draw(
        st.lists(st.builds(lambda text: {"role": "system", "content": text}, TEXTS), max_size=1)
    )
    messages = [*messages, USER]
    said: list[str] = []
    for number in range(data.draw(st.integers(1, 5))):
        answer, text = data.draw(ANSWERS), data.draw(TEXTS)
        result, prompt = served.call(messages, f"({number}){answer.text}", answer)
        if result == CONTINUED:
            own, exact = rendered(template, messages).split(END_TEXT), prompt.split(END_TEXT)
            answers = iter(said)
            for one, other in zip(own, exact, strict=True):
                if one != other:
                    # The one that the model wrote here, behind what the template writes in front of an answer.
                    wrote = next(each for each in answers if other.endswith(each))
                    assert one.startswith(other[: len(other) - len(wrote)])
        said.append(f"({number}){answer.text}")
        calls = {"tool_calls": called()["tool_calls"]} if answer.tool_calls else {}
        follows = {**TOOL, "content": text} if calls else {"role": "user", "content": text}
        messages = [*messages, {"role": "assistant", "content": answer.text, **calls}, follows]


TEXTS = st.text(st.sampled_from("ab \n<>|?!{}"), max_size=8)
ANSWERS = st.builds(Answer, TEXTS, st.sampled_from([(), canonical_calls([tool_call()])]), TEXTS)


@UNHURRIED
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(ANSWERS, TEXTS, st.booleans()), min_size=1, max_size=5))
def test_a_prompt_is_the_templates_own_but_for_what_the_model_wrote(name: str, turns: list[Any]) -> None:
    """A prompt is the template's, or that with what the model wrote in the place of the answers."""
    template = TEMPLATES[name]
    served = Served(template)
    messages: list[Any] = [USER]
    before = ""
    for answer, text, ended in turns:
        said = f"[{answer.reasoning}|{answer.text}|{len(answer.tool_calls)}]"
        result, prompt = served.call(messages, said, answer, ended=ended)
        if result == CONTINUED:
            assert prompt.startswith(before)
            rest = prompt[len(before) :]
            # What follows the answer is the end of what the template makes of the whole request.
            assert rendered(template, messages).endswith(rest)
            assert (rest if not before.endswith(END_TEXT) else END_TEXT + rest).startswith(END_TEXT)
        else:
            assert prompt == rendered(template, messages)
        before = prompt + said + (END_TEXT if ended else "")
        calls = {"tool_calls": called()["tool_calls"]} if answer.tool_calls else {}
        follows = {**TOOL, "content": text} if calls else {"role": "user", "content": text}
        messages = [*messages, {"role": "assistant", "content": answer.text, **calls}, follows]
