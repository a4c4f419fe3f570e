"""Run with TRL: a real `GRPOTrainer` learns from a store's rows on the CPU, and from the trained ids alone.

The engine's logprobs are another model's, so that TRL has something to correct.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

import agentlightning as agl
from agentlightning.trainers.trl import correct_sampling, reward, rollout_func
from tests.common.reference import tokenizer
from tests.common.tiny_model import tiny_model
from tests.trainers.test_trl import answered

GOOD, BAD, SEEN = 301, 302, 303
PROMPT = [10, 11, 12]
LIMIT = 0.04


def agent(rollout: agl.Rollout) -> None:
    """Answer with a good or a bad id; what the environment says is the same, and not to be learnt."""
    answer = random.choice([GOOD, BAD])
    answered(rollout, (PROMPT, [answer]), ([*PROMPT, answer, SEEN], [answer]), sampling_params="{}")
    if random.random() < 0.2:
        raise RuntimeError("now and then an agent fails")
    rollout.reward(float(answer == GOOD))


def probabilities(model: Any) -> list[float]:
    """Return those of the good, the bad and the environment's id behind the prompt."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    return logits.softmax(0)[[GOOD, BAD, SEEN]].tolist()


def main() -> None:
    random.seed(0)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model())
    config.initializer_range = 0.05
    model = AutoModelForCausalLM.from_config(config)
    before = probabilities(model)
    with tempfile.TemporaryDirectory() as folder, agl.open_store(str(Path(folder) / "store.db")) as store:
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=8,
                num_generations=8,
                learning_rate=1e-3,
                max_steps=6,
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
            train_dataset=Dataset.from_dict({"prompt": ["a task"] * 8}),
            rollout_func=rollout_func(store, agent),
        )
        synced: list[int] = []
        correct_sampling(trainer, lambda: synced.append(trainer.state.global_step))
        trainer.train()
        rollouts = store.query_rollouts()

    after = probabilities(model)
    assert trainer.state.global_step == 6
    assert len(rollouts) == 6 * 8
    assert synced == [*range(6)]
    logged = [each for each in trainer.state.log_history if "loss" in each]
    lowest, highest = (
        [each[f"sampling/importance_sampling_ratio/{name}"] for each in logged] for name in ("min", "max")
    )
    # By the engine, answers are some thirty times as likely as by the trainer: a ratio above the limit is cut to it.
    assert len(logged) == 6
    assert min(lowest) < LIMIT
    assert math.isclose(max(highest), LIMIT, rel_tol=1e-5)
    assert {each.status for each in rollouts} == {"succeeded", "failed"}
    assert after[0] > before[0] > 0, (before, after)
    assert after[1] < before[1], (before, after)
    # It changes as any other id does: less than half of what is trained, in either direction.
    assert abs(math.log(after[2] / before[2])) < math.log(after[0] / before[0]) / 2, (before, after)


if __name__ == "__main__":
    main()
