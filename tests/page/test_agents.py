"""Guesses at the agents of calls that name none."""

from __future__ import annotations

import pytest

from agentlightning.server.page.agents import guess_agents

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


def test_nothing_is_guessed_of_prompts_that_show_no_user() -> None:
    known = [TEMPLATES["ChatML"].format(each, "x") for each in ("a", "b")]

    assert guess_agents([]) == []
    assert guess_agents(["one", "two", None, ""]) == [None] * 4
    assert guess_agents([known[0], "one", None, known[1]]) == [1, None, None, 2]
