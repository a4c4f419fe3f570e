"""Run with SkyRL: its own tensors, advantages and loss train a model on a store's rows, on the trained ids alone."""

from __future__ import annotations

import tempfile
import typing
from pathlib import Path

import numpy as np
import torch
import typing_extensions

# SkyRL is for Python 3.12, where pydantic takes this one.
typing.TypedDict = typing_extensions.TypedDict

from skyrl.backends.skyrl_train.utils.ppo_utils import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    apply_loss_reduction_to_advantages_minibatch,
    compute_advantages_and_returns,
    ppo_policy_loss,
)
from skyrl.train.config import AlgorithmConfig  # noqa: E402  # pyright: ignore[reportMissingImports]
from skyrl.train.dataset.preprocess import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    convert_prompts_responses_to_batch_tensors,
)

import agentlightning as agl  # noqa: E402
from agentlightning.trainers.skyrl import generator_output  # noqa: E402
from tests.trainers.programs.learning import (  # noqa: E402
    RATE,
    STEPS,
    check_learnt,
    new_model,
    probabilities,
    rows,
)
from tests.trainers.rows import PAD  # noqa: E402

LIMIT = 0.04


def train_step(model: typing.Any, optimizer: torch.optim.Optimizer, output: typing.Any) -> dict[str, float]:
    """Train a `GeneratorOutput` as SkyRL's trainer and its policy worker do, and return the loss's metrics."""
    config = AlgorithmConfig()
    config.off_policy_correction.tis_ratio_type = "token"
    config.off_policy_correction.token_tis_ratio_clip_high = LIMIT
    ids, attended, response_mask, rewards, loss_mask, engine, *_ = convert_prompts_responses_to_batch_tensors(
        PAD,
        output["prompt_token_ids"],
        output["response_ids"],
        output["rewards"],
        output["loss_masks"],
        output["rollout_logprobs"],
    )
    tasks = np.array([each.instance_id for each in output["trajectory_ids"]])
    advantages, _ = compute_advantages_and_returns(rewards, response_mask, tasks, "grpo", config)
    advantages = apply_loss_reduction_to_advantages_minibatch(
        advantages, loss_mask, config.loss_reduction, len(ids), ids.shape[1]
    )
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attended, position_ids=positions).logits[:, :-1]
    now = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][:, -rewards.shape[1] :]
    loss, metrics = ppo_policy_loss(now, now.detach(), advantages, config, loss_mask, engine)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return metrics


def main() -> None:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    before, found = probabilities(model), []
    with tempfile.TemporaryDirectory() as folder, agl.open_store(str(Path(folder) / "store.db")) as store:
        for _ in range(STEPS):
            found.append(train_step(model, optimizer, generator_output(rows(store))))

    check_learnt(before, model)
    # By the engine, answers are some thirty times as likely as by the trainer: what is above the limit is cut to it.
    assert max(each["tis_token_clip_high_ratio"] for each in found) > 0


if __name__ == "__main__":
    main()
