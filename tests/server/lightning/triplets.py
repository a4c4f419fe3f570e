"""Print what Agent Lightning's own adapters make of a rollout's spans, and of a reward that its tracer emitted.

Runs in the environment of Agent Lightning 0.3: `triplets.py URL ROLLOUT`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from typing import Any

# By name, since type checkers would take it for this package.
lightning: Any = importlib.import_module("agentlightning")
rewards: Any = importlib.import_module("agentlightning.emitter.reward")


async def main(url: str, rollout_id: str) -> None:
    store = lightning.LightningStoreClient(url)
    spans = [*(await store.query_spans(rollout_id)).items]
    await store.close()
    triplets = lightning.TracerTraceToTriplet().adapt(spans)
    emitted = lightning.emit_reward(0.5, propagate=False)
    found = {
        "triplets": [
            {
                "prompt_token_ids": each.prompt["token_ids"],
                "response_token_ids": each.response["token_ids"],
                "logprobs": [one["logprob"] for one in each.response.get("logprobs", ())],
                "reward": each.reward,
                "response_id": each.metadata["response_id"],
            }
            for each in triplets
        ],
        "final_reward": rewards.find_final_reward(spans),
        "emitted": {"name": emitted.name, "attributes": emitted.attributes, "status": emitted.status.model_dump()},
    }
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
