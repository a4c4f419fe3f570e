"""`make demo-rollout`: everything around reinforcement learning but the training step, to copy and change.

An `agl store` holds the tasks. Two runners take them and run an agent of the `openai` package, which calls a real vLLM
and a tool. vLLM records each call to the store, and the triplets that a trainer would learn from are read from it. At a
terminal, the store's page is served until Ctrl-C.

`python -m examples.loop MODEL` uses another model. The default is tiny, with random weights: its sums are nearly always
wrong, but the ids are exact.
"""

from __future__ import annotations

import json
import operator
import os
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

import agentlightning as agl

CACHE = Path(__file__).parents[1] / ".cache"
TINY_MODEL, FILE = CACHE / "tiny-model", CACHE / "demo-rollout.db"
ROLLOUTS, RUNNERS, SECONDS = 20, 2, 300
SHOWS = (
    "rollouts: each has two calls, the result of the tool, and the reward",
    "a call in a timeline: the answer token by token, with ids and logprobs",
    "Senders: the vLLM that wrote it all",
)

# Small enough for two cores; with a GPU and a model of your own, leave these out.
SMALL = ("--max-model-len=1024", "--enforce-eager", "--dtype=float32", f"--kv-cache-memory-bytes={256 << 20}")
SMALL_ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
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


def is_exact(run: Run, found: Sequence[agl.Triplet]) -> bool:
    """Tell whether the triplets have the ids of vLLM's answers to the agent, in order."""
    kept = [(list(each.prompt_token_ids or ()), list(each.response_token_ids or ())) for each in found]
    return kept == [(answer.prompt_token_ids, answer.choices[0].token_ids) for answer in run.answers]


def table(runs: Sequence[Run]) -> bool:
    """Print one line for each rollout; tell whether every id in the store is the one that vLLM answered with."""
    row = "{:<21}  {:<8}  {:>4}  {:>5}  {:>10}  {:>12}  {:>6}"
    print("\n" + row.format("task", "runner", "tool", "calls", "prompt ids", "response ids", "reward"))
    exact = bool(runs)
    for each in runs:
        found = list(each.rollout.triplets())
        exact = exact and is_exact(each, found)
        prompts = " + ".join(str(len(triplet.prompt_token_ids or ())) for triplet in found)
        responses = " + ".join(str(len(triplet.response_token_ids or ())) for triplet in found)
        rewards = ", ".join(f"{triplet.reward:.3f}" for triplet in found if triplet.reward is not None)
        question = each.rollout.input["question"]
        print(row.format(question, each.worker_id, each.result, len(found), prompts, responses, rewards))
    print(f"\n{'every id is' if exact else 'NOT every id is'} the one that vLLM itself returned to the agent")
    return exact


def drift(url: str) -> None:
    """Print why the second prompt of each rollout does not begin with what the model saw and said before."""
    command = (str(Path(sys.executable).parent / "agl"), "drift", "--store", url, "--brief")
    print(f"\nagl drift --store {url} --brief", flush=True)
    subprocess.run(command, check=True)


@contextmanager
def serving(command: Sequence[str], health: str, log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server from the moment that it answers at `health` until the block ends, with its output in `log`."""
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **env}) as process,
    ):
        try:
            while process.poll() is None:
                with suppress(OSError):
                    urllib.request.urlopen(health).close()
                    break
                time.sleep(0.2)
            else:
                sys.exit(f"{' '.join(command)} ended with status {process.returncode}; its output is in {log}")
            yield process
        finally:
            process.terminate()


def free_url() -> str:
    """Return the URL of a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def show(wait: Callable[[], object], url: str, file: Path = FILE, shows: Sequence[str] = SHOWS) -> None:
    """Say where the page is and what it shows. At a terminal, wait for the server, which Ctrl-C ends."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    again = f"{os.path.relpath(Path(sys.executable).parent / 'agl')} store --store {os.path.relpath(file)}"
    print(f"\nthe page: {f'{url}/' if is_terminal else f'serve it with {again}'}")
    for line in shows:
        print(f"          {line}")
    if is_terminal:
        print("Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            wait()
        print(f"\nagain:    {again}")


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(TINY_MODEL)
    for old in FILE.parent.glob(f"{FILE.stem}.*"):
        old.unlink()
    scripts, url, vllm = Path(sys.executable).parent, free_url(), free_url()
    command = (str(scripts / "agl"), "store", "--store", str(FILE), "--port", url.rpartition(":")[2])
    with serving(command, f"{url}/healthz", FILE.with_suffix(".store.log")) as server, agl.open_store(url) as store:
        print(f"started:  agl store, at {url}, on {os.path.relpath(FILE)}")
        print("starting: AGL_INSTRUMENT=1 AGL_STORE=... vllm serve MODEL   (half a minute)", flush=True)
        env = {**SMALL_ENV, "AGL_INSTRUMENT": "1", "AGL_STORE": url, "AGL_LOGPROBS": "on"}
        command = (str(scripts / "vllm"), "serve", model, "--port", vllm.rpartition(":")[2], *SMALL, *TOOLS)
        with serving(command, f"{vllm}/health", FILE.with_suffix(".vllm.log"), **env):
            runs = run(store, vllm, model)
            exact = table(runs) and len(runs) == ROLLOUTS
        drift(url)
        show(server.wait, url)
    sys.exit(not exact)


if __name__ == "__main__":
    main()
