"""A step of training with what verl's own trainer calls on a batch: correction, advantages and loss, here on the CPU.

verl's engines, which hold the model and the optimizer, are for GPUs: a model of transformers stands in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.config.algorithm import RolloutCorrectionConfig  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.core_algos import AdvantageEstimator  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.ray_trainer import compute_advantage  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.rollout_corr_helper import (  # pyright: ignore[reportMissingImports]
    compute_rollout_correction_and_add_to_batch,
)
from verl.utils import tensordict_utils  # pyright: ignore[reportMissingImports]
from verl.workers.config import ActorConfig  # pyright: ignore[reportMissingImports]
from verl.workers.utils.losses import ppo_loss  # pyright: ignore[reportMissingImports]
from verl.workers.utils.padding import left_right_2_no_padding  # pyright: ignore[reportMissingImports]

__all__ = ["train_step"]


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: Any, threshold: float = 2.0) -> dict[str, float]:
    """Train a `DataProto`, as `agentlightning.trainers.verl.data_proto` makes it, and return verl's metrics.

    Args:
        threshold: importance weights of ids are truncated to it.
    """
    batch.batch["token_level_rewards"] = batch.batch["token_level_scores"]
    batch.non_tensor_batch["uid"] = batch.non_tensor_batch["data_id_list"]
    with torch.no_grad():
        batch.batch["old_log_probs"] = response_logprobs(logprobs(model, batch), batch)
    correction = RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold=threshold)
    batch, metrics = compute_rollout_correction_and_add_to_batch(batch, correction)
    batch = compute_advantage(batch, AdvantageEstimator.GRPO)

    attended = batch.batch["attention_mask"].bool()
    data = left_right_2_no_padding(batch.to_tensordict())
    tokens = int(batch.batch["response_mask"].sum())
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(batch))
    actor = ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=len(batch), rollout_n=1)
    loss, of_actor = ppo_loss(actor, {"log_probs": logprobs(model, batch)[attended]}, data)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return metrics | {name: each.aggregate() for name, each in of_actor.items()}


def logprobs(model: Any, batch: Any) -> torch.Tensor:
    """Return at each position the logprob of the next id; 0.0 at the last one."""
    tensors = batch.batch
    ids, mask, positions = tensors["input_ids"], tensors["attention_mask"], tensors["position_ids"]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1]
    found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(found, (0, 1))


def response_logprobs(found: torch.Tensor, batch: Any) -> torch.Tensor:
    """Return the logprobs of the responses' ids."""
    return found[:, batch.batch["prompts"].shape[1] - 1 : -1]
