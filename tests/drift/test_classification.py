"""Causes of breaks, each named by the pure function, with the templates and tokenizers of models that many train."""

from __future__ import annotations

import random
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentlightning.drift import CAUSES, Cause, classify
from agentlightning.drift._classification import continues
from agentlightning.sender import Vocabulary
from agentlightning.token_text import TokenTexts
from tests.common.unhurried import UNHURRIED
from tests.drift.breaks import MAKERS, Made, make
from tests.drift.templates import TEMPLATES, TINY, TOOLS_FIRST, Message, Mistral, Template

pytestmark = pytest.mark.tier("check")

SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it cold?"}
ANSWER = {"role": "assistant", "content": "It is.", "tool_calls": []}
AGAIN = {"role": "user", "content": "And tomorrow?"}
SPECIAL = 4
FEW = TokenTexts(Vocabulary(["<|s|>", "<think>", "<|e|>", "</s>", *'abcdef \n{}"[]:,'], frozenset(range(SPECIAL))))
some_ids = st.lists(st.integers(-1, 25), max_size=60)


@pytest.mark.parametrize("cause", MAKERS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda each: each.name)
def test_a_break_is_named_by_its_cause(cause: Cause, template: Template) -> None:
    made = make(cause, template, 0)

    found = classify(made.before, made.answer_start, made.prompt, template.texts)

    assert found.cause == cause
    assert found.position == _common(made.before, made.prompt)


def test_of_200_breaks_95_percent_are_named_right_and_no_other_with_certainty(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = [
        (template, make(cause, template, number))
        for number in range(1, 6)
        for cause in MAKERS
        for template in TEMPLATES
    ]
    chosen = random.Random(0).sample(made, 200)

    named = [(each, classify(each.before, each.answer_start, each.prompt, at.texts)) for at, each in chosen]

    wrong = [(each.cause, found.cause, found.is_certain) for each, found in named if found.cause != each.cause]
    right = len(named) - len(wrong)
    certain = Counter(each.cause for each, found in named if found.is_certain)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{right} of {len(named)} breaks made by hand are named right ({right / len(named):.1%}), of the others "
            f"{sum(certain for *_, certain in wrong)} with certainty: {wrong}\n"
            f"named with certainty: {', '.join(f'{cause} {certain[cause]}' for cause in MAKERS)}\n"
        )
    assert {each.cause for _, each in chosen} == {*MAKERS}
    assert right >= 0.95 * len(named)
    assert not [each for each in wrong if each[2]]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda each: each.name)
def test_a_longer_conversation_with_other_turns_is_no_change_of_a_header(template: Template) -> None:
    begin = template.prompt([SYSTEM, {"role": "user", "content": "What is 1 plus 2?"}])
    said = {**ANSWER, "content": "It is three, as far as I know."}
    asked = [SYSTEM, {"role": "user", "content": "What is 5 plus 2?"}, {**ANSWER, "content": "It is seven."}, AGAIN]

    found = classify([*begin, *template.answer(said)], len(begin), template.prompt(asked), template.texts)

    assert (found.cause, found.is_certain) == ("sub_agent", False)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("systems", "questions"),
    [
        (
            ("It is 10:00. Be brief.", "It is 10:05. Be brief."),
            ("<env>/tmp, 3 files</env>\nIs it cold?", "Is it cold?"),
        ),
        (("You plan. Be brief.", "You act. Be brief."), ("plan mode: Is it cold?", "act mode: Is it cold?")),
        (("You are in plan mode: only read files.", "Act mode: write now."), ("Is it cold?", "Is it cold?")),
        (("You are in plan mode: only read files.", "Act mode: write now."), ("Is it cold?", "Do what you planned.")),
    ],
    ids=["trimmed", "mode", "another system prompt", "both"],
)
@pytest.mark.parametrize("thoughts", ["", "<think>\nLet me look at the thermometer.\n</think>\n\n"])
def test_a_conversation_goes_on_that_has_the_answer_though_all_in_front_of_it_changed(
    template: Template, systems: tuple[str, str], questions: tuple[str, str], thoughts: str
) -> None:
    said = {**ANSWER, "content": "It is one degree."}
    begin, prompt = (
        template.prompt([{**SYSTEM, "content": system}, {**QUESTION, "content": question}, *more])
        for system, question, more in zip(systems, questions, ([], [said, AGAIN]), strict=True)
    )
    answer = [*template.encode(thoughts), *template.answer(said)]

    found = classify([*begin, *answer], len(begin), prompt, template.texts)

    assert found.cause == "header"
    assert continues([*begin, *answer], len(begin), prompt, template.texts)


def test_tools_behind_the_last_message_move_and_what_else_breaks_is_named_too() -> None:
    tool = {"function": {"name": "look", "parameters": {"type": "object"}}}
    begin = TINY.prompt([QUESTION], [tool])
    said = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"at": 1}}]}
    answer = TINY.encode('Let me see.\n\n<tool_call>\n{"name":  "look", "arguments":{"at": 1}}\n</tool_call><|im_end|>')
    history = [QUESTION, {**said, "content": "Let me see."}, {"role": "tool", "content": "cold"}]

    found = classify([*begin, *answer], len(begin), TINY.prompt(history, [tool]), TINY.texts)

    assert (found.cause, found.is_certain, found.also) == ("template", True, ("tool_call",))


