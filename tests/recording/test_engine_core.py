"""The engine core records a request that no instrumented API server sees; never both."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agentlightning.doctor import carriers
from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm._carriers import PROBE_PARAMS
from agentlightning.store import open_database, senders
from tests.common.answers import post
from tests.common.reference import greedy
from tests.common.rust_frontend import rust_frontend
from tests.common.vllm import free_port, run, side_by_side
from tests.recording.load import Load, Stream, checked, endless
from tests.recording.nursery import Nursery
from tests.recording.server import RecordingServer, until
from tests.recording.test_endpoints import CHAT, COMPLETIONS, TALK, choice_ids, ids_of

pytestmark = pytest.mark.tier("all")

TWO_ENGINES = ("--data-parallel-size=2",)
RECORDS = "agentlightning: requests come from a frontend that is not instrumented; the engine core records them"
MODES = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


def rust_environment() -> dict[str, str]:
    return {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(rust_frontend()), "AGL_LOGPROBS": "on"}


@pytest.fixture(scope="module")
def rust(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecordingServer]:
    path = tmp_path_factory.mktemp("store") / "generations.db"
    arguments = (*TWO_ENGINES, "--no-enable-prefix-caching", "--served-model-name", "tiny", "tiny-too")
    with RecordingServer(path, *arguments, env=rust_environment()) as server:
        server.model = "tiny"
        # Before any request: a trainer waits for the calls of every server that its store knows.
        until(lambda: len(registered(path)) == 2, "the registration of both engine cores")
        yield server


def registered(path: Path) -> list[Any]:
    """The processes that have registered with a store."""
    with closing(open_database(str(path))) as database, database.reading() as connection:
        return senders.recent(connection, 0)


@pytest.fixture
def rollout() -> str:
    """An id that no other test uses, and that is valid in a header."""
    return f"rollout-{uuid.uuid4()}"


def ask(server: RecordingServer, path: str, request_id: str | None, **body: Any) -> Any:
    headers = {} if request_id is None else {"X-Request-Id": request_id}
    return post(server, path, server.body(**body), headers)


def kept_of(server: RecordingServer, **filters: Any) -> Generation:
    """Wait for the one generation that matches these filters, and return it."""
    [kept] = until(lambda: server.kept(**filters), "the generation")
    return kept


@MODES
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_answers_of_the_rust_frontend_are_recorded_completely(
    rust: RecordingServer, rollout: str, path: str, stream: bool
) -> None:
    asks: dict[str, Any] = {"messages": TALK} if path == CHAT else {"prompt": "The quick brown"}
    answer = ask(rust, path, f"{rollout}.at-1", **asks, stream=stream, return_token_ids=True, ignore_eos=True)
    kept = kept_of(rust, rollout_id=rollout)

    chunks = answer if stream else [answer]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    prompt = choices[0]["prompt_token_ids"] if path == COMPLETIONS else chunks[0]["prompt_token_ids"]
    said = [token_id for choice in choices for token_id in choice.get("token_ids") or []]
    assert ids_of(kept) == (prompt, [said])
    assert said == greedy(prompt, 24)
    assert (kept.rollout_id, kept.attempt_id, kept.via) == (rollout, "at-1", "engine")
    assert (kept.endpoint, kept.model, kept.status) == (path, "tiny", "finished")
    assert kept.response_id == kept.request_id == chunks[0]["id"]
    assert kept.choices[0].finish_reason == "length"
    assert kept.started_at is not None
    assert kept.first_token_at is not None
    assert kept.started_at < kept.first_token_at <= kept.finished_at
    params = json.loads(str(kept.sampling_params))
    assert (params["max_tokens"], params["temperature"], params.get("logprobs")) == (24, 0, None)
    assert kept.choices[0].weight_versions == [("default", 0, 24)]


@pytest.mark.parametrize("asked", [False, True], ids=["unasked", "asked"])
def test_recorded_logprobs_are_those_that_the_frontend_answers(
    rust: RecordingServer, rollout: str, asked: bool
) -> None:
    reference = ask(rust, COMPLETIONS, None, prompt="one two", logprobs=1)
    answer = ask(rust, COMPLETIONS, rollout, prompt="one two", **({"logprobs": 1} if asked else {}))
    kept = kept_of(rust, rollout_id=rollout)

    [choice] = kept.choices
    said = reference["choices"][0]["logprobs"]["token_logprobs"]
    # The frontend's JSON has the shortest number that is this float32.
    assert choice.logprobs is not None
    assert choice.logprobs.tolist() == pytest.approx(said, rel=1e-6)
    assert len(said) == len(choice_ids(choice))
    assert kept.logprobs_mode == "raw_logprobs"
    assert (answer["choices"][0]["logprobs"] is not None) == asked


def test_a_client_cannot_mark_its_request_as_recorded(rust: RecordingServer, rollout: str) -> None:
    answer = ask(rust, CHAT, rollout, messages=TALK, vllm_xargs={"agentlightning": ["logprobs"]})

    assert kept_of(rust, rollout_id=rollout).response_id == answer["id"]


def test_probes_of_doctor_are_not_recorded(rust: RecordingServer) -> None:
    before = {each.id for each in rust.kept()}
    arrived = carriers.read(rust.url, None)
    answer = ask(rust, CHAT, None, messages=TALK, temperature=PROBE_PARAMS["temperature"])
    last = kept_of(rust, response_id=answer["id"])

    # No Python sees its answers.
    assert not any(arrived.values())
    assert {each.id for each in rust.kept()} - before == {last.id}


def test_a_request_without_a_header_belongs_to_no_rollout(rust: RecordingServer) -> None:
    answer = ask(rust, CHAT, None, messages=TALK)
    kept = kept_of(rust, response_id=answer["id"])

    assert (kept.rollout_id, kept.attempt_id) == (None, None)


def test_an_answer_ended_by_a_stop_string_has_the_ids_before_it(rust: RecordingServer, rollout: str) -> None:
    options = {"prompt": "hi", "ignore_eos": True}
    text = ask(rust, COMPLETIONS, None, **options)["choices"][0]["text"]
    answer = ask(rust, COMPLETIONS, rollout, **options, stop=[text[8:10]], return_token_ids=True)
    kept = kept_of(rust, rollout_id=rollout)

    # The frontend looks for it, and gives the request up: the engine may have gone on by then.
    said = answer["choices"][0]["token_ids"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert choice_ids(kept.choices[0])[: len(said)] == said
    assert kept.status == "aborted"


def test_both_engine_cores_record_answered_and_aborted_requests(rust: RecordingServer, rollout: str) -> None:
    streams = [
        Stream(number, prompt, leaves_after=3 if number % 3 == 0 else None)
        for number, prompt in enumerate(["one", "The quick brown", "two three"] * 20)
    ]
    with Load(rust, rollout, streams, by_request_id=True) as load:
        load.wait()
    until(lambda: len(rust.kept(rollout_id=rollout)) == len(streams), "all of them")

    kept = checked(rust.kept(rollout_id=rollout), load.streams)
    assert kept.keys() == {stream.number for stream in streams}
    assert {each.status for each in kept.values()} == {"finished", "aborted"}
    # Each says it once, when it gets its first.
    assert rust.log.count(RECORDS) == 2


def test_what_the_server_pins_is_pinned_behind_the_rust_frontend(
    tmp_path: Path, rollout: str, nursery: Nursery
) -> None:
    env = {**rust_environment(), "AGL_SAMPLING": "temperature=0,top_p=0.9"}
    with nursery.server(tmp_path / "generations.db", env=env) as server:
        options = {"prompt": "The quick brown", "temperature": 1.5, "top_p": 0.9, "ignore_eos": True}
        answer = ask(server, COMPLETIONS, rollout, **options, return_token_ids=True)
        kept = kept_of(server, rollout_id=rollout)

    prompt, said = ids_of(kept)
    assert [choice["token_ids"] for choice in answer["choices"]] == said == [greedy(prompt, 24)]
    params = json.loads(str(kept.sampling_params))
    # The frontend sends float32.
    assert params["top_p"] == pytest.approx(0.9)
    assert (params["temperature"], kept.requested_params) == (0, '{"temperature":1.5}')


def test_requests_unfinished_when_the_server_stops_are_recorded(tmp_path: Path, rollout: str, nursery: Nursery) -> None:
    with nursery.server(tmp_path / "generations.db", env=rust_environment()) as server:
        with Load(server, rollout, endless(900), by_request_id=True) as load:
            until(lambda: len(load.begun) == 16, "answers that have begun")
            server.process.send_signal(signal.SIGTERM)
            load.wait()
        server.process.wait(60)

        kept = checked(server.kept(rollout_id=rollout), load.streams)
        assert kept.keys() == {stream.number for stream in load.streams}
        assert {each.status for each in kept.values()} == {"aborted"}


def test_each_engine_core_is_a_sender_that_knows_its_model_but_no_text(rust: RecordingServer, rollout: str) -> None:
    ask(rust, CHAT, rollout, messages=TALK)
    kept = kept_of(rust, rollout_id=rollout)

    with closing(open_database(rust.store)) as database, database.reading() as connection:
        found = senders.recent(connection, 0)
        assert senders.vocabulary_of(connection, kept.id) is None
    assert {each.sender.model for each in found} == {"tiny"}
    assert len({each.sender.pid for each in found}) == len(found) == 2
    assert sum(minute.generations for each in found for minute in each.minutes) == len(rust.kept())


def test_doctor_says_where_to_look(rust: RecordingServer, rollout: str) -> None:
    ask(rust, CHAT, rollout, messages=TALK)
    kept_of(rust, rollout_id=rollout)

    told = " ".join(run("agl", "doctor", "--url", rust.url).stdout.split())
    assert "`agl doctor --store` shows what its engine cores record" in told
    assert run("agl", "doctor", "--store", str(rust.path), "--rollout", rollout).returncode == 0


@pytest.mark.parametrize("instrumented", [True, False], ids=["instrumented", "not instrumented"])
def test_a_frontend_on_another_machine_is_recorded_by_one_side(
    tmp_path: Path, rollout: str, nursery: Nursery, instrumented: bool
) -> None:
    meeting_point = ("--data-parallel-address=127.0.0.1", f"--data-parallel-rpc-port={free_port()}")
    two_engines = (*TWO_ENGINES, "--data-parallel-size-local=1", "--api-server-count=1", *meeting_point)
    off: Mapping[str, str] = {} if instrumented else {"AGL_INSTRUMENT": "0", "AGL_STORE": ""}
    server = RecordingServer(tmp_path / "server.db", *two_engines, env=off)
    elsewhere = [argument for argument in two_engines if not argument.startswith("--api-server-count")]
    # As good as the flag: what counts is what vLLM has read, from wherever. It reads no --config=FILE in one word.
    config = tmp_path / "config.yaml"
    config.write_text("headless: true\n")
    headless = ("--config", str(config), "--data-parallel-start-rank=1")
    engine = RecordingServer(tmp_path / "engine.db", *elsewhere, *headless)
    engine._is_up = lambda engine: True
    with side_by_side(server, engine):
        with Load(server, rollout, endless()) as load:
            until(lambda: len(load.answered) >= 100, "answers")
            if instrumented:
                answered = {str(stream.response_id) for stream in load.answered}
                until(lambda: answered <= {str(each.response_id) for each in server.kept()}, "all of them")
            else:
                until(lambda: len(engine.kept()) > 10, "some of them")
            by_engine = engine.kept()
            answered = {str(stream.response_id) for stream in load.streams}
            assert bool(by_engine) == (RECORDS in engine.log) == (not instrumented)
            assert all(str(each.response_id) in answered for each in by_engine if each.status == "finished")
        if not instrumented:
            with Load(server, rollout, endless(900), by_request_id=True) as load:
                until(lambda: len(load.begun) == 16, "answers that have begun")
                engine.process.send_signal(signal.SIGTERM)
                engine.process.wait(60)
            kept = checked(engine.kept(rollout_id=rollout), load.streams)
            assert {each.status for each in kept.values()} == {"aborted"}
