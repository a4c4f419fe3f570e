"""Run with TRL: a real `GRPOTrainer` learns from a store's rows on the CPU, and from the trained ids alone.

The engine's logprobs are another model's, so that TRL has something to correct.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

import agentlightning as agl
from agentlightning.trainers.trl import correct_sampling, reward, rollout_func
from tests.common.reference import tokenizer
from tests.trainers.programs.learning import RATE, ROLLOUTS, STEPS, act, check_learnt, new_model, probabilities

LIMIT = 0.04


def agent(rollout: agl.Rollout) -> None:
    act(rollout)
    if random.random() < 0.2:
        raise RuntimeError("now and then an agent fails")


def new_trainer(folder: str, store: agl.Store, run: Callable[[agl.Rollout], None]) -> Any:
    """Make a trainer that saves a checkpoint every second step."""
    return GRPOTrainer(
        model=new_model(),
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=ROLLOUTS,
            num_generations=ROLLOUTS,
            learning_rate=RATE,
            max_steps=STEPS,
            beta=0.0,
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=LIMIT,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="steps",
            save_steps=2,
            disable_tqdm=True,
        ),
        processing_class=tokenizer(),
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": ["a task"] * ROLLOUTS}),
        rollout_func=rollout_func(store, run),
    )


def train(trainer: Any, from_checkpoint: bool = False) -> list[int]:
    """Train, and return the steps for which vLLM was to get weights."""
    synced: list[int] = []
    correct_sampling(trainer, lambda: synced.append(trainer.state.global_step))
    trainer.train(resume_from_checkpoint=from_checkpoint)
    return synced


def step_of(rollout: agl.Rollout) -> int:
    assert rollout.metadata is not None
    return rollout.metadata["step"]


def check_crash(folder: str, store: agl.Store) -> None:
    """Fail unless a training that ended in its fourth step goes on from its second with new rollouts."""

    def crash(rollout: agl.Rollout) -> None:
        if step_of(rollout) == 3:
            raise SystemExit("a crash")
        act(rollout)

    with pytest.raises(SystemExit, match="a crash"):
        train(new_trainer(folder, store, crash))
    before = {each.rollout_id for each in store.query_rollouts()}

    trainer = new_trainer(folder, store, act)
    assert train(trainer, from_checkpoint=True) == [2, 3, 4, 5]
    assert trainer.state.global_step == STEPS
    new = [each for each in store.query_rollouts() if each.rollout_id not in before]
    assert Counter(map(step_of, new)) == dict.fromkeys((2, 3, 4, 5), ROLLOUTS)


def main() -> None:
    before = probabilities(new_model())
    with tempfile.TemporaryDirectory() as folder, agl.open_store(f"{folder}/store.db") as store:
        trainer = new_trainer(f"{folder}/run", store, agent)
        synced = train(trainer)
        rollouts = store.query_rollouts()
        check_crash(f"{folder}/crashed", store)

    assert trainer.state.global_step == STEPS
    assert len(rollouts) == STEPS * ROLLOUTS
    assert synced == [*range(STEPS)]
    logged = [each for each in trainer.state.log_history if "loss" in each]
    lowest, highest = (
        [each[f"sampling/importance_sampling_ratio/{name}"] for each in logged] for name in ("min", "max")
    )
    # By the engine, answers are some thirty times as likely as by the trainer: a ratio above the limit is cut to it.
    assert len(logged) == STEPS
    assert min(lowest) < LIMIT
    assert math.isclose(max(highest), LIMIT, rel_tol=1e-5)
    assert {each.status for each in rollouts} == {"succeeded", "failed"}
    check_learnt(before, trainer.model)


if __name__ == "__main__":
    main()
