"""The task of a model in the programs that train it: to answer with a good id, not with the environment's words."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import agentlightning as agl
from tests.common.tiny_model import tiny_model
from tests.trainers.test_trl import answered

GOOD, BAD, SEEN = 301, 302, 303
PROMPT = [10, 11, 12]
RATE, STEPS, ROLLOUTS = 1e-3, 6, 8


def new_model() -> Any:
    """Make a model of random weights."""
    random.seed(0)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model())
    config.initializer_range = 0.05
    return AutoModelForCausalLM.from_config(config)


def act(rollout: agl.Rollout) -> None:
    """Answer with a good or a bad id; what the environment says is the same, and not to be learnt."""
    answer = random.choice([GOOD, BAD])
    answered(rollout, (PROMPT, [answer]), ([*PROMPT, answer, SEEN], [answer]), sampling_params="{}")
    rollout.reward(float(answer == GOOD))


def rows(store: agl.Store) -> list[agl.Trajectory]:
    """Run a step's rollouts, and return their rows."""
    found: list[agl.Trajectory] = []
    for _ in range(ROLLOUTS):
        rollout = store.start_rollout("a task", mode="train")
        act(rollout)
        rollout.finish("succeeded")
        found += rollout.trajectories()
    return found


def probabilities(model: Any) -> list[float]:
    """Return those of the good, the bad and the environment's id behind the prompt."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    return logits.softmax(0)[[GOOD, BAD, SEEN]].tolist()


def check_learnt(before: list[float], model: Any) -> None:
    """Fail unless the good id has become likelier, the bad one less so, and the environment's has not been trained."""
    after = probabilities(model)
    assert after[0] > before[0] > 0, (before, after)
    assert after[1] < before[1], (before, after)
    # It changes as any other id does: less than half of what is trained, in either direction.
    assert abs(math.log(after[2] / before[2])) < math.log(after[0] / before[0]) / 2, (before, after)
