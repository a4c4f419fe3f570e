"""The record of a generation from every endpoint: exact ids, text, parameters, times, and its call."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest

from agentlightning.generation import Choice, Generation
from tests.common.answers import fetch, post, tokenize
from tests.common.reference import greedy, shows
from tests.instrumentation.vllm.test_completions import embedded
from tests.recording.server import RecordingServer, until

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BATCH, GENERATE, SCORING = "/v1/chat/completions/batch", "/inference/v1/generate", "/generative_scoring"
TALK: Any = [{"role": "user", "content": "What is the capital of France? 😀"}]
PROMPTS = ["The quick brown", "Größe 😀", "one two"]
IDS = {"return_token_ids": True}
MODES = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


def ids_of(generation: Generation) -> tuple[list[int], list[list[int]]]:
    """Return the ids of a generation's prompt and of its choices."""
    assert generation.prompt_token_ids is not None
    return generation.prompt_token_ids.tolist(), [choice_ids(choice) for choice in generation.choices]


def choice_ids(choice: Choice) -> list[int]:
    assert choice.token_ids is not None
    return choice.token_ids.tolist()


def answer_to(server: RecordingServer, rollout: str, path: str, body: dict[str, Any]) -> Any:
    return post(server, f"/rollout/{quote(rollout)}{path}", body)


class TestChat:
    @MODES
    @pytest.mark.parametrize("said", [{}, {"return_token_ids": False}, IDS], ids=["unsaid", "declined", "asked"])
    def test_a_chat_is_recorded_completely_with_and_without_ids_in_the_answer(
        self, recording: RecordingServer, rollout: str, said: dict[str, bool], stream: bool
    ) -> None:
        body = recording.body(messages=TALK, seed=7, **said, stream=stream, ignore_eos=True)
        answer = answer_to(recording, rollout, CHAT, body)
        [kept] = recording.recorded(rollout_id=rollout)

        prompt = tokenize(recording, messages=TALK)
        assert ids_of(kept) == (prompt, [greedy(prompt, 24)])
        [choice] = kept.choices
        first = answer[0] if stream else answer
        if stream:
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in answer)
        else:
            text = answer["choices"][0]["message"]["content"]
        assert (choice.index, choice.text, choice.finish_reason, choice.stop_reason) == (0, text, "length", None)
        assert kept.response_id == first["id"]
        assert (kept.endpoint, kept.model, kept.status) == (CHAT, recording.model, "finished")
        assert kept.started_at is not None
        assert kept.first_token_at is not None
        assert kept.started_at < kept.first_token_at <= kept.finished_at
        params = json.loads(str(kept.sampling_params))
        assert {"temperature": 0, "max_tokens": 24, "seed": 7, "ignore_eos": True}.items() <= params.items()
        assert choice.logprobs is None

    @MODES
    def test_n_is_one_generation_with_its_choices_in_order(
        self, recording: RecordingServer, rollout: str, stream: bool
    ) -> None:
        options = {"n": 4, "temperature": 1, "seed": 1, **IDS, "stream": stream}
        answer = answer_to(recording, rollout, CHAT, recording.body(messages=TALK, **options))
        [kept] = recording.recorded(rollout_id=rollout)

        said: dict[int, list[int]] = {}
        for chunk in answer if stream else [answer]:
            for choice in chunk["choices"]:
                said.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
        assert [choice.index for choice in kept.choices] == [0, 1, 2, 3]
        assert ids_of(kept) == (tokenize(recording, messages=TALK), [said[index] for index in range(4)])
        assert len({tuple(ids) for ids in said.values()}) == 4
        assert json.loads(str(kept.sampling_params))["n"] == 4

    @MODES
    def test_logprobs_that_a_client_asks_for_are_recorded_one_per_id(
        self, recording: RecordingServer, rollout: str, stream: bool
    ) -> None:
        body = recording.body(messages=TALK, logprobs=True, top_logprobs=3, stream=stream)
        answer = answer_to(recording, rollout, CHAT, body)
        [kept] = recording.recorded(rollout_id=rollout)

        chunks = [choice for each in (answer if stream else [answer]) for choice in each["choices"]]
        said = [each["logprob"] for choice in chunks for each in (choice.get("logprobs") or {}).get("content") or []]
        [choice] = kept.choices
        assert choice.logprobs is not None
        assert choice.logprobs.tolist() == said
        assert len(said) == len(choice_ids(choice))

    def test_prompt_ids_from_the_cache_are_counted(self, recording: RecordingServer, rollout: str) -> None:
        long = [{"role": "user", "content": f"{rollout} " + "word " * 100}]
        answers = [answer_to(recording, rollout, CHAT, recording.body(messages=long, max_tokens=1)) for _ in range(2)]
        kept = recording.recorded(rollout_id=rollout)

        details = [(answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0) for answer in answers]
        assert [each.cached_tokens for each in kept] == details
        assert details[1] > details[0]

    def test_a_refused_request_leaves_nothing(self, recording: RecordingServer, rollout: str) -> None:
        for options in ({"max_tokens": 100_000}, {"temperature": -1}, {"model": "another"}):
            with pytest.raises(OSError, match="40"):
                answer_to(recording, rollout, CHAT, recording.body(messages=TALK, **options))

        assert recording.recorded(rollout_id=rollout) == []


