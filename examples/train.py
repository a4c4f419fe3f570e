"""`make demo-train`: a model learns from the exact ids that vLLM recorded, by GRPO on the CPU, with TRL or verl.

The agent is of the `openai` package. It asks the model for digits, gives the answer to a tool that adds them up, and
asks again; its reward is the share of digits among the characters of both answers. vLLM records each call to an
`agl store`; the trainer learns from the rows that the store makes of them, weighted by importance sampling, and vLLM
gets the new weights before each step. TRL trains one row of each rollout, verl all.

`--rows text` makes the rows as they were made before exact ids could be had: from the text, tokenised again. With
`--rows continued`, vLLM's prompts go on from the exact ids of earlier answers, and no row breaks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import statistics
import string
import sys
import time
import warnings
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openai import OpenAI

import agentlightning as agl
from agentlightning.trainers import trl as adapter
from agentlightning.trainers.torch import check_gap, logprob_gap
from agentlightning.trainers.weights import load_weights
from agentlightning.trajectory import AttemptCalls, Call, merge
from examples.loop import SECONDS
from examples.plot import png, terminal
from examples.servers import CACHE, SMALL, SMALL_ENV, TINY_MODEL, free_url, serving, show

FOLDER = CACHE / "demo-train"
SHOWS = (
    "rollouts: each with its calls, and its reward",
    "a call in a timeline: the answer token by token, with ids and logprobs",
    "Senders: the vLLM that wrote it all",
)
FILE, MODEL, WEIGHTS, PICTURE = FOLDER / "store.db", FOLDER / "model", FOLDER / "weights", FOLDER / "reward.png"
STEPS, TASKS, GENERATIONS, TOKENS, RATE = 20, 2, 8, 12, 1e-2
BOUND = 0.01
HEAD = "step  reward  masked  rows  merged  breaks   ids  stale   off by      max     s"
COLUMNS = {
    "reward": "mean of the rollouts: 1 when both answers are digits alone",
    "masked": "rollouts of which nothing is trained, since they failed; 0 is right",
    "rows": "of all rollouts: one each, or two where a prompt breaks",
    "merged": "calls that go on in the row of the call before",
    "breaks": "prompts that are not what the model said before: text got other ids",
    "ids": "sampled ids that are trained",
    "stale": "steps since the weights that answered; 0 is right",
    "off by": "how far vLLM's logprobs are from the trainer's; 1e-6 is rounding",
    "max": "the same for the id with the highest difference",
    "s": "seconds that the step took",
}
"""The columns of the table, and what they say to somebody who sees them for the first time."""
# With these, the recorded logprobs are those of the distribution that each id was drawn from.
SAMPLING = ("--generation-config=vllm", "--logprobs-mode=processed_logprobs")
# What the rows are made of, and what vLLM is started with for it.
MODES: dict[str, dict[str, str]] = {"text": {}, "exact": {}, "continued": {"AGL_CONTINUE": "on"}}
QUESTIONS = ("Which digits shall I add?", "Give me numbers.", "Digits, please.", "What is to be added?")


@dataclass
class Conversation:
    """The conversation of an agent, and vLLM's answers."""

    messages: list[Any]
    answers: list[Any]


@dataclass
class Step:
    """The numbers that a step of the training printed.

    Attributes:
        reward: mean of the rollouts that are trained.
        masked: rollouts of which nothing is trained, since they failed, or have no row or no reward.
        rows: of all rollouts; TRL trains one of each.
        merged: calls that stand in a row behind another one.
        breaks: rows that begin because a prompt differs from the answer that it repeats.
        tokens: that are trained.
        differ: trained ids that the engine did not sample at that place.
        unknown: trained ids for which the engine has no logprob; they do not count in `mean`, `highest`, `effective`.
        mean, highest, effective: as in a `Gap`, between the logprobs of engine and trainer.
        stale: versions of the weights between the oldest that sampled a trained id, and the trainer's.
    """

    reward: float
    rollouts: int
    masked: int
    rows: int
    merged: int
    breaks: int
    tokens: int
    differ: int
    unknown: int
    stale: int
    mean: float
    highest: float
    effective: float
    seconds: float


