"""`make demo-train`, for a few steps: a real vLLM gets the weights of TRL, and answers with them; and what it draws."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import agentlightning as agl
from examples.plot import png, terminal
from examples.train import (
    BOUND,
    COLUMNS,
    GENERATIONS,
    HEAD,
    MODES,
    NAMES,
    ROWS,
    STEPS,
    TASKS,
    TRAINERS,
    Conversation,
    Step,
    add_up,
    conclusion,
    from_text,
    introduction,
    line,
    share_of_digits,
    with_known_logprobs,
)
from tests.common.environments import CHECKOUT
from tests.common.vllm import without_agl
from tests.trainers.rows import conversation

FEW = 3


@pytest.mark.tier("all")
@pytest.mark.parametrize(
    ("trainer", "rows", "count"),
    [("trl", "exact", STEPS), ("verl", "exact", STEPS), ("trl", "continued", FEW), ("trl", "text", FEW)],
)
def test_the_trainer_learns_from_the_rows_of_each_step_and_vllm_has_its_weights(
    trainer: str, rows: str, count: int, tmp_path: Path
) -> None:
    results = tmp_path / "results.json"
    program = ("-m", "tools.trainers", "-m", "examples.train")
    done = subprocess.run(
        [sys.executable, *program, "--trainer", trainer, "--rows", rows, "--steps", str(count), "--results", results],
        cwd=CHECKOUT,
        env=without_agl(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert HEAD in done.stdout
    assert "reward by step" in done.stdout
    assert "the curve as a picture: .cache/demo-train/reward.png" in done.stdout
    assert "the page: serve it with " in done.stdout
    steps = [Step(**each) for each in json.loads(results.read_text())["0"]]
    assert len(steps) == count
    if count == STEPS:
        assert steps[0].reward < 0.1
        assert steps[-1].reward > 0.9
    for step in steps:
        assert (step.rollouts, step.masked) == (TASKS * GENERATIONS, 0)
        assert step.stale == 0
        if rows == "text":
            # Random weights say what no tokenizer would split like that.
            assert step.differ > 0
            assert step.mean > BOUND
        else:
            assert step.differ == step.unknown == 0
            assert step.highest < BOUND
        if rows == "continued":
            assert (step.rows, step.breaks) == (step.rollouts, 0)


class Tokenizer:
    """Splits an answer into the ids 10, 11, ..., one a character; a prompt is 1, the first answer, and 2."""

    eos_token_id = 99

    def encode(self, text: str, **_: object) -> list[int]:
        return [*range(10, 10 + len(text))]

    def apply_chat_template(self, messages: Sequence[Any], **_: object) -> list[int]:
        return [1] if len(messages) == 1 else [1, *self.encode(messages[1]["content"]), 2]


def test_ids_from_text_without_a_logprob_of_the_engine_are_not_compared() -> None:
    exact = [conversation()]
    texts = ("abcd", "e")
    answers = [
        SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text), finish_reason="length")])
        for text in texts
    ]
    messages = [{"content": "task"}, {"content": texts[0]}, {"content": "tool"}, {"content": texts[1]}]
    rollout = agl.Rollout("ro", "task", start_time=0)

    [row] = from_text(rollout, Conversation(messages, answers), exact, Tokenizer())
    compared = with_known_logprobs(row, exact)

    assert row.token_ids.tolist() == [1, 10, 11, 12, 13, 2, 10]
    assert row.logprobs is not None
    # The engine sampled 2 ids, then 3.
    assert row.logprobs.tolist() == pytest.approx([0, -0.04, -0.05, 0, 0, 0, -0.07])
    assert row.response_mask.tolist() == [0, 1, 1, 1, 1, 0, 1]
    assert compared.response_mask.tolist() == [0, 1, 1, 0, 0, 0, 1]


def test_the_reward_is_the_share_of_digits_and_the_tool_adds_them_up() -> None:
    assert share_of_digits("1a2b") == 0.5
    assert share_of_digits("") == 0.0
    assert add_up("1a29") == "12"


def test_a_line_of_the_table_stands_below_its_head_in_80_columns() -> None:
    step = Step(1.0, 16, 1, 32, 16, 16, 384, 0, 0, 0, 2.5e-7, 1.2e-6, 1.0, 12.3)

    assert len(line(30, step)) == len(HEAD) <= 80
    for name, value in (("reward", "1.000"), ("masked", "1"), ("rows", "32"), ("ids", "384")):
        assert line(30, step)[: HEAD.index(name) + len(name)].endswith(f" {value}"), name


def test_each_column_is_explained_before_the_table_and_the_outcome_behind_it() -> None:
    step = Step(0.25, 16, 0, 32, 0, 16, 200, 0, 0, 0, 2.5e-7, 1.2e-6, 1.0, 12.3)
    better = replace(step, reward=0.75, highest=3e-6)

    assert re.split(r" {2,}", HEAD) == ["step", *COLUMNS]
    assert (NAMES.keys(), ROWS.keys()) == (TRAINERS.keys(), MODES.keys())
    for trainer in TRAINERS:
        for rows in MODES:
            assert max(map(len, introduction(trainer, rows))) <= 80
    said = conclusion([step, better]).replace("\n", " ")
    assert said == (
        "In 2 steps the reward went from 0.250 to 0.750. All 400 trained ids are those that vLLM sampled, "
        "and its logprobs are the trainer's but for 3.0e-06."
    )
    assert conclusion([replace(step, differ=7), better]).endswith("Of 400 trained ids, vLLM sampled 7 otherwise.")


def test_values_are_drawn_from_left_to_right() -> None:
    drawn = terminal([0.0, 0.55, 1.0], "title").splitlines()

    assert drawn[0] == "title"
    assert drawn[1] == " 1.0 |  █"
    assert drawn[5] == " 0.6 | ▄█"
    assert drawn[-1] == "      1 3"
    assert max(map(len, terminal([0.5] * 1000, "title").splitlines())) <= 80


def test_a_picture_has_a_curve_for_each_kind_of_rows(tmp_path: Path) -> None:
    from PIL import Image

    png({"text": [[0.0, 0.5], [0.1, 0.7]], "exact": [[0.0, 1.0]]}, tmp_path / "reward.png")

    with Image.open(tmp_path / "reward.png") as picture:
        colours = {colour for _, colour in picture.getcolors(1 << 16) or []}
    assert {(31, 119, 180), (214, 39, 40)} <= colours
