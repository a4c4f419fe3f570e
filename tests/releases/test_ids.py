"""The token ids in the answers of each release: those that its engine was given and gave, each once, in order."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from openai import BadRequestError

from tests.common.answers import gather, tokenize
from tests.common.reference import shows
from tests.common.vllm import RemoteOpenAIServer
from tests.releases.chosen import ANYTHING, ARGUMENTS, CALLS, SENTENCE, TOOL_CALL
from tests.releases.engine import Engine
from tests.releases.table import N_STREAMED, REQUIRED_STREAMED

MESSAGES: Any = [{"role": "user", "content": "How is the weather in Paris? 😀"}]
PROMPTS = ["The quick brown", "Größe 😀"]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris"]}},
            "required": ["city"],
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
USAGE = {"include_usage": True}


def chat(server: RemoteOpenAIServer, **options: Any) -> Any:
    """An answer as the `openai` client gives it."""
    create = server.client().chat.completions.create
    return create(model=server.model, messages=MESSAGES, extra_body={"max_tokens": 24, **options})


def chat_streamed(server: RemoteOpenAIServer, **options: Any) -> Any:
    """A streamed one, put together."""
    create = server.client().chat.completions.create
    body = {"max_tokens": 24, "stream_options": USAGE, **options}
    return gather(create(model=server.model, messages=MESSAGES, stream=True, extra_body=body))


def complete(server: RemoteOpenAIServer, prompt: Any = PROMPTS[0], **options: Any) -> Any:
    """An answer as the `openai` client gives it."""
    create = server.client().completions.create
    return create(model=server.model, prompt=prompt, extra_body={"max_tokens": 12, **options})


def complete_streamed(server: RemoteOpenAIServer, prompt: Any = PROMPTS[0], **options: Any) -> Any:
    """A streamed one, put together."""
    create = server.client().completions.create
    body = {"max_tokens": 12, "stream_options": USAGE, **options}
    return gather(create(model=server.model, prompt=prompt, stream=True, extra_body=body))


class TestChat:
    def test_an_answer_has_the_ids_that_the_engine_was_given_and_gave(
        self, armed: RemoteOpenAIServer, engine: Engine
    ) -> None:
        answer = chat(armed, **engine.asks(ANYTHING))

        assert answer.prompt_token_ids == tokenize(armed, messages=MESSAGES)
        assert answer.response_token_ids == [engine.says(ANYTHING, answer.prompt_token_ids, 24)]
        assert answer.choices[0].token_ids == answer.response_token_ids[0]
        assert shows(answer.response_token_ids[0], answer.choices[0].message.content)

    def test_joined_stream_has_the_ids_of_the_plain_answer(self, armed: RemoteOpenAIServer, engine: Engine) -> None:
        streamed, answer = (ask(armed, **engine.asks(ANYTHING)) for ask in (chat_streamed, chat))

        assert streamed.token_ids == {0: answer.response_token_ids[0]}
        assert streamed.prompt_token_ids == {0: answer.prompt_token_ids}
        assert streamed.chunks[0]["prompt_token_ids"] == answer.prompt_token_ids
        assert streamed.text[0] == answer.choices[0].message.content
        assert streamed.usage["completion_tokens"] == 24

    def test_answer_with_n_has_the_ids_of_each_choice(self, armed: RemoteOpenAIServer, engine: Engine) -> None:
        answer = chat(armed, **engine.asks(ANYTHING, n=2, temperature=1))

        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.response_token_ids == [choice.token_ids for choice in answer.choices]
        assert answer.response_token_ids[0] != answer.response_token_ids[1]
        for choice in answer.choices:
            assert choice.token_ids == (engine.draws(ANYTHING + choice.index, 24) or choice.token_ids)
            assert shows(choice.token_ids, choice.message.content)

    @pytest.mark.check(N_STREAMED)
    def test_stream_with_n_has_the_ids_of_each_choice(self, armed: RemoteOpenAIServer, engine: Engine) -> None:
        # The parser of a release keeps back what follows such a word, whether there are tools or not.
        options = engine.asks(ANYTHING, n=2, temperature=1, bad_words=["<tool_call>"])
        streamed = chat_streamed(armed, **options)

        assert sorted(streamed.token_ids) == [0, 1]
        assert streamed.prompt_token_ids[0] == tokenize(armed, messages=MESSAGES)
        assert streamed.usage["completion_tokens"] == sum(map(len, streamed.token_ids.values())) == 48
        for index, token_ids in streamed.token_ids.items():
            assert token_ids == (engine.draws(ANYTHING + index, 24) or token_ids)
            assert shows(token_ids, streamed.text[index])

    def test_the_ids_of_a_stop_string_are_there_and_its_text_is_not(
        self, armed: RemoteOpenAIServer, engine: Engine
    ) -> None:
        options = engine.asks(SENTENCE, stop=["four"], max_tokens=60)
        streamed, answer = (ask(armed, **options) for ask in (chat_streamed, chat))

        assert answer.choices[0].message.content == streamed.text[0] == "One two three "
        assert shows(answer.response_token_ids[0], "One two three four")
        assert streamed.token_ids == {0: answer.response_token_ids[0]}

    def test_logprobs_and_usage_are_there_as_well(self, armed: RemoteOpenAIServer, engine: Engine) -> None:
        options = engine.asks(ANYTHING, logprobs=True, top_logprobs=1)
        streamed, answer = (ask(armed, **options) for ask in (chat_streamed, chat))
        chunks = [choice["logprobs"] for chunk in streamed.chunks for choice in chunk["choices"]]

        assert len(answer.choices[0].logprobs.content) == len(answer.response_token_ids[0]) == 24
        assert sum(len(chunk["content"]) for chunk in chunks if chunk) == len(streamed.token_ids[0]) == 24
        assert streamed.usage["prompt_tokens"] == len(streamed.prompt_token_ids[0])


def whole_call(server: RemoteOpenAIServer, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return an answer that is a whole call, and how it was asked for.

    The grammar of a forced call lets a model go on with white space until its tokens are used up, which is an error.
    """
    for seed in range(20):
        with suppress(BadRequestError):
            return options, chat(server, **options)
        options = {**options, "temperature": 1, "seed": seed}
    raise AssertionError("no call was ended within its tokens")