@dataclass
class Training:
    """A training run: who answers, and what each step was."""

    store: agl.Store
    vllm: str
    mode: str
    tokenizer: Any
    bar: Any
    client: OpenAI = field(default_factory=lambda: OpenAI(api_key="none", max_retries=0, timeout=SECONDS))
    conversations: dict[str, Conversation] = field(default_factory=dict)
    rows: list[agl.Trajectory] = field(default_factory=list)
    compared: list[agl.Trajectory] = field(default_factory=list)
    differ: int = 0
    steps: list[Step] = field(default_factory=list)
    started: float = 0.0

    def agent(self, rollout: agl.Rollout) -> None:
        """Ask for digits twice, with a tool between, and reward the rollout."""
        messages: list[Any] = [{"role": "user", "content": rollout.input}]
        answers = []
        client = self.client.with_options(base_url=rollout.base_url(self.vllm))
        for _ in range(2):
            answer = client.chat.completions.create(model=str(MODEL), messages=messages, max_tokens=TOKENS)
            text = answer.choices[0].message.content or ""
            answers.append(answer)
            messages.append({"role": "assistant", "content": text})
            messages.append({"role": "tool", "tool_call_id": "1", "content": add_up(text)})
        self.conversations[rollout.rollout_id] = Conversation(messages, answers)
        rollout.reward(statistics.mean(map(share_of_digits, (message["content"] for message in messages[1::2]))))

    def read(self, rollout: agl.Rollout) -> Iterable[agl.Trajectory]:
        """Return the rows of a rollout, as the mode has it, and keep them for `measure`."""
        rows = compared = list(rollout.trajectories())
        if self.mode == "text":
            exact = rows
            rows = from_text(rollout, self.conversations[rollout.rollout_id], exact, self.tokenizer)
            compared = [with_known_logprobs(row, exact) for row in rows]
            self.differ += differing(rows, exact)
        self.rows += rows
        self.compared += compared
        return rows

    def rollouts(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Run the agents on a step's prompts, measure what came of it, and return the rows as TRL takes them."""
        self.rows, self.compared, self.differ = [], [], 0
        run = adapter.rollout_func(self.store, self.agent, read=self.read)
        found = run(prompts, trainer)
        gaps = logprob_gap(self.compared, trainer.model)
        if self.mode != "text":
            check_gap(gaps, BOUND)
        versions = [int(name) for name in gaps if name is not None]
        tokens = sum(map(sum, found["env_mask"]))
        total = sum(gap.tokens for gap in gaps.values())
        self.steps.append(
            Step(
                reward=statistics.mean(each for each in found["reward"] if each is not None),
                rollouts=len(prompts),
                masked=found["reward"].count(None),
                rows=len(self.rows),
                merged=sum(len(row.spans) - 1 for row in self.rows),
                breaks=sum("drifted" in row.flags for row in self.rows),
                tokens=tokens,
                differ=self.differ,
                unknown=sum(sum(row.response_mask) for row in self.rows) - total,
                stale=trainer.state.global_step - min(versions, default=trainer.state.global_step),
                mean=sum(gap.mean * gap.tokens for gap in gaps.values()) / total,
                highest=max(gap.highest for gap in gaps.values()),
                effective=min(gap.effective for gap in gaps.values()),
                seconds=0.0,
            )
        )
        return found

    def begin_step(self, trainer: Any) -> None:
        """Give vLLM the weights of the trainer; from here on, the step is timed."""
        self.started = time.monotonic()
        trainer.model.save_pretrained(WEIGHTS)
        load_weights(self.vllm, WEIGHTS, str(trainer.state.global_step))

    def end_step(self) -> None:
        """Print the step's line."""
        self.steps[-1].seconds = time.monotonic() - self.started
        self.bar.write(line(len(self.steps), self.steps[-1]))
        self.bar.update()


def add_up(text: str) -> str:
    """Add up the digits of a text: the agent's tool."""
    return str(sum(int(each) for each in text if each in string.digits))


def share_of_digits(text: str) -> float:
    """Return how many of a text's characters are digits, as a share; 0 for an empty one."""
    return sum(each in string.digits for each in text) / max(len(text), 1)


def from_text(
    rollout: agl.Rollout, conversation: Conversation, exact: Sequence[agl.Trajectory], tokenizer: Any
) -> list[agl.Trajectory]:
    """Make rows as if only the text were known: everything is tokenised again.

    The engine's logprobs are put to the ids at the same places of an answer; ids behind them have 0.0, since TRL takes
    no row with unknown ones.
    """
    calls = []
    for turn, logprobs in enumerate(sampled_logprobs(exact)):
        messages = conversation.messages[: 2 * turn + 1]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = conversation.answers[turn].choices[0]
        ids = tokenizer.encode(answer.message.content or "", add_special_tokens=False)
        if answer.finish_reason == "stop" or not ids:
            ids.append(tokenizer.eos_token_id)
        known = [*logprobs, *[0.0] * len(ids)][: len(ids)]
        calls.append(
            Call(
                generation_id=str(turn),
                finished_at=turn,
                finish_reason=answer.finish_reason,
                model=str(MODEL),
                prompt_token_ids=array("i", prompt),
                response_token_ids=array("i", ids),
                logprobs=array("f", known),
                weight_versions=[(version, 0, len(ids)) for version, _, _ in (exact[0].weight_versions or ())[:1]],
            )
        )
    attempt = AttemptCalls(calls=calls, rollout_id=rollout.rollout_id, reward=exact[0].reward, input=rollout.input)
    return merge(attempt).rows


def with_known_logprobs(row: agl.Trajectory, exact: Sequence[agl.Trajectory]) -> agl.Trajectory:
    """Return a row made from text without the ids for which the engine has no logprob: they have a mask of 0."""
    mask, recorded = row.response_mask[:], sampled_logprobs(exact)
    for span in row.spans:
        for position in range(span.start + len(recorded[int(span.generation_id)]), span.end):
            mask[position] = 0
    return replace(row, response_mask=mask)


def sampled_logprobs(exact: Sequence[agl.Trajectory]) -> list[array[float]]:
    """Return the engine's logprobs of each answer, in the order of the turns."""
    return [
        row.logprobs[span.start : span.end] for row in exact if row.logprobs for span in row.spans if span.is_trained
    ]


def differing(rows: Sequence[agl.Trajectory], exact: Sequence[agl.Trajectory]) -> int:
    """Count the trained ids that the engine did not sample at that place of the answer."""
    sampled, found = [
        [of_row.token_ids[span.start : span.end] for of_row in each for span in of_row.spans if span.is_trained]
        for each in (exact, rows)
    ]
    return sum(
        place >= len(one) or one[place] != token_id
        for one, other in zip(sampled, found, strict=False)
        for place, token_id in enumerate(other)
    )


def new_model(seed: int) -> Any:
    """Make a model of random weights with a head of its own, and store it where vLLM reads it.

    vLLM's CPU build goes on with the old head, and says nothing, where embeddings and head are tied.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(TINY_MODEL)
    config.tie_word_embeddings, config.initializer_range = False, 0.1
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(MODEL)
    return model


def train_with_trl(training: Training, model: Any, steps: int, seed: int) -> None:
    """Train the model with TRL's own trainer."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    class EndStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            training.end_step()

    config = GRPOConfig(
        output_dir=str(FOLDER / "trl"),
        per_device_train_batch_size=TASKS * GENERATIONS,
        num_generations=GENERATIONS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        beta=0.0,
        # The engine's logprobs do not belong to the ids that are made from the text.
        vllm_importance_sampling_correction=training.mode != "text",
        vllm_importance_sampling_mode="token_truncate",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=seed,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        processing_class=training.tokenizer,
        reward_funcs=adapter.reward,
        train_dataset=Dataset.from_dict({"prompt": list(QUESTIONS)}),
        rollout_func=training.rollouts,
        callbacks=[EndStep()],
    )
    adapter.correct_sampling(trainer, lambda: training.begin_step(trainer))
    # Prints the means of the whole training.
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def train_with_verl(training: Training, model: Any, steps: int, seed: int) -> None:
    """Train the model with verl's correction, advantages and loss, on all rows of the rollouts."""
    import torch

    from agentlightning.trainers.verl import data_proto
    from examples.verl_step import train_step

    tokenizer, state = training.tokenizer, SimpleNamespace(global_step=0)
    trainer = SimpleNamespace(
        model=model, state=state, processing_class=tokenizer, temperature=1.0, max_completion_length=None
    )
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    draw = random.Random(seed)
    for state.global_step in range(steps):
        training.begin_step(trainer)
        training.rollouts([each for each in draw.sample(QUESTIONS, TASKS) for _ in range(GENERATIONS)], trainer)
        rows = training.rows
        prompt = max(row.prompt_length for row in rows)
        response = max(len(row.token_ids) - row.prompt_length for row in rows)
        train_step(model, optimizer, data_proto(rows, tokenizer.pad_token_id, prompt, response))
        training.steps[-1].tokens = sum(sum(row.response_mask) for row in rows)
        training.end_step()


def line(number: int, step: Step) -> str:
    """Return a step as a line of the table."""
    return (
        f"{number:>4}  {step.reward:>6.3f}  {step.masked:>6}  {step.rows:>4}  {step.merged:>6}  {step.breaks:>6}  "
        f"{step.tokens:>4}  {step.stale:>5}  {step.mean:>7.1e}  {step.highest:>7.1e}  {step.seconds:>4.1f}"
    )


TRAINERS = {"trl": train_with_trl, "verl": train_with_verl}
NAMES = {"trl": "TRL", "verl": "verl"}
ROWS = {
    "text": "rows made of the text, tokenised again",
    "exact": "the exact ids that vLLM recorded",
    "continued": "exact ids, with which vLLM's prompts go on",
}


def introduction(trainer: str, rows: str) -> list[str]:
    """Return what happens in a step, and what the columns of its line say."""
    return [
        "",
        "An agent asks the model for digits, has a tool add them up, and asks again.",
        f"{NAMES[trainer]} trains it by GRPO, on {ROWS[rows]};",
        "its new weights go to vLLM before each step. The columns of a step's line:",
        *(f"  {name:<8}{meaning}" for name, meaning in COLUMNS.items()),
    ]


def conclusion(steps: Sequence[Step]) -> str:
    """Return in words what the table shows."""
    first, last = steps[0], steps[-1]
    tokens, differ = (sum(getattr(step, name) for step in steps) for name in ("tokens", "differ"))
    learnt = f"In {len(steps)} steps the reward went from {first.reward:.3f} to {last.reward:.3f}. "
    if differ:
        return f"{learnt}Of {tokens} trained ids, vLLM sampled {differ} otherwise."
    highest = max(step.highest for step in steps)
    exact = f"All {tokens} trained ids are those that\nvLLM sampled, and its logprobs are the trainer's"
    return f"{learnt}{exact} but for {highest:.1e}."


def be_quiet() -> None:
    """Leave out progress bars of files, and what trainers warn of where there is no GPU or no vLLM that they know."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", choices=MODES, default="exact", help="what the rows are made of")
    parser.add_argument("--trainer", choices=TRAINERS, default="trl", help="whose loss the model learns by")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=1, help="number of runs, each with other random weights")
    parser.add_argument("--results", type=Path, help="write what each step was, as JSON")
    options = parser.parse_args()
    be_quiet()
    from tqdm import tqdm
    from transformers import AutoTokenizer

    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(TINY_MODEL, MODEL)
    new_model(0)
    results: dict[int, list[Step]] = {}
    scripts, url, vllm = Path(sys.executable).parent, free_url(), free_url()
    command = (str(scripts / "agl"), "store", "--store", str(FILE), "--port", url.rpartition(":")[2])
    with serving(command, f"{url}/healthz", FOLDER / "store.log") as server, agl.open_store(url) as store:
        print(f"started:  agl store, at {url}, on {os.path.relpath(FILE)}")
        print("starting: AGL_INSTRUMENT=1 AGL_STORE=... vllm serve MODEL   (half a minute)", flush=True)
        env = {**SMALL_ENV, "AGL_INSTRUMENT": "1", "AGL_STORE": url, "AGL_LOGPROBS": "on", "VLLM_SERVER_DEV_MODE": "1"}
        env |= MODES[options.rows]
        command = (str(scripts / "vllm"), "serve", str(MODEL), "--port", vllm.rpartition(":")[2], *SMALL, *SAMPLING)
        with serving(command, f"{vllm}/health", FOLDER / "vllm.log", **env):
            print("\n".join(introduction(options.trainer, options.rows)))
            for seed in range(options.seeds):
                print(f"\n{options.steps} steps of {TASKS * GENERATIONS} rollouts\n{HEAD}", flush=True)
                with tqdm(total=options.steps, unit="step", disable=None) as bar:
                    training = Training(store, vllm, options.rows, AutoTokenizer.from_pretrained(MODEL), bar)
                    try:
                        TRAINERS[options.trainer](training, new_model(seed), options.steps, seed)
                    except agl.AgentLightningError as error:
                        sys.exit(f"train: {error}")
                results[seed] = training.steps
        rewards = [[step.reward for step in steps] for steps in results.values()]
        print("\n" + terminal(rewards[0], "reward by step"))
        print("\n" + conclusion(results[0]))
        png({options.rows: rewards}, PICTURE)
        print(f"the curve as a picture: {os.path.relpath(PICTURE)}")
        if options.results:
            found = {seed: [asdict(step) for step in steps] for seed, steps in results.items()}
            options.results.write_text(json.dumps(found))
        show(server.wait, url, FILE, SHOWS)


if __name__ == "__main__":
    main()