@pytest.mark.parametrize(
    ("system", "history", "cause"),
    [
        ("Be brief.", True, "tools"),
        ("Report to another agent what you find in the files that it names.", False, "sub_agent"),
    ],
)
def test_tools_in_turns_of_their_own_are_told_apart_from_those_of_a_sub_agent(
    system: str, history: bool, cause: Cause
) -> None:
    tools = [{"function": {"name": name, "parameters": {"type": "object"}}} for name in ("ask", "look", "write")]
    begin = TOOLS_FIRST.prompt([SYSTEM, QUESTION], tools)
    prompt = [{**SYSTEM, "content": system}, QUESTION, *([ANSWER, AGAIN] if history else [])]

    for fewer in (tools[1:], tools[:1], []):
        found = classify(
            [*begin, *TOOLS_FIRST.answer(ANSWER)], len(begin), TOOLS_FIRST.prompt(prompt, fewer), TOOLS_FIRST.texts
        )
        assert (found.cause, found.is_certain) == (cause, True)


def test_forced_arguments_are_the_call_that_the_template_makes_of_them() -> None:
    begin = TINY.prompt([QUESTION])
    answer = TINY.encode('{"at":    1}<|im_end|>')
    said = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"at": 1}}]}

    found = classify([*begin, *answer], len(begin), TINY.prompt([QUESTION, said, AGAIN]), TINY.texts)

    assert (found.cause, found.is_certain, found.role, found.message) == ("tool_call", True, "assistant", 1)


@pytest.mark.parametrize(("kept", "is_certain"), [([], False), ([ANSWER, AGAIN], True)])
def test_a_summary_is_a_compaction_with_certainty_only_where_turns_are_kept(
    kept: Sequence[Message], is_certain: bool
) -> None:
    again = {"role": "assistant", "content": "It will be warm.", "tool_calls": []}
    before = TINY.prompt([SYSTEM, QUESTION, again, QUESTION, ANSWER, AGAIN])
    prompt = TINY.prompt([SYSTEM, {"role": "user", "content": "Summarize this: cats sleep."}, *kept])

    found = classify([*before, *TINY.answer(again)], len(before), prompt, TINY.texts)

    assert (found.cause, found.is_certain) == ("compaction", is_certain)


@pytest.mark.parametrize(
    ("thoughts", "causes"), [("", ["answer_end"]), ("<think>\nhm\n</think>\n\n", ["reasoning", "answer_end"])]
)
def test_a_stop_string_that_is_sampled_is_missing_at_the_end_of_the_history(thoughts: str, causes: list[Cause]) -> None:
    begin = TINY.prompt([QUESTION])
    answer = TINY.encode(f"{thoughts}I should look.\nAction: look[Paris]\nObservation:")
    said = {"role": "assistant", "content": "I should look.\nAction: look[Paris]", "tool_calls": []}

    found = classify([*begin, *answer], len(begin), TINY.prompt([QUESTION, said, AGAIN]), TINY.texts)

    assert [found.cause, *found.also] == causes


@pytest.mark.parametrize(
    ("written", "cause", "is_certain", "also"),
    [
        ('The answer is "forty two"', "reasoning", False, ("foreign",)),
        ("Nobody knows, and it is far too late.", "foreign", True, ()),
        ("<think>\nLess.\n</think>\n\nThe answer is 'forty two'.", "reasoning", False, ("foreign",)),
    ],
)
def test_an_answer_is_compared_without_its_reasoning_however_long_that_is(
    written: str, cause: Cause, is_certain: bool, also: tuple[Cause, ...]
) -> None:
    begin = TINY.prompt([QUESTION])
    thoughts = "I should compute this, and then check it again. " * 20
    answer = TINY.encode(f"<think>\n{thoughts}\n</think>\n\nThe answer is 'forty two'<|im_end|>")
    history = [QUESTION, {**ANSWER, "content": written}, AGAIN]

    found = classify([*begin, *answer], len(begin), TINY.prompt(history), TINY.texts)

    assert (found.cause, found.is_certain, found.also) == (cause, is_certain, also)


def test_a_number_written_without_its_point_is_the_same_tool_call() -> None:
    begin = TINY.prompt([QUESTION])
    answer = TINY.encode('<tool_call>\n{"name": "look", "arguments": {"at": 1.0}}\n</tool_call><|im_end|>')
    said = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {"at": 1}}]}

    found = classify([*begin, *answer], len(begin), TINY.prompt([QUESTION, said, AGAIN]), TINY.texts)

    assert (found.cause, found.is_certain) == ("tool_call", True)


