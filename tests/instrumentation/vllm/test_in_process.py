"""Events that no engine causes at will in a program's own process: failures, repeated work, two alike requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.pooling_params import PoolingParams
from vllm.v1.engine import FinishReason

from agentlightning import instrumentation, rollout, rollouts
from agentlightning.instrumentation.vllm import _context
from agentlightning.instrumentation.vllm._carriers import conflicting_names, ignored_ids
from agentlightning.instrumentation.vllm._context import RequestContext
from agentlightning.instrumentation.vllm.capture import frontend, in_process
from agentlightning.instrumentation.vllm.capture.session import session
from tests.common.engine import Engine, kept

pytestmark = pytest.mark.forked


@pytest.fixture(autouse=True)
def nothing_is_counted() -> None:
    """Forget what other tests of this process have counted."""
    ignored_ids.clear()
    conflicting_names.clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "generations.db"


@pytest.fixture
def engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An offline engine, whose output processor is vLLM's."""
    monkeypatch.setenv("AGL_STORE", str(path))
    monkeypatch.setenv("AGL_RECORD_OFFLINE", "on")
    instrumentation.instrument_vllm()
    engine = Engine()
    frontend.record_offline(SimpleNamespace(output_processor=engine.processor, engine_core=object()))
    return engine


def test_what_an_offline_engine_fails_is_recorded_as_failed(engine: Engine, path: Path) -> None:
    class Failing:
        output_processor = engine.processor

        def step(self) -> None:
            raise RuntimeError("out of memory")

    engine.add("one", [1, 2], queue=False)
    engine.says("one-0", [3])
    with pytest.raises(RuntimeError, match="out of memory"):
        in_process.wrap_step(Failing.step)(Failing())

    [generation] = kept(path)
    assert (generation.status, [list(each.token_ids or ()) for each in generation.choices]) == ("error", [[3]])


def test_what_is_interrupted_is_recorded_as_aborted_at_the_end(engine: Engine, path: Path) -> None:
    engine.add("one", [1, 2], queue=False, n=2)
    engine.says("0_one-0", [3], FinishReason.LENGTH)
    frontend.end_all()

    [generation] = kept(path)
    assert generation.status == "aborted"
    assert [each.finish_reason for each in generation.choices] == ["length", "abort"]


def test_a_stop_string_is_unknown_where_two_requests_of_a_step_have_one_id() -> None:
    one, another = SimpleNamespace(request_id="1"), SimpleNamespace(request_id="2")

    assert frontend._by_request([one, another]) == {"1": one, "2": another}
    assert frontend._by_request([one, another, one]) == {"1": None, "2": another}


@pytest.mark.parametrize(("backend", "repeats"), [("external_launcher", [1, 3, 5, 7]), ("mp", []), (None, [])])
def test_the_first_rank_of_each_model_that_torchrun_starts_records(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, repeats: list[int]
) -> None:
    config = SimpleNamespace(distributed_executor_backend=backend, world_size=2)
    found = []
    for rank in range(8):
        monkeypatch.setenv("RANK", str(rank))
        found += [rank] * in_process._repeats_another(config)

    assert found == repeats


def config_of(runner: str) -> SimpleNamespace:
    """Return as much of an engine's configuration as is read."""
    model = SimpleNamespace(runner_type=runner, served_model_name=["served"], logprobs_mode="raw_logprobs")
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace())


def test_an_engine_that_only_embeds_is_not_recorded(engine: Engine) -> None:
    pooling = SimpleNamespace(output_processor=Engine().processor, engine_core=object())
    in_process.begin(pooling, config_of("pooling"))

    assert list(frontend._offline) == [engine.processor]
    assert session.identity.sender().model is None


def test_an_offline_engine_is_no_longer_recorded_where_that_is_switched_off(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add("on", [1], queue=False)
    engine.says("on-0", [3], FinishReason.LENGTH)
    recorder = session.recorder
    instrumentation.uninstrument_vllm()
    monkeypatch.setenv("AGL_RECORD_OFFLINE", "off")
    instrumentation.instrument_vllm()
    engine.add("off", [1], queue=False)
    engine.says("off-0", [3], FinishReason.LENGTH)

    assert [each.request_id for each in kept(path, recorder)] == ["on"]


def test_an_engine_that_was_made_before_the_instrumentation_is_recorded_from_its_next_request(
    engine: Engine, path: Path
) -> None:
    class Late:
        output_processor, engine_core, vllm_config = Engine().processor, object(), config_of("generate")
        model_config = vllm_config.model_config

        def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
            engine.add(request_id, prompt, queue=False)

    engine.processor = Late.output_processor
    with rollout("ro-1"):
        in_process.wrap_add_request(Late.add_request)(Late(), "late", [1], None)
    engine.says("late-0", [3], FinishReason.LENGTH)

    [generation] = kept(path)
    assert (generation.request_id, generation.rollout_id, generation.model) == ("late", "ro-1", "served")


class Client:
    """A stand-in for vLLM's, which needs a model."""

    model_config = SimpleNamespace(served_model_name=["served"])

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, lora_request: Any = None, trace_headers: Any = None
    ) -> RequestContext | None:
        return _context.current()

    async def generate(self, request_id: str, **options: Any) -> AsyncGenerator[RequestContext | None, None]:
        yield await in_process.wrap_async_add_request(Client.add_request)(self, request_id, None, None, **options)


