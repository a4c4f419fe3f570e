"""Run Agent Lightning's own trainer, runners and tracer with an agent that needs no model; print its rollouts as JSON.

Runs in the environment of Agent Lightning 0.3: `training.py URL`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from typing import Any

# By name, since type checkers would take it for this package.
lightning: Any = importlib.import_module("agentlightning")


def agent_of(store: Any) -> Any:
    """Return an agent that emits a message and a reward of half its task; 13 fails, and 3 waits for a heartbeat."""

    async def agent(task: int, prompt_template: Any) -> float:
        lightning.emit_message(prompt_template.format(task=task))
        if task == 13:
            raise ValueError("13")
        while task == 3 and not any(each.heartbeat_stats for each in (await store.query_workers()).items):
            await asyncio.sleep(0.1)
        return task / 2

    return lightning.rollout(agent)


async def outcome(store: Any) -> dict[str, Any]:
    """Collect the outcome of each rollout, by its task, and of the workers."""
    found: dict[str, Any] = {"rollouts": {}}
    for rollout in (await store.query_rollouts()).items:
        spans = await store.query_spans(rollout.rollout_id, "latest")
        found["rollouts"][rollout.input] = {
            "status": rollout.status,
            "mode": rollout.mode,
            "reward": lightning.find_final_reward(spans.items),
            "messages": [message for each in spans.items if (message := lightning.get_message_value(each)) is not None],
            "numbered": [each.sequence_id for each in spans.items],
            "is_of_latest": {each.attempt_id for each in spans.items} == {rollout.attempt.attempt_id},
        }
    workers = (await store.query_workers()).items
    found["workers"] = sorted((each.status, sorted(each.heartbeat_stats or {})) for each in workers)
    return found


def main(url: str) -> None:
    store = lightning.LightningStoreClient(url)
    trainer = lightning.Trainer(
        n_runners=1,
        store=store,
        tracer=lightning.OtelTracer(),
        runner={"type": "agentlightning.LitAgentRunner", "poll_interval": 0.1, "heartbeat_interval": 0.5},
        # A managed store has a lock that would block an event loop with two requests at the same time.
        strategy={"type": "shm", "main_thread": "algorithm", "managed_store": False},
        algorithm=lightning.Baseline(polling_interval=0.1),
        initial_resources={"prompt": lightning.PromptTemplate(template="task {task} ü", engine="f-string")},
    )
    trainer.dev(agent_of(store), train_dataset=[1, 13, 2], val_dataset=[3])
    sys.stdout.write(json.dumps(asyncio.run(outcome(lightning.LightningStoreClient(url)))))


if __name__ == "__main__":
    main(sys.argv[1])
