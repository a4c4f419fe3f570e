"""`vllm serve --grpc`: a protocol of its own, in which ids go in and come out anyway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from agentlightning.store import open_store
from tests.common.reference import greedy
from tests.common.tiny_model import tiny_model
from tests.common.vllm import PLAIN, RemoteOpenAIServer, run
from tests.processes.every_endpoint import prompt_token_ids
from tools.lock import constraints_of_tests

pytestmark = pytest.mark.tier("all")

# What they need besides is in the lock.
PACKAGES = (
    "grpcio-health-checking==1.85.1",
    "grpcio-reflection==1.85.1",
    "smg-grpc-proto==0.4.28",
    "smg-grpc-servicer==0.14.1",
)
PYTHON_M = ("python", "-m", "vllm.entrypoints.grpc_server", "--model")
WHY = "vLLM's gRPC server (--grpc) has its own protocol, so its answers stay unchanged"
TOKENS = 8
# As a frontend ends the ids that it gives, and begins those of choices: here they are the client's own.
ROLLOUT, ATTEMPT = "7_rollout-20251124", "at-1a2b3c4d"

ASK = """\
import json, sys
import grpc
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

port, prompt, tokens, request_id = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
engine = vllm_engine_pb2_grpc.VllmEngineStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
request = vllm_engine_pb2.GenerateRequest(
    request_id=request_id,
    tokenized=vllm_engine_pb2.TokenizedInput(input_ids=prompt),
    sampling_params=vllm_engine_pb2.SamplingParams(temperature=float(sys.argv[5]), max_tokens=tokens),
)
print([list(answer.complete.output_ids) for answer in engine.Generate(request)])
"""


@pytest.fixture(scope="module")
def grpc_packages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the other packages that vLLM's gRPC server needs.

    Not in the tests' environment, since it brings a plugin that vLLM loads in every process.
    """
    folder = tmp_path_factory.mktemp("grpc")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install")
    subprocess.run([*pip, "--target", folder, *PACKAGES], env={**os.environ, **constraints_of_tests()}, check=True)
    return str(folder)


@pytest.mark.parametrize("pins", [None, "temperature=0"], ids=["not pinned", "pinned"])
def test_grpc_answers_are_unchanged_but_for_pins_and_recorded_for_the_rollout_in_the_request_id(
    grpc_packages: str, tmp_path: Path, pins: str | None
) -> None:
    environment = {"PYTHONPATH": grpc_packages}
    store = str(tmp_path / "generations.db")
    pinned = {} if pins is None else {"AGL_SAMPLING": pins}
    with RemoteOpenAIServer(
        "--grpc",
        env={**environment, "AGL_INSTRUMENT": "1", "AGL_STORE": store, "AGL_LOGPROBS": "on", **pinned},
        # The words of smg-grpc-servicer, whose version is above.
        is_up=lambda server: "Server is ready to accept requests" in server.log,
    ) as server:
        prompt = prompt_token_ids()
        temperature = "0" if pins is None else "1.5"
        asked = (str(server.port), json.dumps(prompt), str(TOKENS), f"{ROLLOUT}.{ATTEMPT}", temperature)
        told = run("python", "-c", ASK, *asked, env=environment)

        assert told.stdout == f"{[greedy(prompt, TOKENS)]}\n", told.stderr
        assert server.log.count(WHY) == server.log.count("agentlightning: ") == 1
        assert (f"{WHY}; temperature=0 is pinned" in server.log) == (pins is not None)
    with open_store(store) as recorded:
        # The server warms up with requests of its own, which are for none.
        [kept] = [each for each in recorded.generations() if each.rollout_id is not None]
    assert (kept.rollout_id, kept.attempt_id, kept.request_id) == (ROLLOUT, ATTEMPT, f"{ROLLOUT}.{ATTEMPT}")
    assert kept.via == "grpc"
    assert json.loads(kept.sampling_params or "{}")["temperature"] == 0
    assert kept.requested_params == (None if pins is None else '{"temperature":1.5}')
    assert kept.prompt_token_ids is not None
    assert kept.prompt_token_ids.tolist() == prompt
    [choice] = kept.choices
    assert choice.token_ids is not None
    assert choice.token_ids.tolist() == greedy(prompt, TOKENS)
    assert len(choice.logprobs or ()) == TOKENS


@pytest.mark.parametrize("command", [(*PLAIN, "--grpc"), PYTHON_M], ids=["vllm serve --grpc", "python -m"])
def test_strict_refuses_every_way_to_start_grpc(grpc_packages: str, command: Sequence[str]) -> None:
    refused = run(*command, str(tiny_model()), env={"PYTHONPATH": grpc_packages, "AGL_INSTRUMENT": "strict"})

    assert refused.returncode == 1
    assert refused.stderr.endswith(f"agentlightning: AGL_INSTRUMENT=strict refuses this server: {WHY}\n")
