"""`make demo-rollout`: all of reinforcement learning but the learning, around an agent that knows nothing of it.

`agl store` has the tasks. Two runners take them and run an agent of the `openai` package, which calls a real vLLM and a
tool. vLLM records every call to the store, and what a trainer would learn from comes out of it: token ids and rewards.
The store's page shows it all, for as long as somebody at a terminal looks at it.

The model is tiny and random, so its sums are wrong nearly always; the ids are exact all the same.
"""

from __future__ import annotations

import json
import operator
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import httpx
import openai

from tests.common.answers import gather
from tests.common.environments import CHECKOUT
from tests.common.vllm import SCRIPTS, RemoteOpenAIServer
from tests.server.process import StoreServer

FILE = CHECKOUT / ".cache" / "demo-rollout.db"
"""Where the store of the last run is."""
ROLLOUTS, RUNNERS = 20, 2
SECONDS = 300
"""A safety net: all of it takes some ten seconds."""
CALLS = 2
"""How many calls of the model a run of the agent is."""
ARGUMENTS = ("--enable-auto-tool-choice", "--tool-call-parser=hermes")

OPERATIONS = {"add": operator.add, "multiply": operator.mul}
OPERAND = {"type": "integer", "minimum": 0, "maximum": 25}
CALCULATE: Any = {
    "type": "function",
    "function": {
        "name": "calculate",
        # Any other tool may be called with whatever JSON the model makes up.
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"operation": {"enum": [*OPERATIONS]}, "a": OPERAND, "b": OPERAND},
            "required": ["operation", "a", "b"],
            "additionalProperties": False,
        },
    },
}


@dataclass
class Call:
    """A call of the model as the agent saw it: what vLLM itself says that went in and came out."""

    response_id: str
    prompt_token_ids: list[int]
    response_token_ids: list[int]


@dataclass
class Run:
    """What a runner has done: one attempt of a rollout."""

    rollout_id: str
    attempt_id: str
    worker_id: str
    task: dict[str, Any]
    result: int
    reward: float
    calls: list[Call]


@dataclass
class Outcome:
    """A run, and what is in the store of it, as JSON: the rollout with its latest attempt, and the triplets."""

    run: Run
    rollout: dict[str, Any]
    triplets: list[dict[str, Any]]

    @property
    def is_exact(self) -> bool:
        """Whether the triplets are the agent's calls, in order, with every id as vLLM itself returned it."""
        kept = [Call(*(each[name] for name in Call.__dataclass_fields__)) for each in self.triplets]
        return kept == self.run.calls


def agent(client: openai.OpenAI, model: str, question: str, stream: bool) -> tuple[int, list[Any]]:
    """Calls the calculator, and has the last word on what it said. Returns that, and vLLM's answers for the check."""
    messages: list[Any] = [{"role": "user", "content": question}]
    options: Any = {"model": model, "messages": messages, "tools": [CALCULATE]}
    # Random weights never ask for a tool by themselves, and put many blanks between its arguments.
    forced: Any = {"type": "function", "function": {"name": "calculate"}}
    asked = client.chat.completions.create(tool_choice=forced, max_tokens=500, **options)
    message = asked.choices[0].message
    [call] = message.tool_calls
    given = json.loads(call.function.arguments)
    result = OPERATIONS[given["operation"]](given["a"], given["b"])
    messages.append(message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    said = client.chat.completions.create(stream=stream, max_tokens=50, **options)
    return result, [asked, [*said] if stream else said]


def runner(store: StoreServer, vllm: RemoteOpenAIServer, worker_id: str) -> list[Run]:
    """Takes rollouts until there are none."""
    runs: list[Run] = []
    with store.client() as client:
        while taken := send(client, "/queues/rollouts/dequeue", limit=1, worker_id=worker_id):
            try:
                runs.append(attempt(client, vllm, worker_id, taken[0]))
            except Exception:
                # An agent that fails is no reason to leave the others in the queue.
                traceback.print_exc()
    return runs


def attempt(client: httpx.Client, vllm: RemoteOpenAIServer, worker_id: str, rollout: dict[str, Any]) -> Run:
    """Run the agent, and tell the store how well it did."""
    rollout_id, attempt_id, task = rollout["rollout_id"], rollout["attempt"]["attempt_id"], rollout["input"]
    route = f"/rollouts/{rollout_id}/attempts/{attempt_id}"
    # That is all that vLLM has to know, and the agent does not know of it.
    base_url = f"{vllm.url}/rollout/{rollout_id}/attempt/{attempt_id}/v1"
    status = "failed"
    try:
        with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=SECONDS) as model:
            result, answers = agent(model, vllm.model, task["question"], task["stream"])
        # The nearer, the better.
        reward = 1 / (1 + abs(result - task["answer"]))
        send(client, f"{route}/reward", value=reward)
        status = "succeeded"
    finally:
        send(client, route, status=status)
    return Run(rollout_id, attempt_id, worker_id, task, result, reward, [seen(answer) for answer in answers])


def seen(answer: Any) -> Call:
    """What an answer says in vLLM's own fields: one answer, or the chunks of a stream."""
    if isinstance(answer, list):
        streamed = gather(answer)
        return Call(answer[0].id, streamed.prompt_token_ids[0], streamed.token_ids[0])
    return Call(answer.id, answer.prompt_token_ids, answer.choices[0].token_ids)