def context_of(request_id: str, *args: Any, present: RequestContext | None = None, **options: Any) -> RequestContext:
    """Return the context in which a client makes a request."""
    add_request = in_process.wrap_async_add_request(Client.add_request)

    async def call() -> RequestContext | None:
        _context._current.set(present)
        return await add_request(Client(), request_id, None, None, *args, **options)

    found = asyncio.run(call())
    assert found is not None
    return found


def whose(context: RequestContext) -> tuple[str | None, str | None, str | None]:
    return context.rollout_id, context.attempt_id, context.agent_id


def test_conflicting_names_are_counted_and_the_first_counts() -> None:
    of_http = RequestContext(rollout_id="ro-http", attempt_id="at-http", agent_id="of-http", carrier="path")
    headers = {"baggage": "agentlightning.rollout_id=ro-baggage"}
    with rollout("ro-block"):
        found = context_of("agl/ro-id/at-id/of-id/1", present=of_http, trace_headers=headers)

    assert whose(found) == ("ro-block", None, "of-http")
    assert conflicting_names == {"path": 1, "trace_headers": 1, "request_id": 1}
    assert whose(of_http) == ("ro-http", "at-http", "of-http")
    assert found.call_id == of_http.call_id


def test_what_is_ignored_is_logged_once_for_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        with rollout("ro-block"):
            context_of(f"agl/ro-id/{number}", trace_headers={"x-agl-rollout-id": "ro-header"})
        context_of(str(number), trace_headers={"x-agl-rollout-id": "a`b"})

    two, once = "a call names one rollout or attempt, and by its", "another, which is ignored; this is logged once"
    assert [record.message.removeprefix("agentlightning: ") for record in caplog.records] == [
        f"{two} trace_headers {once}",
        f"{two} request_id {once}",
        "an id in x-agl-rollout-id is not valid, so it is ignored; this is logged once",
    ]


@pytest.mark.parametrize(("of_block", "counts"), [("planner", "planner"), (None, "of-header")])
def test_the_agent_of_a_block_comes_before_that_of_a_header(of_block: str | None, counts: str) -> None:
    of_http = RequestContext(agent_id="of-header")
    with rollout("ro-1", agent_id=of_block):
        in_trace_headers = context_of("1", trace_headers={"x-agl-agent-id": "of-header"})
        in_http = context_of("2", present=of_http)

    assert [in_trace_headers.agent_id, in_http.agent_id, of_http.agent_id] == [counts, counts, "of-header"]


def test_a_request_without_a_name_of_its_own_has_the_context_of_http() -> None:
    of_http = RequestContext(rollout_id="ro-http", carrier="path")

    assert context_of("chatcmpl-1", present=of_http) is of_http


def test_the_trace_of_an_http_request_is_not_read_again() -> None:
    of_http = RequestContext(endpoint="/v1/chat/completions")

    assert (
        context_of("chatcmpl-1", present=of_http, trace_headers={"Traceparent": "00-x", "tracestate": "y"}) is of_http
    )
    assert context_of("1", trace_headers={"Traceparent": "00-x"}).trace_id is None
    assert ignored_ids == {"traceparent": 1}


def test_an_http_request_that_names_nothing_leaves_it_to_the_arguments() -> None:
    of_http = RequestContext(endpoint="/ask", model="asked")
    found = context_of("agl/ro-id/1", present=of_http)

    assert (found.rollout_id, found.endpoint, found.model) == ("ro-id", "/ask", "asked")


def test_arguments_count_by_position_and_ids_by_the_rules() -> None:
    lora = SimpleNamespace(lora_name="adapter")
    found = context_of("agl/a%22b/1", lora, {"X-Agl-Rollout-Id": "a`b", "x-session-id": "s"})

    assert (found.rollout_id, found.session_id, found.model) == (None, "s", "adapter")
    assert sum(ignored_ids.values()) == 2


@pytest.mark.parametrize("headers", [{"traceparent": b"00-x"}, [("baggage", "x")], {"baggage": "\ud800"}], ids=repr)
def test_headers_that_are_none_cost_a_call_no_name(headers: Any) -> None:
    with rollout("ro-block"):
        assert context_of("1", trace_headers=headers).rollout_id == "ro-block"
    assert context_of("agl/ro-id/1", trace_headers=headers).rollout_id == "ro-id"


def test_a_single_request_has_the_one_name_of_a_batch_of_one() -> None:
    with rollouts(["ro-1"]):
        assert context_of("1").rollout_id == "ro-1"
    with rollouts(["ro-1", "ro-2"]), pytest.raises(ValueError, match="but this is a single request"):
        context_of("1")


def test_a_pooling_request_passes_through_a_batch_for_other_prompts() -> None:
    class Engine:
        def add_request(self, request_id: str, prompt: Any, params: Any) -> RequestContext | None:
            return _context.current()

    add_request = in_process.wrap_async_add_request(Client.add_request)
    with rollouts(["ro-1", "ro-2"]):
        assert asyncio.run(add_request(Client(), "1", None, PoolingParams())) is None
        assert in_process.wrap_add_request(Engine.add_request)(Engine(), "1", None, params=PoolingParams()) is None


@pytest.mark.parametrize(("of_call", "rollout_id"), [(rollout("ro-1"), "ro-1"), (nullcontext(), None)])
def test_a_generator_has_the_block_that_it_was_made_in(
    of_call: AbstractContextManager[object], rollout_id: str | None
) -> None:
    generate = in_process.wrap_generate(Client.generate)

    async def ask() -> list[RequestContext | None]:
        with of_call:
            stream = generate(Client(), "1")
        with rollout("ro-2"):
            return [each async for each in stream]

    [found] = asyncio.run(ask())
    assert found is not None
    assert found.rollout_id == rollout_id
