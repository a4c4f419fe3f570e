"""`make demo-agent AGENT=claude`: a real coding agent, unmodified, works on a real vLLM, and its calls are recorded.

The agent is installed into `.cache/agents`, and run as `docs/agents.md` says. A script tells the tiny model what to
say, so that the agent uses a tool and asks a sub-agent; all else is the agent's own. At a terminal, the store's page
is served until Ctrl-C.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import agentlightning as agl
from examples.loop import SECONDS
from examples.servers import CACHE, free_url, serving, show
from tests.common.agents import ANSWER, STORIES, TASK, run
from tests.common.script import arguments, environment, write
from tests.common.vllm import RemoteOpenAIServer
from tools.agents import MISSING_NPM, TITLES, commands_of

FILE = CACHE / "demo-agent.db"
FOLDER = CACHE / "demo-agent"
WIDTH = 80
SHOWS = (
    "rollouts: the one of this run, with its calls and its reward",
    "a call in a timeline: the answer token by token, with ids and logprobs",
)


def tree(calls: Sequence[agl.Generation]) -> Iterator[str]:
    """Yield lines: the calls of the main agent, in order, with each sub-agent's where it first called."""
    names = {call.agent_id for call in calls}
    main = calls[0].agent_id

    def below(agent: str | None, indent: str) -> Iterator[str]:
        shown = {main, agent}
        for call in calls:
            parent = call.parent_agent_id if call.parent_agent_id in names else main
            if call.agent_id == agent:
                yield from described(call, indent)
            elif call.agent_id not in shown and parent == agent:
                shown.add(call.agent_id)
                yield f"{indent}sub-agent {call.agent_id}"
                yield from below(call.agent_id, f"{indent}  ")

    yield f"main agent {main or ''}".rstrip()
    yield from below(main, "  ")


def described(call: agl.Generation, indent: str) -> Iterator[str]:
    """Yield a call's id and purpose, the number of its ids, its text, and the ids of its answer."""
    [choice] = call.choices
    ids = choice.token_ids or ()
    counts = f"{len(call.prompt_token_ids or ()):,} + {len(ids)} ids"
    yield cut(f"{indent}{call.id}  {counts:<18}{call.purpose or ''}".rstrip())
    yield cut(f"{indent}  {choice.text or ''}".replace("\n", "⏎"))
    yield cut(f"{indent}  {' '.join(map(str, ids))}")


def cut(line: str) -> str:
    """Shorten a line to the width of a terminal."""
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def rows(found: Sequence[agl.Trajectory]) -> Iterator[str]:
    """Yield a line for each row: its answers, the number of its ids and of those that are trained, and its flags."""
    form = "{:>3}  {:>7}  {:>9}  {:>9}  {}"
    yield form.format("row", "answers", "ids", "trained", "flags")
    for row in found:
        counts = (f"{len(row.token_ids):,}", f"{sum(row.response_mask):,}")
        yield form.format(row.index, len(row.spans), *counts, ", ".join(row.flags)).rstrip()


def play(agent: str, store: agl.Store, vllm: str, script: Path) -> agl.Rollout:
    """Run an agent on its task, under a rollout of its own; return the rollout when all of its calls are recorded."""
    write(script, STORIES[agent])
    rollout = store.start_rollout({"task": TASK, "agent": TITLES[agent]})
    output = run(agent, rollout.base_url(vllm), FOLDER / agent)
    rollout.reward(float(ANSWER in output))
    rollout.finish("succeeded")
    store.wait_for_rollouts([rollout.rollout_id], timeout=SECONDS, recorded=True)
    return rollout


def main() -> None:
    agent = sys.argv[1] if len(sys.argv) > 1 else ""
    if agent not in TITLES:
        sys.exit(f"demo-agent: say which agent: make demo-agent AGENT={'|'.join(TITLES)}")
    if commands_of(agent) is None:
        sys.exit(f"demo-agent: {MISSING_NPM}")
    for old in FILE.parent.glob(f"{FILE.stem}.*"):
        old.unlink()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    scripts, url, script = Path(sys.executable).parent, free_url(), FILE.with_suffix(".script.json")
    command = (str(scripts / "agl"), "store", "--store", str(FILE), "--port", url.rpartition(":")[2])
    env = {"AGL_INSTRUMENT": "1", "AGL_STORE": url, "AGL_LOGPROBS": "on", **environment(script)}
    with serving(command, f"{url}/healthz", FILE.with_suffix(".store.log")) as server, agl.open_store(url) as store:
        print(f"started:  agl store, at {url}, on {os.path.relpath(FILE)}")
        print("starting: AGL_INSTRUMENT=1 AGL_STORE=... vllm serve MODEL   (half a minute)", flush=True)
        with RemoteOpenAIServer(*arguments(), env=env) as vllm:
            print(f"running:  {TITLES[agent]}, on the task: {TASK}", flush=True)
            try:
                rollout = play(agent, store, vllm.url, script)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                sys.exit(f"demo-agent: {error}")
        calls = list(rollout.generations())
        print(f"\n{TITLES[agent]}, in rollout {rollout.rollout_id}")
        print("\n".join(tree(calls)))
        print("\nthe rows that a trainer would learn from")
        print("\n".join(rows(list(rollout.trajectories()))))
        show(server.wait, url, FILE, SHOWS)


if __name__ == "__main__":
    main()