class TestTools:
    """The parser keeps text back, and what vLLM makes chunks of is not what the engine gives."""

    def test_tool_call_in_an_answer_has_its_ids(self, armed: RemoteOpenAIServer, engine: Engine) -> None:
        answer = chat(armed, tools=[TOOL], max_tokens=120, **engine.asks(TOOL_CALL))
        [call] = answer.choices[0].message.tool_calls

        assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
        assert answer.response_token_ids == [answer.choices[0].token_ids]
        assert answer.usage.completion_tokens == len(answer.response_token_ids[0])

    def test_tool_call_in_a_stream_has_its_ids(self, armed: RemoteOpenAIServer, engine: Engine) -> None:
        options = {"tools": [TOOL], "max_tokens": 120, **engine.asks(TOOL_CALL)}
        streamed, answer = (ask(armed, **options) for ask in (chat_streamed, chat))

        assert "tool_call>" not in streamed.text[0]
        assert streamed.token_ids == {0: answer.response_token_ids[0]}
        assert streamed.usage["completion_tokens"] == len(streamed.token_ids[0])

    @pytest.mark.parametrize(
        ("choice", "says"),
        [
            pytest.param(NAMED, ARGUMENTS, id="named"),
            pytest.param("required", CALLS, id="required", marks=pytest.mark.check(REQUIRED_STREAMED)),
        ],
    )
    def test_forced_tool_call_in_a_stream_has_its_ids(
        self, armed: RemoteOpenAIServer, engine: Engine, choice: Any, says: int
    ) -> None:
        options = {"tools": [TOOL], "max_tokens": 120, **engine.asks(says, tool_choice=choice)}
        options, answer = whole_call(armed, options)
        streamed = chat_streamed(armed, **options)

        assert streamed.tool_arguments[0]
        assert streamed.token_ids == {0: answer.response_token_ids[0]}
        assert streamed.usage["completion_tokens"] == len(streamed.token_ids[0])


class TestCompletions:
    def test_an_answer_has_the_ids_that_the_engine_was_given_and_gave(
        self, armed: RemoteOpenAIServer, engine: Engine
    ) -> None:
        answer = complete(armed, **engine.asks(ANYTHING))
        [choice] = answer.choices

        assert choice.prompt_token_ids == tokenize(armed, prompt=PROMPTS[0])
        assert answer.response_token_ids == [engine.says(ANYTHING, choice.prompt_token_ids, 12)]
        assert choice.token_ids == answer.response_token_ids[0]
        assert shows(choice.token_ids, choice.text)

    def test_joined_stream_has_the_ids_of_the_plain_answer(self, armed: RemoteOpenAIServer, engine: Engine) -> None:
        streamed, answer = (ask(armed, PROMPTS, **engine.asks(ANYTHING)) for ask in (complete_streamed, complete))

        assert streamed.token_ids == dict(enumerate(answer.response_token_ids))
        assert streamed.prompt_token_ids == {choice.index: choice.prompt_token_ids for choice in answer.choices}
        assert streamed.text == {choice.index: choice.text for choice in answer.choices}
        assert streamed.usage["completion_tokens"] == 24

    def test_answer_to_several_prompts_with_n_has_the_ids_of_each(
        self, armed: RemoteOpenAIServer, engine: Engine
    ) -> None:
        answer = complete(armed, PROMPTS, **engine.asks(ANYTHING, n=2, temperature=1))

        assert [choice.prompt_token_ids for choice in answer.choices] == [
            tokenize(armed, prompt=prompt) for prompt in PROMPTS for _ in range(2)
        ]
        assert answer.response_token_ids == [choice.token_ids for choice in answer.choices]
        for choice in answer.choices:
            assert choice.token_ids == (engine.draws(ANYTHING + choice.index % 2, 12) or choice.token_ids)
            assert shows(choice.token_ids, choice.text)

    @pytest.mark.check(N_STREAMED)
    def test_stream_for_several_prompts_with_n_has_the_ids_of_each(
        self, armed: RemoteOpenAIServer, engine: Engine
    ) -> None:
        streamed = complete_streamed(armed, PROMPTS, **engine.asks(ANYTHING, n=2, temperature=1))

        assert sorted(streamed.token_ids) == [0, 1, 2, 3]
        assert streamed.usage["completion_tokens"] == sum(map(len, streamed.token_ids.values())) == 48
        for index, token_ids in streamed.token_ids.items():
            assert streamed.prompt_token_ids[index] == tokenize(armed, prompt=PROMPTS[index // 2])
            assert token_ids == (engine.draws(ANYTHING + index % 2, 12) or token_ids)
            assert shows(token_ids, streamed.text[index])

    def test_the_ids_of_a_stop_string_are_there_and_its_text_is_not(
        self, armed: RemoteOpenAIServer, engine: Engine
    ) -> None:
        options = engine.asks(SENTENCE, stop=["four"], max_tokens=60)
        streamed, answer = (ask(armed, **options) for ask in (complete_streamed, complete))

        assert answer.choices[0].text == streamed.text[0] == "One two three "
        assert shows(answer.response_token_ids[0], "One two three four")
        assert streamed.token_ids == {0: answer.response_token_ids[0]}
