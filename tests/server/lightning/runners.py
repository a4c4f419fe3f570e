"""Run runners with Agent Lightning's own client, which continue when the server is restarted.

Prints the number of finished rollouts, line by line, and at the end the outcome of all. Runs in the environment of
Agent Lightning 0.3: `runners.py URL ROLLOUTS`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from typing import Any

# By name, since type checkers would take it for this package.
lightning: Any = importlib.import_module("agentlightning")
Enqueue: Any = importlib.import_module("agentlightning.types").EnqueueRolloutRequest

RUNNERS = 4
SPANS = 3


class Runners:
    """Runners that share a client, as in a trainer."""

    def __init__(self, url: str) -> None:
        # By default the client stops retrying after 0.8 seconds, and the server's Python may take longer to start.
        self.store = lightning.LightningStoreClient(url, health_retry_delays=(0.2,) * 300)
        self.finished: set[str] = set()
        self.ended = asyncio.Event()

    async def run(self, worker_id: str) -> None:
        while not self.ended.is_set():
            # The client does not retry: to it, a lost answer is an empty queue.
            if (rollout := await self.store.dequeue_rollout(worker_id=worker_id)) is None:
                await asyncio.sleep(0.05)
                continue
            attempt_id = rollout.attempt.attempt_id
            for n in range(SPANS):
                number = await self.store.get_next_span_sequence_id(rollout.rollout_id, attempt_id)
                await self.store.add_span(
                    lightning.Span.from_attributes(
                        attributes={"n": n},
                        rollout_id=rollout.rollout_id,
                        attempt_id=attempt_id,
                        sequence_id=number,
                        name=f"span {n}",
                    )
                )
            await self.store.update_attempt(rollout.rollout_id, attempt_id, status="succeeded")
            self.finished.add(rollout.rollout_id)
            sys.stdout.write(f"{len(self.finished)}\n")
            sys.stdout.flush()


async def main(url: str, how_many: int) -> None:
    runners = Runners(url)
    # An attempt whose runner lost the answer sends no heartbeat, so it becomes unresponsive and is retried.
    config = lightning.RolloutConfig(unresponsive_seconds=15.0, max_attempts=100, retry_condition=["unresponsive"])
    new = [Enqueue(input=n, config=config) for n in range(how_many)]
    rollout_ids = [each.rollout_id for each in await runners.store.enqueue_many_rollouts(new)]
    running = [asyncio.create_task(runners.run(f"runner-{n}")) for n in range(RUNNERS)]
    while len(await runners.store.wait_for_rollouts(rollout_ids=rollout_ids, timeout=0.1)) < how_many:
        for each in running:
            if each.done():
                each.result()
        await asyncio.sleep(0.2)
    runners.ended.set()
    await asyncio.gather(*running)
    outcome = [
        {
            "status": rollout.status,
            "attempts": [each.status for each in (await runners.store.query_attempts(rollout.rollout_id)).items],
            "spans": [each.name for each in (await runners.store.query_spans(rollout.rollout_id, "latest")).items],
        }
        for rollout in (await runners.store.query_rollouts()).items
    ]
    await runners.store.close()
    sys.stdout.write(f"{json.dumps(outcome)}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