def test_a_system_prompt_that_moves_to_the_last_question_is_the_templates_doing() -> None:
    template = Mistral("mistral v3")
    begin = template.prompt([SYSTEM, QUESTION])

    for answer in (ANSWER, {**ANSWER, "content": "Nobody knows."}):
        prompt = template.prompt([SYSTEM, QUESTION, answer, AGAIN])
        found = classify([*begin, *template.answer(ANSWER)], len(begin), prompt, template.texts)

        assert (found.cause, found.is_certain) == ("template", True)


def test_random_bytes_come_back_as_replacement_characters_which_is_the_same_text() -> None:
    begin = TINY.prompt([QUESTION])
    half = next(at for at, each in enumerate(TINY.texts.text(n) for n in range(400)) if each == "\\xc3")
    answer = [*TINY.encode("It is"), half, *TINY.encode(" cold"), TINY.id_of("<|im_end|>")]
    said = {"role": "assistant", "content": "It is\ufffd cold", "tool_calls": []}

    found = classify([*begin, *answer], len(begin), TINY.prompt([QUESTION, said, AGAIN]), TINY.texts)

    assert (found.cause, found.is_certain) == ("retokenised", True)


def test_special_tokens_that_the_model_sampled_are_missing_in_the_text() -> None:
    begin = TINY.prompt([QUESTION])
    answer = [*TINY.encode("It is"), TINY.id_of("<|im_start|>"), *TINY.encode(" cold"), TINY.id_of("<|im_end|>")]
    said = {"role": "assistant", "content": "It is cold", "tool_calls": []}

    found = classify([*begin, *answer], len(begin), TINY.prompt([QUESTION, said, AGAIN]), TINY.texts)

    assert (found.cause, found.is_certain) == ("template", True)


def test_without_a_vocabulary_only_the_same_prompt_is_named() -> None:
    made = make("answer_end", TINY, 0)

    assert classify(made.before, made.answer_start, made.prompt, None).cause == "other"
    assert classify(made.before, made.answer_start, made.before[: made.answer_start], None).cause == "retry"
    assert not classify(made.before, made.answer_start, made.prompt, TokenTexts(None)).is_certain


def test_ids_of_two_vocabularies_are_compared_as_texts() -> None:
    one = TokenTexts(Vocabulary(["a", "b", "ab", "c"]))
    other = TokenTexts(Vocabulary(["ab", "c", "a", "b"]))

    assert classify([0, 1], 1, [0, 1], other, one).cause == "retokenised"
    assert classify([0, 3], 1, [0, 1, 1], other, one).cause == "other"


@UNHURRIED
@given(some_ids, some_ids, some_ids, some_ids)
def test_any_ids_have_a_cause_and_a_first_difference(
    shared: list[int], rest: list[int], answer: list[int], other: list[int]
) -> None:
    before, prompt = [*shared, *rest, *answer], [*shared, *other]

    found = classify(before, len(shared) + len(rest), prompt, FEW)

    assert found.cause in CAUSES
    assert found.position == _common(before, prompt)
    assert found == classify(array("i", before), len(shared) + len(rest), array("i", prompt), FEW)


@UNHURRIED
@given(some_ids, st.integers(0, 60), st.integers(0, 25))
def test_what_is_the_same_text_is_never_named_otherwise_with_certainty(shared: list[int], at: int, other: int) -> None:
    """The word ab is one id in the answer, and two in the prompt."""
    texts = TokenTexts(Vocabulary(["<|s|>", "a", "b", "ab", *"cdefgh"], frozenset({0})))
    begin = [each % 10 for each in shared]

    found = classify([*begin, 0, 4, 3, 5, 0], len(begin) + 1, [*begin, 0, 4, 1, 2, 5, 0, 6, 7, 0], texts)

    assert (found.cause, found.is_certain) == ("retokenised", True)


class _Counting(TokenTexts):
    """Texts that count the ids that are decoded: nearly all of the work."""

    ids = 0

    def join(self, token_ids: Iterable[int]) -> str:
        found = [*token_ids]
        self.ids += len(found)
        return super().join(found)


@pytest.mark.parametrize("cause", ["retokenised", "header", "foreign", "sub_agent"])
def test_each_of_a_million_ids_is_decoded_a_few_times_at_most(cause: Cause) -> None:
    made = _longer(make(cause, TINY, 1), 500_000)
    texts = _Counting(TINY.vocabulary)

    found = classify(made.before, made.answer_start, made.prompt, texts)

    assert found.cause == cause
    assert len(made.before) > 500_000
    assert texts.ids < 8 * (len(made.before) + len(made.prompt))


def _longer(made: Made, ids: int) -> Made:
    """Put so many more ids on both sides: in front of what differs, or behind it."""
    word = TINY.encode("Why? ")
    question = array("i", TINY.encode("<|im_start|>user\n") + word * (ids // len(word) + 1))
    before, prompt = array("i", made.before), array("i", made.prompt)
    if made.cause in ("header", "sub_agent"):
        return Made(made.cause, before + question, len(before) + len(question) - 1, prompt + question)
    return Made(made.cause, question + before, made.answer_start + len(question), question + prompt)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next(
        (at for at, (each, beside) in enumerate(zip(one, other, strict=False)) if each != beside),
        min(len(one), len(other)),
    )