def run(
    store: StoreServer, vllm: RemoteOpenAIServer, rollouts: int = ROLLOUTS, runners: int = RUNNERS
) -> list[Outcome]:
    """Put rollouts into the queue, have them run, and read what became of each run; in the order of the queue."""
    tasks = [
        {"question": f"What is {n} times {n + 1}?", "answer": n * (n + 1), "stream": n % 2 == 0}
        for n in range(1, rollouts + 1)
    ]
    with store.client() as client, ThreadPoolExecutor(runners) as pool:
        queued = send(client, "/queues/rollouts/enqueue", rollouts=[{"input": task} for task in tasks])
        rollout_ids = [each["rollout_id"] for each in queued]
        print(f"queued:   {rollouts} rollouts, for {runners} runners", flush=True)
        at_work = [pool.submit(runner, store, vllm, f"runner-{n}") for n in range(1, runners + 1)]
        body = {"rollout_ids": rollout_ids, "timeout": SECONDS}
        ended = client.post("/v1/agl/waits/rollouts", json=body, timeout=2 * SECONDS).raise_for_status().json()
        succeeded = sum(each["status"] == "succeeded" for each in ended)
        print(f"ended:    {succeeded} of {rollouts} succeeded", flush=True)
        runs = sorted((each for one in at_work for each in one.result()), key=lambda each: each.task["answer"])
        return [
            Outcome(each, read(client, f"/rollouts/{each.rollout_id}"), triplets(client, each.rollout_id))
            for each in runs
        ]


def triplets(client: httpx.Client, rollout_id: str) -> list[dict[str, Any]]:
    """Those of a rollout, once all are there.

    vLLM lets nobody wait for the store: a call gets there a fraction of a second after its answer went out. So who
    learns from it asks again until there is as much as there were calls.
    """
    deadline = time.monotonic() + SECONDS
    while True:
        found = read(client, f"/rollouts/{rollout_id}/triplets")["items"]
        if len(found) >= CALLS or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def send(client: httpx.Client, route: str, **body: Any) -> Any:
    return client.post(f"/v1/agl{route}", json=body).raise_for_status().json()


def read(client: httpx.Client, route: str) -> Any:
    return client.get(f"/v1/agl{route}").raise_for_status().json()


@contextmanager
def vllm_for(store: StoreServer) -> Iterator[RemoteOpenAIServer]:
    """A vLLM that records to a store, with the logprobs that the page colours tokens by."""
    env = {"AGL_INSTRUMENT": "1", "AGL_STORE": store.url, "AGL_LOGPROBS": "on"}
    variables = " ".join(f"{name}={value}" for name, value in env.items())
    print(f"starting: {variables} vllm serve TINY_MODEL   (half a minute)", flush=True)
    with RemoteOpenAIServer(*ARGUMENTS, env=env) as vllm:
        yield vllm


def table(outcomes: Sequence[Outcome]) -> None:
    """A rollout a line: who ran it, what the tool said, how many ids each call has in the store, and the reward."""
    row = "{:<39}  {:<8}  {:<21}  {:>4}  {:>5}  {:>10}  {:>12}  {:>6}"
    print()
    print(row.format("rollout", "runner", "task", "tool", "calls", "prompt ids", "response ids", "reward"))
    for each in outcomes:
        run, kept = each.run, each.triplets
        prompts, responses = (
            " + ".join(str(len(triplet[name] or ())) for triplet in kept)
            for name in ("prompt_token_ids", "response_token_ids")
        )
        rewards = ", ".join(f"{triplet['reward']:.3f}" for triplet in kept if triplet["reward"] is not None)
        question = run.task["question"]
        print(row.format(run.rollout_id, run.worker_id, question, run.result, len(kept), prompts, responses, rewards))


def show(store: StoreServer) -> None:
    """Say where the page is, and what is on it; serve it for as long as somebody is at the terminal."""
    is_watched = sys.stdin.isatty() and sys.stdout.isatty()
    again = f"{os.path.relpath(SCRIPTS)}/agl store --store {os.path.relpath(store.path)}"
    print(f"\nlook at:  {f'{store.url}/' if is_watched else f'what this serves: {again}'}")
    print("          a rollout: its two calls, what the tool said to the second one, and the reward")
    print("          a call in its timeline: the answer token by token, each with its id and its logprob")
    print("          Senders: the vLLM that has written it all")
    if is_watched:
        print("Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            store.process.wait()
        print(f"\nagain:    {again}")
    store.stop()


def main() -> None:
    for old in FILE.parent.glob(f"{FILE.stem}.*"):
        old.unlink()
    with StoreServer(FILE) as store:
        print(f"started:  agl store, at {store.url}, on {store.path}")
        with vllm_for(store) as vllm:
            outcomes = run(store, vllm)
            table(outcomes)
        exact = len(outcomes) == ROLLOUTS and all(each.is_exact for each in outcomes)
        print(f"\n{'every id is' if exact else 'NOT every id is'} the one that vLLM itself returned to the agent")
        show(store)
    sys.exit(not exact)


if __name__ == "__main__":
    main()
