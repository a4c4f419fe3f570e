"""Run with verl: its own correction, advantages and loss train a model on a store's rows, on the trained ids alone."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch

import agentlightning as agl
from agentlightning.trainers.verl import data_proto
from examples.verl_step import train_step
from tests.trainers.programs.learning import RATE, STEPS, check_learnt, new_model, probabilities, rows
from tests.trainers.rows import PAD

LIMIT = 0.04


def main() -> None:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    before, found = probabilities(model), []
    with tempfile.TemporaryDirectory() as folder, agl.open_store(str(Path(folder) / "store.db")) as store:
        for _ in range(STEPS):
            found.append(train_step(model, optimizer, data_proto(rows(store), PAD, 8, 8), LIMIT))

    check_learnt(before, model)
    # By the engine, answers are some thirty times as likely as by the trainer: a weight above the limit is cut to it.
    assert max(each["rollout_corr/rollout_is_ratio_fraction_high"] for each in found) > 0
    assert math.isclose(max(each["rollout_corr/rollout_is_max"] for each in found), LIMIT, rel_tol=1e-5)
    assert min(each["rollout_corr/rollout_is_min"] for each in found) < LIMIT


if __name__ == "__main__":
    main()
