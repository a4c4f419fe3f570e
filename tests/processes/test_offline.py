"""`vllm.LLM`, which answers without a server: as ever, and recorded where `AGL_RECORD_OFFLINE=on`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentlightning.generation import Generation
from agentlightning.store import open_store
from tests.common.reference import greedy, tokenizer
from tests.common.tiny_model import tiny_model
from tests.common.vllm import run, started_by
from tests.processes.every_endpoint import MESSAGES, prompt_token_ids
from tests.recording.nursery import Nursery

PROGRAM = """\
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    small = {"max_model_len": 1024, "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 256 << 20}
    model = LLM(sys.argv[1], **small)
    prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
    [answer] = model.generate(prompt, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    with open(sys.argv[3], "w") as file:
        json.dump([answer.prompt_token_ids, answer.outputs[0].token_ids], file)
"""
NOT_RECORDED = "this offline LLM is not recorded, since AGL_RECORD_OFFLINE is off"


@pytest.mark.tier("all")
def test_an_offline_model_answers_unchanged_and_says_that_nothing_is_recorded(tmp_path: Path) -> None:
    program, told = tmp_path / "program.py", tmp_path / "told.json"
    program.write_text(PROGRAM)
    prompt = prompt_token_ids()

    # By fork, as vLLM does by itself where it has a GPU.
    environment = {**started_by("fork"), "AGL_INSTRUMENT": "1", "AGL_STORE": str(tmp_path / "generations.db")}
    ran = run("python", str(program), str(tiny_model()), json.dumps(prompt), str(told), env=environment)

    assert ran.returncode == 0, ran.stderr
    assert json.loads(told.read_text()) == [prompt, greedy(prompt, 8)]
    [line] = [line for line in (ran.stdout + ran.stderr).splitlines() if "agentlightning" in line]
    assert NOT_RECORDED in line
    assert {path.name for path in tmp_path.iterdir()} == {program.name, told.name}


EVERY_WAY = """\
import json, sys
import agentlightning as agl
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

def shown(output):
    choices = [
        {
            "token_ids": list(each.token_ids),
            "text": each.text,
            "finish_reason": each.finish_reason,
            "stop_reason": each.stop_reason,
            "logprobs": each.logprobs and [at[i].logprob for i, at in zip(each.token_ids, each.logprobs)],
        }
        for each in output.outputs
    ]
    return {"request_id": output.request_id, "prompt_token_ids": output.prompt_token_ids, "choices": choices}

def error_of(function, *args):
    try:
        return function(*args, use_tqdm=False)
    except ValueError as error:
        return str(error)

if __name__ == "__main__":
    small = {"max_model_len": 1024, "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 256 << 20}
    model = LLM(sys.argv[1], seed=0, **small)
    quiet = {"use_tqdm": False}
    told = {}

    with agl.rollout("ro-1", attempt_id="at-1", agent_id="planner"):
        one = model.generate(["one two", "three"], SamplingParams(max_tokens=8, logprobs=0), **quiet)
    told["generate"] = [shown(each) for each in one]

    with agl.rollouts(["ro-2", agl.rollout("ro-3", attempt_id="at-3"), "ro-2"]):
        several = model.generate(["one", "two", "three"], SamplingParams(max_tokens=4, n=2, logprobs=1), **quiet)
    told["rollouts"] = [shown(each) for each in several]

    with agl.rollout("ro-stop"):
        params = SamplingParams(max_tokens=8, temperature=0, stop=[json.loads(sys.argv[3])], ignore_eos=True)
        told["stop"] = [shown(each) for each in model.generate(json.loads(sys.argv[2]), params, **quiet)]

    @agl.rollout("ro-chat")
    def ask():
        return model.chat(json.loads(sys.argv[4]), SamplingParams(max_tokens=4, temperature=0), **quiet)

    told["chat"] = [shown(each) for each in ask()]

    with agl.rollout("ro-beams"):
        [found] = model.beam_search([{"prompt": "one two"}], BeamSearchParams(beam_width=2, max_tokens=3))
    told["beams"] = [each.tokens for each in found.sequences]

    with agl.rollouts(["ro-4", "ro-5"]):
        told["errors"] = [
            error_of(model.generate, ["one"]),
            error_of(model.chat, [[{"role": "user", "content": "one"}]] * 3),
            error_of(model.generate, [1, 2, 3]),
            error_of(model.beam_search, [{"prompt": "one"}, {"prompt": "two"}], BeamSearchParams(2, 2)),
        ]
    told["nameless"] = [shown(each) for each in model.generate("one", SamplingParams(max_tokens=2), **quiet)]

    engine, params = model.llm_engine, SamplingParams(max_tokens=500, ignore_eos=True)
    engine.add_request("agl/ro-6/at-6/critic/1", "one", params)
    engine.add_request("2", "two", params, trace_headers={"Baggage": "agentlightning.rollout_id=ro-7"})
    engine.add_request("3", "three", params)
    engine.step()
    engine.abort_request(["2"])
    with open(sys.argv[5], "w") as file:
        json.dump(told, file)
"""


class Ran:
    """The results of the program: what vLLM gave it, what was recorded, and what was logged."""

    def __init__(self, nursery: Nursery, folder: Path, **env: str) -> None:
        store, told = folder / "generations.db", folder / "told.json"
        prompt = prompt_token_ids()
        # The text of two ids in the middle of the answer.
        self.stop = tokenizer().decode(greedy(prompt, 8)[2:4])
        arguments = (str(tiny_model()), json.dumps(prompt), json.dumps(self.stop), json.dumps(MESSAGES), str(told))
        variables = {"AGL_STORE": str(store), "AGL_RECORD_OFFLINE": "on", **env}
        self.log = nursery.run(EVERY_WAY, *arguments, folder=folder, env=variables)
        self.told: dict[str, Any] = json.loads(told.read_text())
        with open_store(str(store), read_only=True) as opened:
            self.recorded = [*opened.generations()]

    def of(self, *rollout_ids: str | None) -> list[Generation]:
        return [each for each in self.recorded if each.rollout_id in rollout_ids]


@pytest.fixture(scope="module")
def ran(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(nursery, tmp_path_factory.mktemp("offline"))


def shown(generation: Generation) -> dict[str, Any]:
    """A generation as the program shows vLLM's output."""
    choices = [
        {
            "token_ids": list(each.token_ids or ()),
            "text": each.text,
            "finish_reason": each.finish_reason,
            "stop_reason": each.stop_reason,
            "logprobs": pytest.approx(list(each.logprobs)) if each.logprobs else None,
        }
        for each in generation.choices
    ]
    prompt = list(generation.prompt_token_ids or ())
    return {"request_id": generation.request_id, "prompt_token_ids": prompt, "choices": choices}


def in_order(generations: list[Generation]) -> list[dict[str, Any]]:
    return sorted(map(shown, generations), key=lambda each: int(each["request_id"]))


def test_each_output_is_recorded_as_vllm_returned_it(ran: Ran) -> None:
    assert in_order(ran.of("ro-1")) == ran.told["generate"]
    assert in_order(ran.of("ro-2", "ro-3")) == ran.told["rollouts"]
    assert in_order(ran.of("ro-stop")) == ran.told["stop"]
    assert in_order(ran.of("ro-chat")) == ran.told["chat"]
    assert in_order([each for each in ran.of(None) if each.status == "finished"]) == ran.told["nameless"]


def test_a_block_names_each_of_its_requests(ran: Ran) -> None:
    assert {(each.attempt_id, each.agent_id, each.via) for each in ran.of("ro-1")} == {("at-1", "planner", "process")}
    assert len({each.call_id for each in ran.of("ro-1")}) == 1
    assert {each.endpoint for each in ran.of("ro-1")} == {"LLM.generate"}
    assert {each.endpoint for each in ran.of("ro-chat")} == {"LLM.chat"}
    assert {each.model for each in ran.recorded} == {str(tiny_model())}


def test_a_batch_names_its_prompts_in_their_order(ran: Ran) -> None:
    named = {each["request_id"]: rollout for each, rollout in zip(ran.told["rollouts"], (2, 3, 2), strict=True)}

    assert {each.request_id: each.rollout_id for each in ran.of("ro-2", "ro-3")} == {
        request: f"ro-{number}" for request, number in named.items()
    }
    assert [each.attempt_id for each in ran.of("ro-3")] == ["at-3"]


def test_a_stop_string_is_recorded_with_the_answer_that_it_ended(ran: Ran) -> None:
    [generation] = ran.of("ro-stop")

    assert [(each.finish_reason, each.stop_reason) for each in generation.choices] == [("stop", ran.stop)]
    assert generation.prompt_text is None  # Ids went in, and no text.


def test_the_beams_of_a_search_are_one_call(ran: Ran) -> None:
    beams = ran.of("ro-beams")
    paths = {(*(each.prompt_token_ids or ()), *(each.choices[0].token_ids or ())) for each in beams}

    assert len({each.call_id for each in beams}) == 1
    assert {each.endpoint for each in beams} == {"LLM.beam_search"}
    # Each step asks for one more id of each beam; what it returns continues one of them.
    assert all(any(tuple(beam[:-1]) == path[:-1] for path in paths) for beam in ran.told["beams"])
    assert {each.prompt_text for each in beams} == {None}


def test_a_batch_of_another_size_is_an_error_before_anything_runs(ran: Ran) -> None:
    search = (
        "vLLM searches the beams of all prompts together, so agl.rollouts cannot name them: call beam_search for each "
        "prompt, in agl.rollout"
    )

    assert ran.told["errors"] == [
        "agl.rollouts has names for 2 prompts, but this call has 1",
        "agl.rollouts has names for 2 prompts, but this call has 3",
        "agl.rollouts has names for 2 prompts, but this call has 1",
        search,
    ]
    assert ran.of("ro-4", "ro-5") == []


def test_requests_of_an_engine_are_named_by_their_id_or_baggage_and_aborted_by_its_end(ran: Ran) -> None:
    [of_id], [of_baggage] = ran.of("ro-6"), ran.of("ro-7")
    [nameless] = [each for each in ran.of(None) if each.status == "aborted"]

    assert (of_id.request_id, of_id.attempt_id, of_id.agent_id) == ("agl/ro-6/at-6/critic/1", "at-6", "critic")
    assert {each.status for each in (of_id, of_baggage)} == {"aborted"}
    assert {each.endpoint for each in (of_id, of_baggage, nameless)} == {"LLMEngine.add_request"}
    assert nameless.request_id == "3"


def test_the_log_says_where_an_offline_model_is_recorded(ran: Ran) -> None:
    [line] = [line for line in ran.log.splitlines() if "agentlightning: " in line]

    assert "this offline LLM records to " in line


@pytest.mark.tier("all")
def test_logprobs_are_recorded_of_an_engine_core_in_the_same_process(nursery: Nursery, tmp_path: Path) -> None:
    ran = Ran(nursery, tmp_path, AGL_LOGPROBS="on", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    [chat], [told] = ran.of("ro-chat"), ran.told["chat"]

    assert told["choices"][0]["logprobs"] is None
    assert list(chat.choices[0].token_ids or ()) == told["choices"][0]["token_ids"]
    assert len(chat.choices[0].logprobs or ()) == len(told["choices"][0]["token_ids"])
    assert in_order(ran.of("ro-1")) == ran.told["generate"]


def test_strict_refuses_an_offline_model_that_cannot_be_recorded(nursery: Nursery, tmp_path: Path) -> None:
    program = f"from vllm import LLM\nLLM({str(tiny_model())!r}, max_model_len=1024)\n"
    environment = {"AGL_INSTRUMENT": "strict", "AGL_STORE": "/nonexist/x.db", "AGL_RECORD_OFFLINE": "on"}
    refusal = "agentlightning: AGL_INSTRUMENT=strict refuses this LLM: nothing can be recorded: /nonexist/x.db cannot"

    with pytest.raises(RuntimeError, match=refusal):
        nursery.run(program, folder=tmp_path, env=environment)
