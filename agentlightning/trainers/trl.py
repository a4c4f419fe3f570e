"""Trajectories for TRL: what `GRPOTrainer(rollout_func=…)` takes, and such a function over a store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from agentlightning.errors import StoreError, UnusableRows
from agentlightning.rollout_records import FINISHED, NewRollout, Rollout
from agentlightning.store import Store
from agentlightning.trainers._rows import check_models, check_rows, logprobs_of, name_of
from agentlightning.trajectory import SAMPLING, Answer, Flag, MergeOptions, Trajectory

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["columns", "correct_sampling", "reward", "rollout_func"]

logger = logging.getLogger(__name__)

INCOMPLETE: Set[Flag] = {"aborted", "truncated", "cut", "missing_call"}
"""Flags of rows that the option `complete` leaves out; the others, as `drifted`, damage no answer."""


def columns(trajectories: Sequence[Trajectory], max_response_length: int | None = None) -> dict[str, list[Any]]:
    """Return rows as the dictionary that a `rollout_func` returns, one row for each, in order.

    Besides what TRL itself reads it has `reward`, for the function `reward`, and `rollout_id` and `flags`, which any
    reward function may take.

    Args:
        max_response_length: `GRPOConfig(max_completion_length=…)`, which TRL itself does not apply to these rows.

    Raises:
        UnusableRows: a row has no logprobs, or infinite ones; or see `check_rows`.
    """
    check_rows(trajectories, max_response_length=max_response_length)
    return {
        "prompt_ids": [row.token_ids[: row.prompt_length].tolist() for row in trajectories],
        "completion_ids": [row.token_ids[row.prompt_length :].tolist() for row in trajectories],
        "logprobs": [logprobs_of(row)[row.prompt_length :].tolist() for row in trajectories],
        "env_mask": [row.response_mask[row.prompt_length :].tolist() for row in trajectories],
        "reward": [row.reward for row in trajectories],
        "rollout_id": [row.rollout_id for row in trajectories],
        "flags": [row.flags for row in trajectories],
    }


def reward(completions: Sequence[Any], reward: Sequence[float | None], **_: Any) -> list[float | None]:
    """Return the rewards that the store has: the reward function for `GRPOTrainer(reward_funcs=…)`.

    TRL leaves a completion whose reward is None out of its group's mean, and gives it no advantage.
    """
    return list(reward)


class _Engine:
    """The part of TRL's `VLLMGeneration` that a trainer with a `rollout_func` uses."""

    def __init__(self, sync_weights: Callable[[], None]) -> None:
        self.sync_weights = sync_weights


def correct_sampling(trainer: Any, sync_weights: Callable[[], None]) -> None:
    """Let a `GRPOTrainer` correct for the difference between the engine's logprobs and its own.

    TRL weights each id by importance sampling, as `vllm_importance_sampling_mode` says, but only where it knows of a
    vLLM: with `use_vllm=True` it starts one, or reaches it by NCCL. This function tells it of one that it reaches by
    `sync_weights` alone. Call it before `trainer.train()`.

    Args:
        sync_weights: gives vLLM the weights of the trainer. TRL calls it before the rollouts of each step, and so also
            when a training goes on from a checkpoint.
    """
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, _Engine(sync_weights), -1


