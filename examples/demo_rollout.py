"""`make demo-rollout`: everything around reinforcement learning but the training step, with `examples/loop.py`.

It starts an `agl store` and a real vLLM, runs the loop, and compares what the store has with vLLM's own answers. At a
terminal, the store's page is served until Ctrl-C.

`python -m examples.demo_rollout MODEL` uses another model. The default is tiny, with random weights: its sums are
nearly always wrong, but the ids are exact.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import agentlightning as agl
from examples.loop import ROLLOUTS, TOOLS, Run, run
from examples.servers import CACHE, SMALL, SMALL_ENV, TINY_MODEL, free_url, serving, show

FILE = CACHE / "demo-rollout.db"
SHOWS = (
    "rollouts: each has two calls, the result of the tool, and the reward",
    "a call in a timeline: the answer token by token, with ids and logprobs",
    "Senders: the vLLM that wrote it all",
)


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
        show(server.wait, url, FILE, SHOWS)
    sys.exit(not exact)


if __name__ == "__main__":
    main()
