"""Run with TRL: a real `GRPOTrainer` learns from a store's rows on the CPU, and from the trained ids alone.

The engine's logprobs are another model's, so that TRL has something to correct.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from pathlib import Path

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


def main() -> None:
    model = new_model()
    before = probabilities(model)
    with tempfile.TemporaryDirectory() as folder, agl.open_store(str(Path(folder) / "store.db")) as store:
        trainer = GRPOTrainer(
            model=model,
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
                save_strategy="no",
                disable_tqdm=True,
            ),
            processing_class=tokenizer(),
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": ["a task"] * ROLLOUTS}),
            rollout_func=rollout_func(store, agent),
        )
        synced: list[int] = []
        correct_sampling(trainer, lambda: synced.append(trainer.state.global_step))
        trainer.train()
        rollouts = store.query_rollouts()

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
    check_learnt(before, model)


if __name__ == "__main__":
    main()
