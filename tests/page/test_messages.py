"""Messages read from prompts, by the markers of chat templates."""

from __future__ import annotations

import pytest

from agentlightning.server.page.messages import Part, answer_parts, messages_of, shown_of

pytestmark = pytest.mark.tier("check")

B = "\N{FULLWIDTH VERTICAL LINE}"
TEMPLATES = {
    "ChatML": "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n",
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>"
    ),
    "Mistral": "<s>[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT][INST]{}[/INST]{}</s>",
    "Phi": "<|system|>\n{}<|end|>\n<|user|>\n{}<|end|>\n<|assistant|>\n{}<|end|>\n",
    "Harmony": (
        "<|start|>system<|message|>{}<|end|><|start|>user<|message|>{}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>{}<|end|>"
    ),
}


def read(text: str) -> list[tuple[str | None, list[tuple[str, str, str]]]]:
    return [(each.role, [(part.kind, part.name, part.text) for part in each.parts]) for each in messages_of(text)]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_messages_of_each_template_have_their_roles(template: str) -> None:
    texts = ("You plan.", "What is 6 times 7?\n\nSay it.", "42")

    assert read(template.format(*texts)) == [
        (role, [("text", "", text)]) for role, text in zip(("system", "user", "assistant"), texts, strict=True)
    ]


def test_text_without_marks_has_no_role() -> None:
    assert read("Once upon a time") == [(None, [("text", "", "Once upon a time")])]
    deepseek = f"<{B}begin▁of▁sentence{B}>You plan.<{B}User{B}>hello<{B}Assistant{B}>"
    assert read(deepseek) == [(None, [("text", "", "You plan.")]), ("user", [("text", "", "hello")])]
    assert read("") == []


def test_tags_in_a_text_are_no_marks() -> None:
    text = "<user> <b>user</b> <|not a mark|> <|im_start| >"

    assert read(text) == [(None, [("text", "", text)])]


def test_reasoning_calls_and_results_are_told_apart() -> None:
    said = '<think>\nhm\n</think>\n\nI count.\n<tool_call>\n{"name": "sum", "arguments": {"of": [1, 2]}}\n</tool_call>'
    prompt = (
        f"<|im_start|>assistant\n{said}<|im_end|>\n<|im_start|>user\n"
        "<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    call = ("call", "sum", '{\n  "of": [\n    1,\n    2\n  ]\n}')

    assert read(prompt) == [
        ("assistant", [("reasoning", "", "hm"), ("text", "", "I count."), call]),
        ("tool", [("result", "", "3"), ("result", "", "4")]),
    ]


@pytest.mark.parametrize(
    ("written", "name", "arguments"),
    [
        ('[TOOL_CALLS][{"name": "sum", "arguments": {}}]', "sum", "{}"),
        ("[TOOL_CALLS]sum[ARGS]{}", "sum", "{}"),
        ('<|python_tag|>{"name": "sum", "parameters": {}}', "sum", "{}"),
        ('<tool_call>{"function": {"name": "sum", "arguments": "{}"}}</tool_call>', "sum", "{}"),
        ('<tool_call>{"name": "sum", "argum', "", '{"name": "sum", "argum'),
        ("<tool_call>\n<function=sum></function>\n</tool_call>", "", "<function=sum></function>"),
    ],
)
def test_calls_in_each_notation_are_shown_as_calls(written: str, name: str, arguments: str) -> None:
    assert answer_parts(written) == [Part("call", arguments, name)]


def test_harmony_has_reasoning_calls_and_results() -> None:
    prompt = (
        "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.sum <|constrain|>json<|message|>{}<|call|>"
        "<|start|>functions.sum to=assistant<|channel|>commentary<|message|>3<|end|><|start|>assistant"
    )

    assert read(prompt) == [
        ("assistant", [("reasoning", "", "hm")]),
        ("assistant", [("call", "sum", "{}")]),
        ("tool", [("result", "", "3")]),
    ]


def test_reasoning_that_the_prompt_has_opened_is_reasoning() -> None:
    assert answer_parts("hm</think>\n\nyes", "assistant\n<think>\n") == [Part("reasoning", "hm"), Part("text", "yes")]
    # Cut off within it.
    assert answer_parts("hm", "assistant\n<think>\n") == [Part("reasoning", "hm")]
    assert answer_parts("hm", "assistant\n") == [Part("text", "hm")]


def test_long_messages_are_shortened_and_of_many_the_first_and_the_last_are_shown() -> None:
    found = shown_of(messages_of("".join(f"<|user|>{number} {'x' * 1_000}" for number in range(30))), 2_400)

    assert [each.parts[0].text.split()[0] for each in found.messages] == ["0", "1", *map(str, range(20, 30))]
    assert found.messages_left_out == 18
    assert {len(each.parts[0].text) for each in found.messages} == {200}
    assert found.characters_left_out == sum(len(str(number)) + 1_001 - 200 for number in [0, 1, *range(20, 30)])


@pytest.mark.parametrize(
    "text", ["<tool_call>", "<tool_response> ", "<|im_end|>", "<think>", "[TOOL_CALLS]", " ", "\n"]
)
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    for role in ("user", "assistant"):
        messages = messages_of(f"<|im_start|>{role}\n{text * 200_000}x")

        assert len(messages) <= 1


def test_answer_of_many_calls_is_shortened_to_the_first() -> None:
    answer = '<tool_call>{"name": "sum", "arguments": {}}</tool_call>' * 1_000
    found = shown_of(messages_of(f"<|im_start|>assistant\n{answer}"), 1_000)

    assert [len(each.parts) for each in found.messages] == [20]
    assert found.characters_left_out == 2 * 980
