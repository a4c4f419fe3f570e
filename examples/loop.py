"""The loop around the training step of reinforcement learning, to copy and change.

A queue holds the tasks. Two runners take them and run an agent of the `openai` package, which calls a real vLLM and a
tool. vLLM records each call to the store, and the triplets that a trainer would learn from are read from it.

`python -m examples.loop STORE VLLM MODEL` runs it with servers that are there: an `agl store`, and a vLLM that was
started with `AGL_INSTRUMENT=1`, `AGL_STORE` and the arguments `TOOLS`. `make demo-rollout` starts both first.
"""

from __future__ import annotations

import json
import operator
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

import agentlightning as agl

ROLLOUTS, RUNNERS, SECONDS = 20, 2, 300
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")

OPERATIONS = {"add": operator.add, "multiply": operator.mul}
OPERAND = {"type": "integer", "minimum": 0, "maximum": 25}
PARAMETERS = {
    "type": "object",
    "properties": {"operation": {"enum": [*OPERATIONS]}, "a": OPERAND, "b": OPERAND},
    "required": ["operation", "a", "b"],
    "additionalProperties": False,
}
# Without `strict`, random weights would call the tool with any JSON.
CALCULATE: Any = {"type": "function", "function": {"name": "calculate", "strict": True, "parameters": PARAMETERS}}
FORCED: Any = {"type": "function", "function": {"name": "calculate"}}


@dataclass
class Run:
    """An attempt of a rollout: who ran it, the result of its tool, its reward, and vLLM's own answers."""

    rollout: agl.Rollout
    worker_id: str
    result: int
    reward: float
    answers: list[Any]


def agent(base_url: str, model: str, question: str) -> tuple[int, list[Any]]:
    """Call the calculator, then comment on its result. Return the result, and vLLM's answers to compare ids with."""
    messages: list[Any] = [{"role": "user", "content": question}]
    options: Any = {"model": model, "messages": messages, "tools": [CALCULATE]}
    with OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=SECONDS) as client:
        # Random weights put many blanks between the arguments.
        first = client.chat.completions.create(tool_choice=FORCED, max_tokens=500, **options)
        message = first.choices[0].message
        [call] = message.tool_calls
        given = json.loads(call.function.arguments)
        result = OPERATIONS[given["operation"]](given["a"], given["b"])
        messages.append(message.model_dump(exclude_none=True))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        second = client.chat.completions.create(max_tokens=50, **options)
    return result, [first, second]


def runner(store: agl.Store, vllm: str, model: str, worker_id: str) -> list[Run]:
    """Run the agent on rollouts until the queue is empty, and reward each attempt."""
    runs: list[Run] = []
    while rollout := store.dequeue_rollout(worker_id):
        try:
            result, answers = agent(rollout.base_url(vllm), model, rollout.input["question"])
        except Exception:
            traceback.print_exc()
            rollout.finish("failed")
            continue
        reward = 1 / (1 + abs(result - rollout.input["answer"]))
        rollout.reward(reward)
        rollout.finish("succeeded")
        runs.append(Run(rollout, worker_id, result, reward, answers))
    return runs


def run(store: agl.Store, vllm: str, model: str, rollouts: int = ROLLOUTS) -> list[Run]:
    """Queue the tasks, wait until the runners have done them, and return the runs in the order of the queue.

    vLLM records a call a moment after it has answered, so the wait is also for the calls to be written.
    """
    tasks = [{"question": f"What is {n} times {n + 1}?", "answer": n * (n + 1)} for n in range(1, rollouts + 1)]
    rollout_ids = [store.enqueue_rollout(task).rollout_id for task in tasks]
    print(f"queued:   {rollouts} rollouts, for {RUNNERS} runners", flush=True)
    with ThreadPoolExecutor(RUNNERS) as pool:
        work = [pool.submit(runner, store, vllm, model, f"runner-{n}") for n in range(1, RUNNERS + 1)]
        ended = store.wait_for_rollouts(rollout_ids, timeout=SECONDS, recorded=True)
        runs = [each for future in work for each in future.result()]
    succeeded = sum(each.status == "succeeded" for each in ended)
    found = {rollout_id: store.completeness(rollout_id) for rollout_id in rollout_ids}
    complete = sum(each.complete for each in found.values())
    print(f"ended:    {succeeded} of {rollouts} succeeded, {complete} with all of their calls", flush=True)
    for rollout_id, each in found.items():
        for reason in each.reasons():
            print(f"          {rollout_id}: {reason}")
    return sorted(runs, key=lambda each: rollout_ids.index(each.rollout.rollout_id))


def main() -> None:
    url, vllm, model = sys.argv[1:]
    with agl.open_store(url) as store:
        for each in run(store, vllm, model):
            for triplet in each.rollout.triplets():
                print(triplet.prompt_token_ids, triplet.response_token_ids, triplet.reward)


if __name__ == "__main__":
    main()
