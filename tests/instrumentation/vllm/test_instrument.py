"""instrument_vllm() and its undoing on the real vLLM's classes, in processes that are forked for each test."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.plugins import load_general_plugins

from agentlightning import instrumentation
from agentlightning._startup import start
from agentlightning.instrumentation.vllm import _isolation, import_targets

# As a vLLM that serves everything has them.
import_targets()

pytestmark = pytest.mark.forked

OpenAIServingChat = chat_serving.OpenAIServingChat
VLLMS_OWN = OpenAIServingChat.create_chat_completion
# It imports vLLM's serve_http by name.
IMPORTS_SERVE_HTTP = vars(entry)
VLLMS_SERVE_HTTP = launcher.serve_http
PATCH_SETS = tuple(instrumentation.status())
APPLIED = dict.fromkeys(PATCH_SETS, "applied")


def statuses() -> dict[str, str]:
    return {name: str(status) for name, status in instrumentation.status().items()}


def request(**options: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=[{"role": "user", "content": "hi"}], **options)


def response() -> ChatCompletionResponse:
    return ChatCompletionResponse(model="m", choices=[], usage=UsageInfo())


def serve(answers: Callable[[ChatCompletionRequest], Any], asked: ChatCompletionRequest) -> Any:
    """Return the answer of an instrumented `OpenAIServingChat` whose own method answers with `answers`."""

    async def create_chat_completion(self: Any, request: ChatCompletionRequest, raw_request: Any = None) -> Any:
        return answers(request)

    if not hasattr(OpenAIServingChat.create_chat_completion, "__agl_patched__"):
        OpenAIServingChat.create_chat_completion = create_chat_completion
        instrumentation.instrument_vllm()
    serving = OpenAIServingChat.__new__(OpenAIServingChat)
    return asyncio.run(serving.create_chat_completion(asked))


def test_instrumenting_patches_modules_imported_before() -> None:
    instrumentation.instrument_vllm()

    assert statuses() == APPLIED
    assert OpenAIServingChat.create_chat_completion is not VLLMS_OWN
    assert IMPORTS_SERVE_HTTP["serve_http"] is launcher.serve_http is not VLLMS_SERVE_HTTP


def test_a_forked_test_leaves_nothing_to_the_next() -> None:
    assert set(statuses().values()) == {"pending"}
    assert OpenAIServingChat.create_chat_completion is VLLMS_OWN


def test_uninstrumenting_puts_everything_back() -> None:
    before = vars(completion_serving.OpenAIServingCompletion).copy()
    fields, dumped = list(ChatCompletionResponse.model_fields), response().model_dump().keys()
    instrumentation.instrument_all()
    assert vars(completion_serving.OpenAIServingCompletion) != before

    instrumentation.uninstrument_all()
    instrumentation.uninstrument_all()

    assert vars(completion_serving.OpenAIServingCompletion) == before
    assert OpenAIServingChat.create_chat_completion is VLLMS_OWN
    assert IMPORTS_SERVE_HTTP["serve_http"] is launcher.serve_http is VLLMS_SERVE_HTTP
    assert list(ChatCompletionResponse.model_fields) == fields
    assert response().model_dump().keys() == dumped
    assert set(statuses().values()) == {"pending"}


def test_instrumenting_again_after_undoing_works() -> None:
    instrumentation.instrument_vllm()
    instrumentation.uninstrument_vllm()
    instrumentation.instrument_vllm()

    assert statuses() == APPLIED


def test_instrumenting_twice_is_a_no_op_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    instrumentation.instrument_vllm()
    patched = OpenAIServingChat.create_chat_completion
    instrumentation.instrument_vllm()

    assert OpenAIServingChat.create_chat_completion is patched
    assert caplog.messages == ["agentlightning: vLLM is instrumented already"]


def test_the_chat_response_is_extended_in_place() -> None:
    instrumentation.instrument_vllm()
    from agentlightning.instrumentation.vllm import ChatCompletionResponsePatched

    assert ChatCompletionResponsePatched is ChatCompletionResponse
    assert "response_token_ids" in ChatCompletionResponse.model_json_schema()["properties"]
    with_ids: Any = response()
    assert "response_token_ids" not in with_ids.model_dump()
    with_ids.response_token_ids = [[1, 2]]
    assert with_ids.model_dump()["response_token_ids"] == [[1, 2]]


@pytest.mark.parametrize("undone", [False, True], ids=["instrumented", "undone with the request under way"])
def test_run_batch_imported_before_keeps_the_ids_in_its_results(undone: bool) -> None:
    from vllm.entrypoints.launchers.run_batch import BatchResponseData

    instrumentation.instrument_vllm()
    with_ids: Any = response()
    with_ids.response_token_ids = [[1]]
    if undone:
        instrumentation.uninstrument_vllm()
        with_ids = response()
        with_ids.response_token_ids = [[1]]

    batch = BatchResponseData(status_code=200, request_id="r", body=with_ids)
    assert batch.model_dump()["body"]["response_token_ids"] == [[1]]
    assert with_ids.model_dump()["response_token_ids"] == [[1]]


def test_importing_the_instrumentation_never_imports_vllm() -> None:
    code = "import sys, agentlightning.instrumentation as i; i.instrument_all(); print('vllm' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


class TestVllmsPluginEntryPoint:
    """vLLM's plugin arms Pythons without .pth files, after vLLM has imported the patched modules."""

    @staticmethod
    def load_plugins(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
        monkeypatch.setenv("AGL_INSTRUMENT", switch)
        load_general_plugins()

    def test_the_plugin_patches_modules_imported_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.load_plugins(monkeypatch, "1")

        assert statuses() == APPLIED

    def test_the_plugin_does_nothing_while_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.load_plugins(monkeypatch, "off")

        assert set(statuses().values()) == {"pending"}
        assert OpenAIServingChat.create_chat_completion is VLLMS_OWN

    def test_the_plugin_changes_nothing_after_the_pth_file(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("AGL_INSTRUMENT", "1")
        start()
        patched = OpenAIServingChat.create_chat_completion
        self.load_plugins(monkeypatch, "1")

        assert OpenAIServingChat.create_chat_completion is patched is not VLLMS_OWN
        assert not [record for record in caplog.records if record.name == "agentlightning"]

    def test_the_plugin_changes_nothing_after_a_program_uninstrumented_vllm(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        instrumentation.uninstrument_vllm()
        self.load_plugins(monkeypatch, "1")

        assert OpenAIServingChat.create_chat_completion is VLLMS_OWN


@pytest.mark.parametrize(
    ("setting", "said", "asked"),
    [
        ("all", None, True),
        ("response", None, True),
        ("none", None, None),
        ("NONE ", None, None),
        ("none", True, True),
        ("all", False, False),
    ],
)
def test_vllm_is_asked_for_ids_by_switch_and_request(
    monkeypatch: pytest.MonkeyPatch, setting: str, said: bool | None, asked: bool | None
) -> None:
    monkeypatch.setenv("AGL_RETURN_TOKEN_IDS", setting)

    assert serve(lambda request: request.return_token_ids, request(return_token_ids=said)) is asked


def test_an_invalid_switch_counts_as_all_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AGL_RETURN_TOKEN_IDS", "prompt")

    assert [serve(lambda request: request.return_token_ids, request()) for _ in range(2)] == [True, True]
    assert caplog.messages == [
        "agentlightning: AGL_RETURN_TOKEN_IDS='prompt' is not one of all, response, none; the default 'all' is used"
    ]


def test_an_attachment_that_raises_gives_vllms_answer_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    broken = SimpleNamespace(choices=[SimpleNamespace(index=0)])

    assert [serve(lambda _: broken, request()) for _ in range(3)] == [broken] * 3
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "/v1/chat/completions: attaching ids" in record.message
    assert _isolation.failures == {"/v1/chat/completions: attaching ids: AttributeError": 3}


def test_a_request_that_cannot_be_read_is_answered_by_vllm_alone(caplog: pytest.LogCaptureFixture) -> None:
    unreadable: Any = SimpleNamespace()

    assert serve(lambda _: "vLLM's own", unreadable) == "vLLM's own"
    assert "asking for ids" in caplog.text


def test_an_unreadable_chunk_passes_unchanged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AGL_RETURN_TOKEN_IDS", "response")
    events = ['data: {"prompt_token_ids":[1]}\n\n', 'data: {"prompt_token_ids":[broken\n\n', "data: [DONE]\n\n"]

    async def stream() -> AsyncGenerator[str, None]:
        for event in events:
            yield event

    async def gathered(stream: Any) -> list[str]:
        return [event async for event in stream]

    assert asyncio.run(gathered(serve(lambda _: stream(), request(stream=True)))) == [
        'data: {"prompt_token_ids":null}\n\n',
        *events[1:],
    ]
    assert "editing a stream" in caplog.text


def test_a_client_that_leaves_closes_vllms_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_RETURN_TOKEN_IDS", "response")
    closed = []

    async def stream() -> AsyncGenerator[str, None]:
        try:
            yield "data: {}\n\n"
            yield "data: {}\n\n"
        finally:
            closed.append(True)

    async def leave(stream: Any) -> None:
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave(serve(lambda _: stream(), request(stream=True))))
    assert closed == [True]


def test_an_exception_of_vllm_reaches_the_route() -> None:
    def refuse(_: ChatCompletionRequest) -> Any:
        raise ValueError("vLLM's own")

    with pytest.raises(ValueError, match="vLLM's own"):
        serve(refuse, request())


def test_an_endpoint_built_upon_chat_stays_unchanged() -> None:
    anthropic = type("AnthropicServingMessages", (OpenAIServingChat,), {"__module__": "vllm.entrypoints.anthropic"})
    upon_it = type("MyMessages", (anthropic,), {"__module__": "trainer"})
    trainers = type("TrainersServingChat", (OpenAIServingChat,), {"__module__": "trainer"})
    asked = []

    async def create_chat_completion(self: Any, request: ChatCompletionRequest, raw_request: Any = None) -> Any:
        asked.append(request.return_token_ids)

    OpenAIServingChat.create_chat_completion = create_chat_completion
    instrumentation.instrument_vllm()
    for serving in (anthropic, upon_it, trainers):
        asyncio.run(serving.__new__(serving).create_chat_completion(request()))

    assert asked == [None, None, True]


class TestTakenIds:
    """Ids of an echo are taken from the engine's results: if that fails, the answer is vLLM's."""

    VLLMS_EVENTS = ('data: {"choices":[{"index":0,"text":"ab"}]}\n\n', "data: [DONE]\n\n")

    def streamed(self, results: Any, asked: Any) -> list[str]:
        """Return the stream where vLLM sends one event per result, and a last one."""
        event, done = self.VLLMS_EVENTS

        async def completion_stream_generator(
            self: Any, request: Any, engine_inputs: Any, result_generator: Any
        ) -> AsyncGenerator[str, None]:
            async for _ in result_generator:
                yield event
            yield done

        return self.answered(completion_stream_generator, results, asked)

    def answered(self, completion_stream_generator: Any, results: Any, asked: Any) -> list[str]:
        """Return the stream of a vLLM that streams like this."""

        async def gathered(stream: AsyncGenerator[str, None]) -> list[str]:
            return [event async for event in stream]

        serving: Any = completion_serving.OpenAIServingCompletion
        serving.completion_stream_generator = completion_stream_generator
        instrumentation.instrument_vllm()
        return asyncio.run(gathered(serving.__new__(serving).completion_stream_generator(asked, [], results)))

    async def results(self, *outputs: Any) -> AsyncGenerator[tuple[int, Any], None]:
        for output in outputs:
            yield 0, output

    def test_ids_that_no_chunk_carried_come_in_one_more_chunk(self) -> None:
        """Regression test: in some releases a parser can be silent to the end of a stream."""
        first, second, last = (
            SimpleNamespace(prompt_token_ids=[1], outputs=[SimpleNamespace(index=0, token_ids=[number])])
            for number in (2, 3, 4)
        )
        head = '"id":"cmpl-1","object":"text_completion","created":7,"model":"m"'
        usage = f'data: {{{head},"choices":[],"usage":{{}}}}\n\n'

        async def completion_stream_generator(
            self: Any, request: Any, engine_inputs: Any, result_generator: Any
        ) -> AsyncGenerator[str, None]:
            async for _, result in result_generator:
                if result is first:
                    yield f'data: {{{head},"choices":[{{"index":0,"text":"ab"}}],"usage":null}}\n\n'
            yield usage
            yield "data: [DONE]\n\n"

        asked = CompletionRequest.model_validate({"prompt": "a", "echo": True})
        said = '{"index":0,"text":"ab","prompt_token_ids":[1],"token_ids":[2]}'
        unsaid = '{"index":0,"text":"","logprobs":null,"finish_reason":null,"token_ids":[3,4]}'
        assert self.answered(completion_stream_generator, self.results(first, second, last), asked) == [
            f'data: {{{head},"choices":[{said}],"usage":null}}\n\n',
            f'data: {{{head},"choices":[{unsaid}]}}\n\n',
            usage,
            "data: [DONE]\n\n",
        ]

    def test_unreadable_outputs_give_vllms_answer(self, caplog: pytest.LogCaptureFixture) -> None:
        asked = CompletionRequest.model_validate({"prompt": "a", "echo": True})

        assert self.streamed(self.results(SimpleNamespace()), asked) == list(self.VLLMS_EVENTS)
        assert "noting streamed ids" in caplog.text

    def test_an_unreadable_request_gives_vllms_answer(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.streamed(self.results(SimpleNamespace()), SimpleNamespace()) == list(self.VLLMS_EVENTS)
        assert "/v1/completions: taking ids" in caplog.text

    def test_results_without_aclose_give_the_ids(self, caplog: pytest.LogCaptureFixture) -> None:
        class Results:
            """An iterator as any, without `aclose`."""

            def __init__(self) -> None:
                self.left = [SimpleNamespace(prompt_token_ids=[1], outputs=[SimpleNamespace(index=0, token_ids=[2])])]

            def __aiter__(self) -> Results:
                return self

            async def __anext__(self) -> tuple[int, Any]:
                if not self.left:
                    raise StopAsyncIteration
                return 0, self.left.pop()

        asked = CompletionRequest.model_validate({"prompt": "a", "echo": True})
        with_ids = 'data: {"choices":[{"index":0,"text":"ab","prompt_token_ids":[1],"token_ids":[2]}]}\n\n'

        assert self.streamed(Results(), asked) == [with_ids, self.VLLMS_EVENTS[1]]
        assert not caplog.messages
