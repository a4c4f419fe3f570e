"""Sampling masks, alternatives and processed logprobs of a real vLLM whose engine core has masks: in rows and files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from agentlightning.generation import Choice
from agentlightning.store import open_store
from tests.common.answers import post
from tests.common.reference import logits
from tests.common.vllm import run
from tests.plugins.masks import mask_of
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer

PARAMETER_SETS = 200
ARGUMENTS = (
    "--scheduler-cls=tests.plugins.masks.Scheduler",
    "--logprobs-mode=processed_logprobs",
    "--max-logprobs=-1",
)


@pytest.fixture(scope="module")
def server(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    path = tmp_path_factory.mktemp("store") / "generations.db"
    with nursery.server(path, *ARGUMENTS, env={"AGL_LOGPROBS": "on"}) as server:
        yield server


def has_its_mask(choice: Choice) -> bool:
    assert choice.token_ids is not None
    assert choice.sampling_mask is not None
    return choice.sampling_mask.tolist() == masks_of(choice) != []


def masks_of(choice: Choice) -> list[list[int]]:
    """Return the masks that the engine gave."""
    return [mask_of(each, place) for place, each in enumerate(choice.token_ids or ())]


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"stop": "a"}], ids=["one", "three choices", "stop string"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_each_id_has_the_mask_that_the_engine_gave(
    server: RecordingServer, rollout: str, options: dict[str, Any], stream: bool
) -> None:
    body = {"model": server.model, "prompt": "Paris?", "max_tokens": 24, "top_k": 8, "seed": 5, **options}
    post(server, f"/rollout/{quote(rollout)}/v1/completions", {**body, "stream": stream})

    [generation] = server.recorded(rollout_id=rollout)
    assert len(generation.choices) == options.get("n", 1)
    assert all(map(has_its_mask, generation.choices))


def test_masks_go_into_triplets_rows_and_files(server: RecordingServer, rollout: str, tmp_path: Path) -> None:
    body = {"model": server.model, "prompt": "Paris?", "max_tokens": 6, "top_p": 0.95, "top_k": 20, "ignore_eos": True}
    post(server, f"/rollout/{quote(rollout)}/v1/completions", body)
    [generation] = server.recorded(rollout_id=rollout)
    masks = masks_of(generation.choices[0])

    with open_store(server.store, read_only=True) as store:
        [triplet] = store.triplets(rollout)
        [row] = store.trajectories(rollout)
    assert triplet.sampling_mask is not None
    assert row.sampling_mask is not None
    assert triplet.sampling_mask.tolist() == masks
    assert row.sampling_mask.tolist() == [[]] * row.prompt_length + masks
    assert (row.logprobs_mode, row.flags) == ("processed_logprobs", ["truncated"])
    for what in ("generations", "triplets", "trajectories"):
        file = tmp_path / f"{what}.jsonl"
        exported = run("agl", "export", "--store", server.store, "--what", what, "--rollout", rollout, "-o", str(file))
        assert exported.returncode == 0, exported.stderr
        read = json.loads(file.read_text())
        found = read["choices"][0]["sampling_mask"] if what == "generations" else read["sampling_mask"]
        assert [each for each in found if each] == masks


def test_processed_logprobs_without_the_engines_option_are_told_of(server: RecordingServer) -> None:
    told = [line for line in server.our_lines if "logprobs are processed_logprobs here" in line]

    assert len(told) == 1
    assert "--return-sampling-mask is off" in told[0]


def drawn(rng: random.Random) -> dict[str, Any]:
    return {
        "temperature": rng.choice([0.3, 0.7, 1, 1.5]),
        "top_p": rng.choice([1, 0.95, 0.8, 0.5]),
        # With masks, vLLM takes no request without it. The last is more than there are: nothing is cut off.
        "top_k": rng.choice([5, 50, 1000, 1000]),
        "min_p": rng.choice([0, 0, 0.05, 0.3]),
        "seed": rng.randrange(1 << 30),
        "prompt": rng.choice(["Paris?", "The quick brown fox", "one two three"]),
    }


def left_by_transformers(scores: Any, params: dict[str, Any], room: float) -> set[int]:
    """Return the ids that transformers leaves of these scores, in the order in which vLLM cuts.

    Args:
        room: added to what top-p and min-p leave: sums of floats differ at the edge.
    """
    cuts = [MinPLogitsWarper(min(max(params.get("min_p", 0.0) - room, 0.0), 1.0))]
    cuts += [TopKLogitsWarper(min(params["top_k"], scores.shape[-1]))]
    cuts += [TopPLogitsWarper(min(params.get("top_p", 1.0) + room, 1.0))]
    scores = scores[None]
    for cut in cuts:
        scores = cut(None, scores)
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())


def test_logprobs_are_those_of_the_same_distribution_in_transformers(server: RecordingServer, rollout: str) -> None:
    rng = random.Random(11)
    # All of the vocabulary as alternatives: those that were cut off are there with minus infinity.
    bodies = [
        {"model": server.model, "max_tokens": 4, "ignore_eos": True, "logprobs": -1, **drawn(rng)}
        for _ in range(PARAMETER_SETS)
    ]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda body: post(server, f"/rollout/{quote(rollout)}/v1/completions", body), bodies))

    differences = []
    for generation in server.recorded(rollout_id=rollout):
        [choice] = generation.choices
        prompt, params = generation.prompt_token_ids, json.loads(generation.sampling_params or "{}")
        assert prompt is not None
        assert choice.token_ids is not None
        assert choice.logprobs is not None
        assert choice.top_logprobs is not None
        rows = logits([*prompt, *choice.token_ids])[len(prompt) - 1 : -1].double() / params.get("temperature", 1)
        for row, token_id, logprob, others in zip(
            rows, choice.token_ids, choice.logprobs, choice.top_logprobs.tolist(), strict=True
        ):
            left = [each["id"] for each in others if each["logprob"] > -1e4]
            assert token_id in left
            assert left_by_transformers(row, params, -1e-5) <= {*left} <= left_by_transformers(row, params, 1e-5)
            expected = row[token_id] - row[left].logsumexp(0)
            differences.append(abs(float(expected) - logprob))
    assert len(differences) == 4 * PARAMETER_SETS
    assert max(differences) < 1e-3