def rollout_func(
    store: Store,
    run_agent: Callable[[Rollout], None] | None = None,
    *,
    workers: int = 8,
    timeout: float | None = None,
    failed: Literal["mask", "raise"] = "mask",
    read: Callable[[Rollout], Iterable[Trajectory]] | None = None,
    **options: Unpack[MergeOptions],
) -> Callable[[list[Any], Any], dict[str, list[Any]]]:
    """Return a function for `GRPOTrainer(rollout_func=…)`: it makes a rollout of each prompt, and returns their rows.

    It returns when all rollouts have ended and vLLM has written every call, so groups are complete. TRL takes one row a
    prompt: of a rollout with several it gets the one with the most trained ids, of the complete ones if there are any.
    A warning says how many others there were, and another one if the logprobs are not of the distribution that the
    trainer computes with, so that importance sampling would be biased.

    Args:
        run_agent: called with each rollout, in threads: it calls the agent, and rewards the rollout. If it raises, the
            rollout has failed; an error of the store, or an exit, ends the step besides. None: runners elsewhere take
            the rollouts from the store's queue.
        workers: number of threads.
        timeout: seconds from the start of a step until all of its rollouts have ended and their calls are written; None
            for no limit. What has not ended by then is cancelled; an agent that has not returned goes on in its thread,
            and nothing of it is trained.
        failed: what becomes of a rollout that failed, has no row or no reward, or whose row has a response longer than
            `GRPOConfig(max_completion_length=…)`. `mask`: its row is masked whole, and its reward is None. `raise`: an
            error ends the training.
        read: returns the rows of a rollout that succeeded; None for those of its latest attempt.
        options: those of `store.trajectories()`, without `read`; such as `model`, where agents call several models.

    Raises, when it is called:
        UnusableRows: every rollout of the step is masked, rows are of several models, or `failed` is `raise` and a
            rollout would be masked; or see `check_rows`.
        StoreUnavailable: the store went away. Nothing of the step was trained; start again from the last checkpoint.
    """

    def rollouts_of(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        deadline = None if timeout is None else time.monotonic() + timeout
        metadata = {"trainer": "trl", "step": trainer.state.global_step}
        if run_agent is None:
            new = [NewRollout(prompt, mode="train", metadata=metadata) for prompt in prompts]
            rollouts = store.enqueue_rollouts(new)
        else:
            rollouts = [store.start_rollout(prompt, mode="train", metadata=metadata) for prompt in prompts]
        rollout_ids = [rollout.rollout_id for rollout in rollouts]
        try:
            if run_agent is not None:
                _run_all(run_agent, rollouts, workers, _left(deadline))
            waited = store.wait_for_rollouts(rollout_ids, _left(deadline), recorded=True)
        finally:
            _cancel(store, rollout_ids)
        ended = {rollout.rollout_id: rollout for rollout in waited}
        rows = {
            rollout_id: [*(store.trajectories(rollout_id, "latest", **options) if read is None else read(rollout))]
            for rollout_id, rollout in ended.items()
            if rollout.status == "succeeded"
        }
        # Of all rows: a judge's row, which might be the longest of its rollout, must not be trained as the policy's.
        check_models(row for of_rollout in rows.values() for row in of_rollout)
        longest = trainer.max_completion_length
        chosen = [_chosen(ended.get(each), rows.get(each, ()), longest) for each in rollout_ids]
        trained = [row for row in chosen if not isinstance(row, str)]
        _refuse_or_warn(
            {each: row for each, row in zip(rollout_ids, chosen, strict=True) if isinstance(row, str)}, failed
        )
        found = columns(trained)
        _warn_of_others(rows.values())
        _warn_of_sampling(trained, trainer.temperature)
        # A processor, of a model that sees images, has a tokenizer.
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        masked = _masked(tokenizer.pad_token_id)
        for place, row in enumerate(chosen):
            if isinstance(row, str):
                for name, value in (masked | {"rollout_id": rollout_ids[place]}).items():
                    found[name].insert(place, value)
        return found

    return rollouts_of


def _cancel(store: Store, rollout_ids: Sequence[str]) -> None:
    """Cancel what has not ended, so that no runner takes it from the queue after its step."""
    for rollout in store.query_rollouts(rollout_id_in=rollout_ids):
        if rollout.status not in FINISHED:
            store.update_rollout(rollout.rollout_id, status="cancelled")


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


def _run_all(
    run_agent: Callable[[Rollout], None], rollouts: Sequence[Rollout], workers: int, timeout: float | None
) -> None:
    pool = ThreadPoolExecutor(workers)
    try:
        done, _ = wait([pool.submit(_run, run_agent, rollout) for rollout in rollouts], timeout, FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        # Without waiting: an agent that hangs must not hold up the trainer.
        pool.shutdown(wait=False, cancel_futures=True)


def _run(run_agent: Callable[[Rollout], None], rollout: Rollout) -> None:
    try:
        run_agent(rollout)
    except BaseException as error:
        if isinstance(error, StoreError) or not isinstance(error, Exception):
            with suppress(StoreError):
                rollout.finish("failed")
            raise
        logger.exception("The agent of rollout %r failed.", rollout.rollout_id)
        rollout.finish("failed")
    else:
        rollout.finish("succeeded")


def _chosen(ended: Rollout | None, rows: Sequence[Trajectory], longest: int | None) -> Trajectory | str:
    """Return the row that is trained for a rollout, or why it has none."""
    if ended is None:
        return "has not ended, or its calls are not written: raise timeout, or look at store.completeness()"
    if ended.status != "succeeded":
        return f"has the status {ended.status}"
    if not rows:
        return "has no row: its calls name another rollout, or an option left the row out"
    if rows[0].reward is None:
        return "has no reward: let run_agent call rollout.reward(1.0)"
    row = max(rows, key=lambda row: (INCOMPLETE.isdisjoint(row.flags), sum(row.response_mask)))
    length = len(row.token_ids) - row.prompt_length
    if longest is not None and length > longest:
        return (
            f"has a response of {length} ids, more than the {longest} that the trainer takes: raise "
            f"GRPOConfig(max_completion_length=…), or pass max_response_length={longest} to cut such rows and flag them"
        )
    return row


def _refuse_or_warn(reasons: Mapping[str, str], failed: str) -> None:
    """Say why rollouts have no row to train, by their ids."""
    for rollout_id, reason in reasons.items():
        if failed == "raise":
            raise UnusableRows(f"rollout {rollout_id!r} {reason}")
        logger.warning("Rollout %r %s. It is masked: nothing of it is trained.", rollout_id, reason)


def _masked(pad_id: int) -> dict[str, Any]:
    return {
        "prompt_ids": [pad_id],
        "completion_ids": [pad_id],
        "logprobs": [0.0],
        "env_mask": [0],
        "reward": None,
        "flags": [],
    }


def _warn_of_others(rows: Iterable[Sequence[Trajectory]]) -> None:
    several = [len(of_rollout) for of_rollout in rows if len(of_rollout) > 1]
    if several:
        logger.warning(
            "%d rows are not trained: TRL takes one row a prompt, and %d rollouts have several. Their flags say why; "
            "docs/trajectories.md says what to do.",
            sum(several) - len(several),
            len(several),
        )


def _warn_of_sampling(rows: Iterable[Trajectory], temperature: float) -> None:
    for row in rows:
        for answer in row.spans:
            if answer.is_trained and answer.sampling is not None and not _is_comparable(answer, temperature):
                asked = ", ".join(
                    f"{name} {value}" for name, value in answer.sampling.items() if SAMPLING[name] != value
                )
                logger.warning(
                    "Importance sampling is biased: %s was sampled with %s and has %s, but TRL computes at temperature "
                    "%g. Sample at the trainer's temperature and from the whole vocabulary, as AGL_SAMPLING pins it, "
                    "and start vLLM with --logprobs-mode processed_logprobs.",
                    name_of(row),
                    asked or "vLLM's defaults",
                    answer.logprobs_mode or "raw_logprobs",
                    temperature,
                )
                return


def _is_comparable(answer: Answer, temperature: float) -> bool:
    """Tell whether the logprobs of an answer are of the distribution that TRL computes, of the whole vocabulary."""
    is_processed = (answer.logprobs_mode or "").startswith("processed")
    return answer.sampling == {**SAMPLING, "temperature": temperature} and (is_processed or temperature == 1)
