"""Guesses at the agents of calls that name none."""

from __future__ import annotations

import pytest

from agentlightning.server.page.agents import guess_agents, guess_purpose

pytestmark = pytest.mark.tier("check")

TEMPLATES = {
    "ChatML": "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>",
    "Llama": "<|start_header_id|>system<|end_header_id|>{}<|eot_id|><|start_header_id|>user<|end_header_id|>{}",
    "Gemma": "<bos>{}<start_of_turn>user\n{}<end_of_turn>",
    "Mistral": "<s>[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT][INST]{}[/INST]",
    "DeepSeek": "{}<BUserB>{}<BAssistantB>".replace("B", "\N{FULLWIDTH VERTICAL LINE}"),
    "Phi": "<|system|>{}<|end|><|user|>{}<|end|>",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_agents_are_told_apart_by_what_comes_before_the_user(template: str) -> None:
    prompts = [
        template.format(*each)
        for each in [("You plan.", "one"), ("You review.", "one"), ("You plan.", "two"), ("You review.", "a user")]
    ]

    assert guess_agents(prompts) == [1, 2, 1, 2]
    assert guess_agents(prompts[::2]) == [None, None]


@pytest.mark.parametrize("tag", ["<user_info>", "<user>", "<b> user", "<users>"])
def test_tags_in_a_system_prompt_are_no_marker_of_a_user(tag: str) -> None:
    one, two = (TEMPLATES["ChatML"].format(f"{tag} {each}", "x") for each in ("You plan.", "You review."))

    assert guess_agents([one, two, one]) == [1, 2, 1]
    assert guess_agents([f"{tag} one", f"other {tag} two"]) == [None, None]


def test_system_prompt_that_changes_with_each_call_is_no_agent() -> None:
    clock = [TEMPLATES["ChatML"].format(f"It is 10:{minute}.", "x") for minute in range(10, 20)]
    three = [TEMPLATES["ChatML"].format(f"You are {number % 3}.", "x") for number in range(6)]

    assert guess_agents(clock) == [None] * 10
    assert guess_agents([*clock, clock[0]]) == [None] * 11
    assert guess_agents(three) == [1, 2, 3, 1, 2, 3]


def test_nothing_is_guessed_of_prompts_that_show_no_user() -> None:
    known = [TEMPLATES["ChatML"].format(each, "x") for each in ("a", "b")]

    assert guess_agents([]) == []
    assert guess_agents(["one", "two", None, ""]) == [None] * 4
    assert guess_agents([known[0], "one", None, known[1]]) == [1, None, None, 2]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_purpose_is_guessed_by_the_first_instructions(template: str) -> None:
    said = {
        "You are a title generator. You output ONLY a thread title.": "title",
        "Please write a 5-10 word title for the following conversation.": "title",
        "You are a helpful AI assistant tasked with summarizing conversations.": "compaction",
        "You plan.": None,
        f"You are a coding agent. {'Work with care. ' * 30}Write a title for each commit.": None,
    }

    assert [guess_purpose(template.format(each, "Write a title.")) for each in said] == [*said.values()]
    assert guess_purpose(None) is guess_purpose("Write a title.") is None
