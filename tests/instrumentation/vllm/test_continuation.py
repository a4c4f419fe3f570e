"""Prompts that go on from exact ids, on vLLM's own renderer, in processes that are forked for each test."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest
from vllm.parser import ParserManager
from vllm.renderers.base import BaseRenderer
from vllm.renderers.online_renderer import OnlineRenderer

from agentlightning import continuation as decisions
from agentlightning import instrumentation
from agentlightning.instrumentation.vllm import _isolation, continuation
from agentlightning.instrumentation.vllm.continuation import kept
from agentlightning.instrumentation.vllm.continuation.chats import RenderedChat
from tests.common.rendering import answered, online_renderer, prompt_of
from tests.common.templates import CHATML, QWEN3, TEMPLATES, TOOLS_LAST

pytestmark = pytest.mark.forked

USER = {"role": "user", "content": "Paris?"}
MORE = {"role": "user", "content": "More?"}


def methods() -> list[Callable[..., Any]]:
    return [OnlineRenderer.preprocess_chat, BaseRenderer.render_chat_async, BaseRenderer.tokenize_prompts_async]


VLLMS_OWN = methods()


@pytest.fixture
def continuing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGL_CONTINUE", "on")
    instrumentation.instrument_vllm()
    assert continuation.report() is not None


def test_while_it_is_off_nothing_is_patched() -> None:
    instrumentation.instrument_vllm()

    assert methods() == VLLMS_OWN
    assert continuation.report() is None


@pytest.mark.usefixtures("continuing")
def test_uninstrumenting_puts_everything_back_and_forgets_all_calls() -> None:
    assert not set(methods()) & set(VLLMS_OWN)
    two_turns(CHATML)
    assert results()["calls"] == 1

    instrumentation.uninstrument_vllm()

    assert methods() == VLLMS_OWN
    assert results()["calls"] == 0


def results() -> dict[str, Any]:
    found = continuation.report()
    assert found is not None
    return found


def two_turns(template: str, text: str = "The quick fox. ", **options: Any) -> tuple[list[int], list[int]]:
    """Ask, and ask again after an answer that no tokenizer would make; return what was read first, and then."""
    renderer = online_renderer(template, **options)
    tokenizer = renderer.renderer.get_tokenizer()
    said = [tokenizer.encode(character)[0] for character in text]

    async def turns() -> tuple[list[int], list[int]]:
        prompt, context = await prompt_of(renderer, [USER], "ro-1")
        answered(prompt, context, [*said, tokenizer.eos_token_id], text, tokenizer.eos_token_id)
        messages = [USER, {"role": "assistant", "content": text}, MORE]
        again, _ = await prompt_of(renderer, messages, "ro-1")
        return [*prompt, *said, tokenizer.eos_token_id], again

    return asyncio.run(turns())


@pytest.mark.usefixtures("continuing")
def test_a_prompt_goes_on() -> None:
    context, prompt = two_turns(CHATML)

    assert prompt[: len(context)] == context
    assert results()["results"][decisions.CONTINUED] == 1
    assert not _isolation.failures


def after(said: str, text: str, *stops: str, shown: str | None = None, **finished: Any) -> tuple[str, bool]:
    """Answer with these tokens, of which the client has this text; return what the next prompt came to.

    Args:
        shown: the text that the client sends back, where that is another.
        stops: the tokens that end an answer, beside that of the model.
        finished: how it has finished.
    """
    renderer = online_renderer(CHATML)
    tokenizer = renderer.renderer.get_tokenizer()
    ids = tokenizer.encode(said)
    ends = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(stop) for stop in stops)]
    before = results()["results"]

    async def turns() -> tuple[str, bool]:
        prompt, context = await prompt_of(renderer, [USER], "ro-1")
        answered(prompt, context, ids, text, *ends, **finished)
        answer = {"role": "assistant", "content": text if shown is None else shown}
        again, _ = await prompt_of(renderer, [USER, answer, MORE], "ro-1")
        grown = [result for result, count in results()["results"].items() if count > before[result]]
        [result] = [result for result in grown if result != decisions.FIRST_CALL]
        return result, again[: len(prompt) + len(ids)] == [*prompt, *ids]

    return asyncio.run(turns())


@pytest.mark.usefixtures("continuing")
@pytest.mark.parametrize("stop", ["u", "M", "<|im_start|>"])
def test_a_token_at_which_a_client_stops_is_not_the_end_of_a_turn(stop: str) -> None:
    """The template has it further on, behind the end of the turn, as the first of what the user says."""
    assert after(f"It is.{stop}", "It is.", stop) == (decisions.SEAM, False)


@pytest.mark.usefixtures("continuing")
@pytest.mark.parametrize(("told", "kept", "goes_on"), [(False, False, False), (False, True, True), (True, True, True)])
def test_a_stop_string_does_not_come_back_in_a_prompt_unless_its_client_has_it(
    told: bool, kept: bool, goes_on: bool
) -> None:
    """Add the stop string again, as smolagents does, which is not told of it."""
    said, stop = "Act: look\n", "Observation:"
    for added in ("", " a fox."):
        result = after(
            said + stop,
            said + stop if told else said,
            shown=(said + stop if kept else said) + added,
            stop_string=stop,
            includes_stop_string=told,
        )

        assert result == ((decisions.CONTINUED, True) if goes_on else (decisions.NO_MATCH, False))


@pytest.mark.usefixtures("continuing")
def test_what_a_client_adds_behind_its_stop_string_is_read_behind_the_models_own_ids() -> None:
    renderer = online_renderer(CHATML)
    tokenizer = renderer.renderer.get_tokenizer()
    said, added = "Act: look\nObservation:", "\nCalling tools: []"
    # Byte by byte, as no tokenizer would do it.
    ids = [tokenizer.encode(each)[0] for each in said]

    async def turns() -> tuple[list[int], str]:
        prompt, context = await prompt_of(renderer, [USER], "ro-1")
        answered(prompt, context, ids, said[:-12], tokenizer.eos_token_id, stop_string="Observation:")
        messages = [USER, {"role": "assistant", "content": said + added}, MORE]
        again, _ = await prompt_of(renderer, messages, "ro-1")
        own, _ = await prompt_of(renderer, messages, None)
        assert again[: len(prompt) + len(ids)] == [*prompt, *ids]
        return again, tokenizer.decode(own)

    prompt, own = asyncio.run(turns())

    assert tokenizer.decode(prompt) == own


@pytest.mark.usefixtures("continuing")
def test_a_tokenizer_that_begins_each_text_with_a_space_adds_nothing_to_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenise = RenderedChat.tokenise

    async def with_a_space(chat: RenderedChat, text: str, **options: bool) -> list[int]:
        return await tokenise(chat, text if text.startswith("<|") else f" {text}", **options)

    monkeypatch.setattr(RenderedChat, "tokenise", with_a_space)
    said = "Act: look\nObservation:"

    assert after(said, said[:-12], shown=f"{said} a fox.", stop_string="Observation:")[0] == decisions.SEAM


@pytest.mark.usefixtures("continuing")
def test_a_call_with_other_tools_is_told_from_one_with_other_messages() -> None:
    renderer = online_renderer(CHATML)
    tokenizer = renderer.renderer.get_tokenizer()
    said = [*tokenizer.encode("It is."), tokenizer.eos_token_id]

    async def turns() -> None:
        prompt, context = await prompt_of(renderer, [USER], "ro-1")
        answered(prompt, context, said, "It is.", tokenizer.eos_token_id)
        renderer.chat_template = f"{CHATML} "
        for question in (USER, MORE):
            await prompt_of(renderer, [question, {"role": "assistant", "content": "It is."}, MORE], "ro-1")

    asyncio.run(turns())

    found = {result: count for result, count in results()["results"].items() if count}
    assert found == {decisions.FIRST_CALL: 1, decisions.OTHER_OPTIONS: 1, decisions.NO_MATCH: 1}


@pytest.mark.usefixtures("continuing")
def test_an_answer_that_goes_on_behind_the_end_of_a_turn_is_not_continued() -> None:
    assert after("It is.<|im_end|> No!", "It is. No!", finish_reason="length") == (decisions.ELSEWHERE, False)


@pytest.mark.usefixtures("continuing")
@pytest.mark.parametrize(
    ("reasoning_parser", "result"), [("qwen3", decisions.CONTINUED), ("deepseek_r1", decisions.PARSER)]
)
def test_a_parser_that_would_take_earlier_reasoning_for_that_of_the_answer_has_vllms_own_prompt(
    reasoning_parser: str, result: str
) -> None:
    renderer = online_renderer(QWEN3)
    tokenizer = renderer.renderer.get_tokenizer()
    renderer.parser = ParserManager.get_parser(reasoning_parser_name=reasoning_parser, tokenizer=tokenizer)
    text = "<think>\nHm.\n</think>\n\nIt is."
    said = [*tokenizer.encode(text), tokenizer.eos_token_id]
    sunny = {"role": "tool", "content": "sunny", "tool_call_id": "call-1"}

    async def turns() -> tuple[list[int], list[int]]:
        prompt, context = await prompt_of(renderer, [USER], "ro-1")
        answered(prompt, context, said, text, tokenizer.eos_token_id)
        again, _ = await prompt_of(renderer, [USER, {"role": "assistant", "content": "It is."}, sunny], "ro-1")
        return [*prompt, *said], again

    context, prompt = asyncio.run(turns())

    assert results()["results"][result] == 1
    assert (prompt[: len(context)] == context) is (result == decisions.CONTINUED)
    assert not _isolation.failures


@pytest.mark.usefixtures("continuing")
def test_a_thought_that_an_answer_repeats_is_left_out_by_a_template_all_the_same() -> None:
    renderer = online_renderer(CHATML)
    tokenizer = renderer.renderer.get_tokenizer()
    renderer.parser = ParserManager.get_parser(reasoning_parser_name="qwen3", tokenizer=tokenizer)
    text = "<think>\nIt is.\n</think>\n\nIt is."

    async def turns() -> None:
        prompt, context = await prompt_of(renderer, [USER], "ro-1")
        said = [*tokenizer.encode(text), tokenizer.eos_token_id]
        answered(prompt, context, said, text, tokenizer.eos_token_id)
        await prompt_of(renderer, [USER, {"role": "assistant", "content": "It is."}, MORE], "ro-1")

    asyncio.run(turns())

    assert results()["results"][decisions.REASONING_DROPPED] == 1


@pytest.mark.usefixtures("continuing")
def test_answers_are_parsed_with_all_ids_of_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = online_renderer(QWEN3)
    tokenizer = renderer.renderer.get_tokenizer()
    renderer.parser = ParserManager.get_parser(reasoning_parser_name="qwen3", tokenizer=tokenizer)
    parsed: list[list[int]] = []
    monkeypatch.setattr(
        renderer.parser, "set_prompt_token_ids", lambda self, prompt_token_ids: parsed.append(prompt_token_ids)
    )
    said = [*tokenizer.encode("It is."), tokenizer.eos_token_id]

    async def turns() -> list[list[int]]:
        prompts: list[list[int]] = []
        messages: list[Any] = [USER]
        for _ in range(3):
            prompt, context = await prompt_of(renderer, messages, "ro-1")
            answered(prompt, context, said, "It is.", tokenizer.eos_token_id)
            prompts.append(prompt)
            messages += [{"role": "assistant", "content": "It is."}, MORE]
        return prompts

    first, second, _ = asyncio.run(turns())

    assert second[: len(first) + len(said)] == [*first, *said]
    assert parsed == [first, second]


@pytest.mark.usefixtures("continuing")
@pytest.mark.parametrize("name", ["agent_id", "carrier_agent_id"])
def test_agents_of_one_rollout_do_not_mix_whether_a_header_or_their_key_names_them(name: str) -> None:
    renderer = online_renderer(CHATML)
    tokenizer = renderer.renderer.get_tokenizer()
    said = [tokenizer.encode(character)[0] for character in "The quick"]
    messages = [USER, {"role": "assistant", "content": "The quick"}, MORE]

    async def goes_on() -> list[bool]:
        prompt, context = await prompt_of(renderer, [USER], "ro-1", **{name: "one"})
        answered(prompt, context, [*said, tokenizer.eos_token_id], "The quick", tokenizer.eos_token_id)
        prompts = [(await prompt_of(renderer, messages, "ro-1", **{name: agent}))[0] for agent in ("one", "other")]
        return [again[: len(prompt) + len(said)] == [*prompt, *said] for again in prompts]

    assert asyncio.run(goes_on()) == [True, False]


@pytest.mark.usefixtures("continuing")
def test_texts_are_counted_with_the_bytes_that_they_take() -> None:
    sizes: list[int] = []
    for text in ("a" * 90, "日" * 90):
        continuation.forget()
        after("It is.", text, finish_reason="length")
        sizes.append(results()["bytes"])

    # Python has two bytes for each of these characters; the text is kept as it is, and as two parsers may read it.
    assert sizes[1] - sizes[0] >= 3 * 90


@pytest.mark.usefixtures("continuing")
def test_ids_that_leave_no_place_for_an_answer_are_vllms_own() -> None:
    text = "The quick fox. " * 4

    def prompt_within(length: int) -> int:
        continuation.forget()
        return len(two_turns(CHATML, text, length=length)[1])

    exact = prompt_within(1000)
    # vLLM would refuse the exact ids where they leave no place for an answer; as a text, they are fewer.
    assert prompt_within(exact + 1) == exact
    assert prompt_within(exact) < exact
    assert results()["results"][decisions.TOO_LONG] == 1


@pytest.mark.usefixtures("continuing")
def test_a_new_message_that_vllm_refuses_as_too_long_is_no_failure() -> None:
    renderer = online_renderer(CHATML, length=200)
    tokenizer = renderer.renderer.get_tokenizer()

    async def turns() -> None:
        prompt, context = await prompt_of(renderer, [USER], "ro-1")
        answered(
            prompt, context, [*tokenizer.encode("It is."), tokenizer.eos_token_id], "It is.", tokenizer.eos_token_id
        )
        long = {"role": "user", "content": "Paris? " * 1000}
        with pytest.raises(Exception, match="maximum context length"):
            await prompt_of(renderer, [USER, {"role": "assistant", "content": "It is."}, long], "ro-1")

    asyncio.run(turns())

    assert results()["results"][decisions.TOO_LONG] == 1
    assert not _isolation.failures


@pytest.mark.parametrize("template", [*TEMPLATES.values(), TOOLS_LAST], ids=[*TEMPLATES, "tools last"])
def test_prompts_that_are_only_counted_come_to_the_same_and_take_no_more_memory_than_those_that_go_on(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}
    for mode in ("on", "report"):
        monkeypatch.setenv("AGL_CONTINUE", mode)
        instrumentation.instrument_vllm()
        before = results()["results"]
        asyncio.run(conversation(template, 20))
        counted = {result: count - before[result] for result, count in results()["results"].items()}
        found[mode] = counted, results()["bytes"]
        instrumentation.uninstrument_vllm()

    assert found["report"] == found["on"]


def test_a_prompt_that_is_only_counted_is_neither_rendered_nor_tokenised_again_but_for_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AGL_CONTINUE", "report")
    instrumentation.instrument_vllm()
    again: list[str] = []
    render, tokenise = RenderedChat.render, RenderedChat.tokenise
    monkeypatch.setattr(
        RenderedChat, "render", lambda *args, **kwargs: again.append("render") or render(*args, **kwargs)
    )
    monkeypatch.setattr(RenderedChat, "tokenise", lambda *args, **kw: again.append("tokenise") or tokenise(*args, **kw))

    asyncio.run(conversation(CHATML, 20))

    assert again == ["render", "tokenise"]
    assert results()["results"][decisions.CONTINUED] == 19


async def conversation(template: str, turns: int) -> None:
    renderer = online_renderer(template)
    tokenizer = renderer.renderer.get_tokenizer()
    said = [*(tokenizer.encode(character)[0] for character in "The quick"), tokenizer.eos_token_id]
    messages: list[Any] = [{"role": "system", "content": "Be brief. " * 100}, USER]
    for _ in range(turns):
        prompt, context = await prompt_of(renderer, messages, "ro-1")
        answered(prompt, context, said, "The quick", tokenizer.eos_token_id)
        messages += [{"role": "assistant", "content": "The quick"}, MORE]


@pytest.mark.usefixtures("continuing")
def test_a_template_that_refuses_what_stands_in_for_a_message_has_vllms_own_prompt() -> None:
    refuses = "{% if messages[-1].content in '?!' %}{{ raise_exception('no') }}{% endif %}"
    context, prompt = two_turns(refuses + CHATML)

    assert prompt[: len(context)] != context
    assert results()["results"][decisions.NOT_APPEND_ONLY] == 1
    assert not _isolation.failures


@pytest.mark.usefixtures("continuing")
def test_an_error_of_ours_leaves_vllms_own_prompt_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "find_seam", lambda *_: 1 / 0)
    context, prompt = two_turns(CHATML)

    assert prompt[: len(context)] != context
    assert sum(_isolation.failures.values()) == 1


@pytest.mark.usefixtures("continuing")
def test_a_template_of_ids_goes_on_too() -> None:
    """A tokenizer like those of mistral_common; here it is that of a server that takes embeddings in prompts."""
    context, prompt = two_turns(CHATML, enable_prompt_embeds=True)

    assert prompt[: len(context)] == context
    assert results()["results"][decisions.CONTINUED] == 1


@pytest.mark.usefixtures("continuing")
def test_many_calls_of_many_rollouts_stay_within_the_bound_and_aborted_ones_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, thorough: bool
) -> None:
    limit = 100_000
    monkeypatch.setattr(kept, "_histories", decisions.Histories(limit))
    count = 10_000 if thorough else 300
    renderer = online_renderer(CHATML)

    async def calls() -> None:
        for number in range(count):
            messages = [USER, {"role": "assistant", "content": "a"}, MORE] if number % 5 else [USER]
            prompt, context = await prompt_of(renderer, messages, f"ro-{number // 5}")
            # Every third is aborted: its answer is never noted.
            if number % 3:
                end = renderer.renderer.get_tokenizer().eos_token_id
                answered(prompt, context, [67, end], "a", end)
            assert results()["bytes"] <= limit

    asyncio.run(calls())
    gc.collect()

    assert results()["dropped"] > count // 10
    calls = results()["calls"]
    assert sum(isinstance(each, decisions.Call) for each in gc.get_objects()) == calls
    # The last request's own, which its context keeps.
    assert sum(type(each).__name__ == "Turn" for each in gc.get_objects()) <= 1
    assert not _isolation.failures