class TestCompletions:
    @MODES
    def test_each_prompt_is_a_generation_of_the_same_call(
        self, recording: RecordingServer, rollout: str, stream: bool
    ) -> None:
        options = {"prompt": PROMPTS, "n": 2, "temperature": 1, "stream": stream, **IDS}
        answer = answer_to(recording, rollout, COMPLETIONS, recording.body(**options))
        kept = recording.recorded(rollout_id=rollout)

        said: dict[int, list[int]] = {}
        for chunk in answer if stream else [answer]:
            for choice in chunk["choices"]:
                said.setdefault(choice["index"], []).extend(choice["token_ids"])
        by_prompt = {tuple(prompt): choices for prompt, choices in map(ids_of, kept)}
        assert by_prompt == {
            tuple(tokenize(recording, prompt=prompt)): [said[2 * number], said[2 * number + 1]]
            for number, prompt in enumerate(PROMPTS)
        }
        assert {each.prompt_text for each in kept} == set(PROMPTS)
        assert {each.response_id for each in kept} == {(answer[0] if stream else answer)["id"]}
        assert len({each.call_id for each in kept}) == 1
        assert len({each.request_id for each in kept}) == len(PROMPTS)

    @MODES
    @pytest.mark.parametrize("whole", [False, True], ids=["cut", "included"])
    def test_a_stop_string_is_recorded_as_the_reason_with_its_ids(
        self, recording: RecordingServer, rollout: str, stream: bool, whole: bool
    ) -> None:
        options = {"structured_outputs": {"choice": ["one two three four"]}, "stop": "thr"}
        options |= {"include_stop_str_in_output": whole, "stream": stream, **IDS}
        answer = answer_to(recording, rollout, COMPLETIONS, recording.body(prompt=PROMPTS[0], **options))
        [kept] = recording.recorded(rollout_id=rollout)

        choices = [choice for each in (answer if stream else [answer]) for choice in each["choices"]]
        [choice] = kept.choices
        assert (choice.finish_reason, choice.stop_reason, kept.status) == ("stop", "thr", "finished")
        assert choice.text == "".join(each["text"] for each in choices) == ("one two thr" if whole else "one two ")
        assert choice_ids(choice) == [token_id for each in choices for token_id in each["token_ids"]]
        assert shows(choice_ids(choice)[:-1], "one two thr"[: len(choice.text or "")]) or "thr" in decoded(choice)

    def test_a_stop_token_is_recorded_as_the_reason_with_its_id(self, recording: RecordingServer, rollout: str) -> None:
        prompt = tokenize(recording, prompt=PROMPTS[0])
        expected = greedy(prompt, 8)
        stop = expected[-1]
        answer_to(recording, rollout, COMPLETIONS, recording.body(prompt=prompt, stop_token_ids=[stop]))
        [kept] = recording.recorded(rollout_id=rollout)

        until_stop = expected[: expected.index(stop) + 1]
        assert ids_of(kept) == (prompt, [until_stop])
        assert (kept.choices[0].finish_reason, kept.choices[0].stop_reason) == ("stop", stop)

    def test_logprobs_that_a_client_asks_for_are_recorded(self, recording: RecordingServer, rollout: str) -> None:
        answer = answer_to(recording, rollout, COMPLETIONS, recording.body(prompt=PROMPTS, logprobs=2))
        kept = recording.recorded(rollout_id=rollout)

        said = [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
        assert sorted(each.choices[0].logprobs.tolist() for each in kept if each.choices[0].logprobs) == sorted(said)

    def test_an_echo_is_not_recorded_as_generated(self, recording: RecordingServer, rollout: str) -> None:
        answer = answer_to(recording, rollout, COMPLETIONS, recording.body(prompt=PROMPTS[0], echo=True, logprobs=1))
        [kept] = recording.recorded(rollout_id=rollout)

        prompt = tokenize(recording, prompt=PROMPTS[0])
        assert ids_of(kept) == (prompt, [greedy(prompt, 24)])
        assert PROMPTS[0] + str(kept.choices[0].text) == answer["choices"][0]["text"]
        assert kept.choices[0].logprobs is not None
        assert kept.choices[0].logprobs.tolist() == answer["choices"][0]["logprobs"]["token_logprobs"][len(prompt) :]

    def test_an_echo_alone_is_recorded_with_the_one_sampled_id(self, recording: RecordingServer, rollout: str) -> None:
        body = recording.body(prompt=PROMPTS[0], echo=True, max_tokens=0)
        answer = answer_to(recording, rollout, COMPLETIONS, body)
        [kept] = recording.recorded(rollout_id=rollout)

        prompt = tokenize(recording, prompt=PROMPTS[0])
        assert answer["choices"][0]["text"] == PROMPTS[0]
        assert ids_of(kept) == (prompt, [greedy(prompt, 1)])

    def test_a_prompt_of_embeddings_has_no_ids(self, recording: RecordingServer, rollout: str) -> None:
        body = {**recording.body(prompt_embeds=embedded(3)), **IDS}
        answer = answer_to(recording, rollout, COMPLETIONS, body)
        [kept] = recording.recorded(rollout_id=rollout)

        assert kept.prompt_token_ids is None
        assert [choice_ids(choice) for choice in kept.choices] == [answer["choices"][0]["token_ids"]]

    def test_a_prompt_with_embeddings_in_it_has_no_ids(self, recording: RecordingServer, rollout: str) -> None:
        parts = [{"type": "text", "text": "Say: "}, {"type": "prompt_embeds", "data": embedded(3)}]
        body = {**recording.body(messages=[{"role": "user", "content": parts}]), **IDS}
        answer = answer_to(recording, rollout, CHAT, body)
        [kept] = recording.recorded(rollout_id=rollout)

        assert kept.prompt_token_ids is None
        assert [choice_ids(choice) for choice in kept.choices] == [answer["choices"][0]["token_ids"]]

    def test_a_beam_search_is_recorded_with_every_engine_request(
        self, recording: RecordingServer, rollout: str
    ) -> None:
        def requests_of_the_engine() -> float:
            return sum(value for name, value in recording.metrics().items() if name.startswith(SUCCESSES))

        before = requests_of_the_engine()
        options = {"prompt": PROMPTS[0], "n": 3, "max_tokens": 5, "use_beam_search": True, **IDS}
        answer = answer_to(recording, rollout, COMPLETIONS, recording.body(**options))
        made = requests_of_the_engine() - before
        kept = recording.recorded(rollout_id=rollout)

        assert len(kept) == made > 5
        assert len({each.call_id for each in kept}) == 1
        assert {each.response_id for each in kept} == {answer["id"]}
        # Their ids go on behind the prompt, and vLLM's text of them does not.
        assert {each.prompt_text for each in kept} == {None}
        # What the beams went through: each of their ids is one that the engine was asked to go on from.
        prompts = [ids_of(each)[0] for each in kept]
        prompt = tokenize(recording, prompt=PROMPTS[0])
        for choice in answer["choices"]:
            for length in range(5):
                assert prompt + choice["token_ids"][:length] in prompts


SUCCESSES = "vllm:request_success_total"


def decoded(choice: Choice) -> str:
    from tests.common.reference import tokenizer

    return tokenizer().decode(choice_ids(choice), skip_special_tokens=True)


class TestResponses:
    @MODES
    def test_every_generation_of_a_tool_loop_belongs_to_the_call(
        self, recording: RecordingServer, rollout: str, stream: bool
    ) -> None:
        options = {"input": TALK[0]["content"], "max_output_tokens": 24, "temperature": 0, "stream": stream, **IDS}
        answer = answer_to(recording, rollout, RESPONSES, {"model": recording.model, **options})
        response = answer[-1]["response"] if stream else answer
        kept = recording.recorded(rollout_id=rollout)

        assert [ids_of(each) for each in kept] == [
            (each["prompt_token_ids"], [each["token_ids"]]) for each in response["generations"]
        ]
        assert len(kept) == 2
        assert len({each.call_id for each in kept}) == 1
        assert {each.response_id for each in kept} == {response["id"]}
        assert {each.endpoint for each in kept} == {RESPONSES}

    def test_a_background_response_is_recorded(self, recording: RecordingServer, rollout: str) -> None:
        options = {"input": "one", "max_output_tokens": 4, "background": True, "store": True}
        queued = answer_to(recording, rollout, RESPONSES, {"model": recording.model, **options})
        until(lambda: fetch(recording, f"{RESPONSES}/{queued['id']}")["status"] == "incomplete", "the response")
        kept = recording.recorded(rollout_id=rollout)

        assert [(each.response_id, each.model) for each in kept] == [(queued["id"], recording.model)] * 2


class TestOthers:
    @MODES
    def test_messages_are_recorded(self, recording: RecordingServer, rollout: str, stream: bool) -> None:
        answer = answer_to(recording, rollout, MESSAGES, recording.body(messages=TALK, stream=stream))
        [kept] = recording.recorded(rollout_id=rollout)

        prompt = tokenize(recording, messages=TALK)
        assert ids_of(kept) == (prompt, [greedy(prompt, 24)])
        assert kept.response_id == (answer[0]["message"] if stream else answer)["id"]
        assert (kept.endpoint, kept.model) == (MESSAGES, recording.model)

    def test_each_conversation_of_a_batch_is_recorded(self, recording: RecordingServer, rollout: str) -> None:
        conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        answer = answer_to(recording, rollout, BATCH, recording.body(messages=conversations))
        kept = recording.recorded(rollout_id=rollout)

        prompts = [tokenize(recording, messages=conversation) for conversation in conversations]
        assert sorted(map(ids_of, kept)) == sorted((prompt, [greedy(prompt, 24)]) for prompt in prompts)
        assert {each.response_id for each in kept} == {answer["id"]}
        assert {each.endpoint for each in kept} == {BATCH}
        assert len({each.call_id for each in kept}) == 1

    @MODES
    def test_generate_is_recorded(self, recording: RecordingServer, rollout: str, stream: bool) -> None:
        prompt = [1, 87, 85, 275, 201]
        body = {"token_ids": prompt, "sampling_params": {"max_tokens": 6, "temperature": 0}, "stream": stream}
        answer = answer_to(recording, rollout, GENERATE, body)
        [kept] = recording.recorded(rollout_id=rollout)

        assert ids_of(kept) == (prompt, [greedy(prompt, 6)])
        assert kept.response_id == (answer[0] if stream else answer)["request_id"]
        assert kept.endpoint == GENERATE

    @pytest.mark.parametrize("named", [True, False], ids=["with a model", "without one"])
    @pytest.mark.parametrize("headers", [{}, {"X-Request-Id": "0"}], ids=["an id of vLLM", "an id of the client"])
    def test_generative_scoring_is_recorded(
        self, recording: RecordingServer, rollout: str, named: bool, headers: dict[str, str]
    ) -> None:
        items = [[201, 85], [309, 33, 2]]
        body = {"query": [1, 87], "items": items, "label_token_ids": [5, 6]}
        body |= {"model": recording.model} if named else {}
        answer = post(recording, f"/rollout/{quote(rollout)}{SCORING}", body, headers)
        kept = recording.recorded(rollout_id=rollout)

        assert sorted(ids_of(each)[0] for each in kept) == sorted([1, 87, *item] for item in items)
        assert {(each.endpoint, each.model, each.response_id) for each in kept} == {
            (SCORING, recording.model, answer["id"])
        }
        assert len({each.call_id for each in kept}) == 1

    def test_a_chat_that_names_no_model_has_the_servers(self, recording: RecordingServer, rollout: str) -> None:
        answer = answer_to(recording, rollout, CHAT, {"messages": TALK, "max_tokens": 1})
        [kept] = recording.recorded(rollout_id=rollout)

        assert kept.model == answer["model"] == recording.model

    def test_requests_that_generate_nothing_leave_nothing(self, recording: RecordingServer) -> None:
        before = {each.id for each in recording.recorded()}
        tokens = tokenize(recording, messages=TALK)
        post(recording, "/detokenize", {"model": recording.model, "tokens": tokens})
        fetch(recording, "/v1/models")
        # Of a model that generates there are no embeddings.
        with pytest.raises(OSError, match="40"):
            post(recording, "/v1/embeddings", {"model": recording.model, "input": "one"})

        # Those that were asked for to see the others.
        assert {each.prompt_text for each in recording.recorded() if each.id not in before} == {"last"}
