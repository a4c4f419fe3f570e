"""Breaks made by hand: pairs of calls of which the cause is known, since the generator has made it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentlightning.drift import Cause
from tests.drift.templates import Message, Template, Tools

__all__ = ["MAKERS", "Made", "make"]

SUBJECTS = (
    "the weather in Paris",
    "a train to Oslo",
    "the sum of two primes",
    "größere Zahlen",
    "a file in /tmp",
    "北京",
)
VERBS = ("Tell me about", "Please look up", "I would like to know more about", "Explain, in two sentences,")
SENTENCES = (
    "It is warm today, and it will stay so for the rest of the week.",
    "I do not know that yet; let me see what the tool says about it.",
    "The answer is 42, which is neither a prime nor a square.",
    "There are three trains in the morning and one late at night.",
    "Größe und Gewicht sind bekannt. The rest is not.",
    "First, list the files; then read the longest one.",
)
SYSTEMS = (
    "You are a careful assistant. Use tools where they help, and answer in English.",
    "You are a coding agent. Work step by step, and never guess the content of a file.",
    "You write short titles for conversations. Answer with the title alone.",
    "You search documents for other agents, and report what you find with its source.",
)
CITIES = ("Paris", "Oslo", "Łódź", "São Paulo")


@dataclass(frozen=True)
class Made:
    """A call and the prompt after it.

    Attributes:
        before: ids of the call's prompt and answer.
        answer_start: where its answer begins.
    """

    cause: Cause
    before: Sequence[int]
    answer_start: int
    prompt: Sequence[int]


@dataclass
class Story:
    """A conversation, up to a question that a model answers, and what comes after the answer."""

    template: Template
    draw: random.Random
    messages: list[Message] = field(default_factory=list[Message])
    tools: Tools = ()
    answer: Message = field(default_factory=dict[str, Any])
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def begin(self) -> list[int]:
        return self.template.prompt(self.messages, self.tools, **self.options)

    def after(self, answer: Message | None = None) -> list[Message]:
        """Return the messages of the next call."""
        said = self.answer if answer is None else answer
        follows = (
            {"role": "tool", "content": f"result {self.draw.randint(1, 999)}"}
            if said["tool_calls"]
            else {"role": "user", "content": self.question()}
        )
        return [*self.messages, said, follows]

    def made(
        self, cause: Cause, answer: Sequence[int], messages: Sequence[Message], tools: Tools | None = None
    ) -> Made:
        begin = self.begin()
        tools = self.tools if tools is None else tools
        return Made(cause, [*begin, *answer], len(begin), self.template.prompt(messages, tools, **self.options))

    def question(self) -> str:
        return f"{self.draw.choice(VERBS)} {self.draw.choice(SUBJECTS)} ({self.draw.randint(1, 9999)})."


def story(template: Template, draw: random.Random, *, calls: bool | None = None, turns: int | None = None) -> Story:
    """Make up a conversation.

    Args:
        calls: whether its answer is a tool call; None for either.
        turns: number of earlier answers; None for none to three.
    """
    made = Story(template, draw)
    made.messages.append({"role": "system", "content": draw.choice(SYSTEMS[:2])})
    # Mistral's tools stand before the last question, so they move with each new one.
    has_calls = draw.random() < 0.5 if calls is None else calls
    if has_calls:
        made.tools = [tool(draw, number) for number in range(draw.randint(1, 3))]
    for _ in range(draw.randint(0, 3) if turns is None else turns):
        said = say(made, with_call=False)
        said["reasoning"] = ""
        made.messages += [{"role": "user", "content": made.question()}, said]
    made.messages.append({"role": "user", "content": made.question()})
    made.answer = say(made, with_call=has_calls)
    return made


def say(made: Story, *, with_call: bool) -> Message:
    draw = made.draw
    content = " ".join(draw.sample(SENTENCES, draw.randint(1, 3)))
    said: Message = {"role": "assistant", "content": content, "tool_calls": [], "reasoning": ""}
    if with_call:
        arguments = {"city": draw.choice(CITIES), "days": draw.randint(1, 9), "note": draw.choice(SUBJECTS)}
        said["tool_calls"] = [{"name": made.tools[0]["function"]["name"], "arguments": arguments}]
        if draw.random() < 0.5 or made.template.stop != "<|im_end|>":
            said["content"] = ""
    return said


def tool(draw: random.Random, number: int) -> dict[str, Any]:
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}, "note": {"type": "string"}}
    about = {"name": f"tool_{number}", "description": draw.choice(SENTENCES)}
    return {"function": {**about, "parameters": {"type": "object", "properties": properties}}}


def retokenised(template: Template, draw: random.Random) -> Made:
    made = story(template, draw)
    return made.made("retokenised", template.retokenised(template.answer(made.answer), draw), made.after())


def reasoning(template: Template, draw: random.Random) -> Made:
    made = story(template, draw, calls=False)
    thoughts = " ".join(draw.sample(SENTENCES, draw.randint(1, 4)))
    thinks = {**made.answer, "reasoning": thoughts}
    if template.name == "mistral":
        opened, closed = template.encode("<think>\n"), template.encode("\n</think>\n")
        answer = [*opened, *template.encode(thoughts), *closed, *template.answer(made.answer)]
    else:
        answer = template.answer(thinks)
    # Where the template renders it at all, the agent does not send it back.
    return made.made(
        "reasoning", answer, made.after(made.answer if draw.random() < 0.5 or not template.thinks else thinks)
    )


def tool_call(template: Template, draw: random.Random) -> Made:
    made = story(template, draw, calls=True)
    [call] = made.answer["tool_calls"]
    shuffled = dict(draw.sample([*call["arguments"].items()], len(call["arguments"])))
    ways: list[tuple[Any, dict[str, Any]]] = [
        (call["arguments"], {"separators": (",", ":"), "ensure_ascii": False}),
        (call["arguments"], {"indent": 2, "ensure_ascii": False}),
        (call["arguments"] | {"note": "größer"}, {"ensure_ascii": True}),
        (dict(reversed([*shuffled.items()])) if shuffled == call["arguments"] else shuffled, {"ensure_ascii": False}),
    ]
    arguments, how = draw.choice(ways)
    sent = {**made.answer, "tool_calls": [{**call, "arguments": dict(sorted(arguments.items(), key=_place(call)))}]}
    key = "parameters" if template.name == "llama 3" else "arguments"
    more = {"id": "abcdefghi"} if template.name == "mistral" else {}
    written: Any = {"name": call["name"], key: arguments, **more}
    text = json.dumps([written] if template.name == "mistral" else written, **how)
    if template.name == "mistral":
        answer = [template.id_of("[TOOL_CALLS]"), *template.encode(text), template.id_of(template.stop)]
    else:
        if template.name != "llama 3":
            blank = draw.choice(("\n", "\n\n", " ")) if made.answer["content"] else ""
            text = f"{made.answer['content']}{blank}<tool_call>\n{text}\n</tool_call>"
        answer = [*template.encode(text), template.id_of(template.stop)]
    return made.made("tool_call", answer, made.after(sent))


def _place(call: Any) -> Callable[[tuple[str, Any]], int]:
    return lambda item: [*call["arguments"]].index(item[0])


def template(template: Template, draw: random.Random) -> Made:
    """Render a history with a special token more, fewer, or another than the prompt had."""
    made = story(template, draw)
    found = made.made("template", template.answer(made.answer), made.after())
    prompt, special = list(found.prompt), template.texts.special
    # In front: that of an answer would be its stop token.
    at = draw.choice([at for at, each in enumerate(prompt) if each in special][:3])
    how = draw.randrange(3)
    if how == 0:
        del prompt[at]
    elif how == 1:
        prompt[at] = template.id_of(template.other_stop)
    else:
        prompt.insert(at, template.id_of(template.other_stop))
    return Made("template", found.before, found.answer_start, prompt)


def answer_end(template: Template, draw: random.Random) -> Made:
    made = story(template, draw, calls=False)
    text = made.answer["content"]
    stop = template.id_of(template.stop)
    how = draw.randrange(4)
    if how == 0:
        # As agents stop that read actions from text.
        answer = template.encode(text + draw.choice(("\nObservation:", "\n\nHuman:", " STOP")))
    elif how == 3:
        answer = [*template.encode(text + draw.choice((" ", "\n", "\n\n", " \n"))), stop]
    elif how == 1:
        answer = [*template.encode(text), template.id_of(template.other_stop)]
    else:
        answer = [*template.encode(draw.choice(("\n", "\n\n", " ")) + text), stop]
    return made.made("answer_end", answer, made.after())


def header(template: Template, draw: random.Random) -> Made:
    made = story(template, draw, calls=False)
    system = made.messages[0]["content"]
    forms = ("Time: 10:{:02}:00.\n", "x-billing: cc_version=2.1; cch={:05x};\n", "Call {} of this session.\n")
    form = draw.choice(forms)
    numbers = draw.sample(range(60), 2)
    before, after = (form.format(each) + system for each in numbers)
    if draw.random() < 0.4:
        before, after = (f"{system}\n{form.format(each)}" for each in numbers)
    made.messages[0] = {"role": "system", "content": before}
    found = made.made("header", template.answer(made.answer), made.after())
    made.messages[0] = {"role": "system", "content": after}
    return Made("header", found.before, found.answer_start, template.prompt(made.after(), made.tools))


def tools(template: Template, draw: random.Random) -> Made:
    made = story(template, draw, calls=True)
    others = [*made.tools]
    how = draw.randrange(3)
    if how == 0:
        others.append(tool(draw, 7))
    elif how == 1:
        others = [tool(draw, 8), *others]
    else:
        others[0] = json.loads(json.dumps(others[0]).replace('"city"', '"town"'))
    return made.made("tools", template.answer(made.answer), made.after(), others)


def compaction(template: Template, draw: random.Random) -> Made:
    made = story(template, draw, calls=False, turns=draw.randint(3, 6))
    answer = template.answer(made.answer)
    if draw.random() < 0.5:
        about = f"Summary of the conversation so far: {draw.choice(SENTENCES)} Go on from there."
        messages = [made.messages[0], {"role": "user", "content": about}]
    else:
        # The oldest messages are left out.
        messages = [made.messages[0], *made.after()[-5 if len(made.messages) > 5 else -3 :]]
        messages = [messages[0], *messages[1 + (messages[1]["role"] != "user") :]]
    return made.made("compaction", answer, messages)


def sub_agent(template: Template, draw: random.Random) -> Made:
    made = story(template, draw)
    # A conversation of its own may well have the same system prompt, and a question of one form.
    system = made.messages[0]["content"] if draw.random() < 0.5 else draw.choice(SYSTEMS[2:])
    question = f"{made.messages[1]['content']}." if draw.random() < 0.5 else made.question()
    asked = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    if draw.random() < 0.3:
        # Longer than the other, as one with examples in front is.
        other = {**say(made, with_call=False), "content": f"No. {draw.choice(SENTENCES)}"}
        asked += [other, {"role": "user", "content": made.question()}]
    return made.made("sub_agent", template.answer(made.answer), asked, ())


def retry(template: Template, draw: random.Random) -> Made:
    made = story(template, draw)
    return made.made("retry", template.answer(made.answer), made.messages)


def foreign(template: Template, draw: random.Random) -> Made:
    made = story(template, draw, calls=False)
    said = made.answer["content"]
    others = [each for each in SENTENCES if each not in said]
    if draw.random() < 0.7:
        other = " ".join(draw.sample(others, min(2, len(others))))
    else:
        other = said.replace("the", "a", 1).replace("is", "was", 1).replace("in", "at", 1)
    return made.made("foreign", template.answer(made.answer), made.after({**made.answer, "content": other}))


def other(template: Template, draw: random.Random) -> Made:
    """Edit an earlier question, or the result of a tool, as agents do that clear old results."""
    made = story(template, draw, calls=False, turns=draw.randint(2, 4))
    messages = [dict(each) for each in made.after()]
    changed = messages[draw.choice([at for at, each in enumerate(messages[:-2]) if each["role"] == "user"][1:])]
    changed["content"] = "[cleared]" if draw.random() < 0.5 else made.question()
    return made.made("other", template.answer(made.answer), messages)


MAKERS: dict[Cause, Callable[[Template, random.Random], Made]] = {
    "retokenised": retokenised,
    "reasoning": reasoning,
    "tool_call": tool_call,
    "template": template,
    "answer_end": answer_end,
    "header": header,
    "tools": tools,
    "compaction": compaction,
    "sub_agent": sub_agent,
    "retry": retry,
    "foreign": foreign,
    "other": other,
}


def make(cause: Cause, template: Template, seed: int) -> Made:
    """Make a break of a cause; a draw that happens to break nothing is drawn again."""
    draw = random.Random(f"{cause} {template.name} {seed}")
    while True:
        made = MAKERS[cause](template, draw)
        if list(made.prompt[: len(made.before)]) != list(made.before):
            return made
