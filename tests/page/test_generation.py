"""The page of one generation: its tokens as text, with ids, logprobs and links."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from agentlightning.generation import Generation
from agentlightning.store import open_store
from tests.common.browser import Visit
from tests.common.generations import EMPTY, FULL
from tests.common.rollouts import END, START, Rollout, tokens
from tests.page.conftest import LONG_IDS, Filled, Open
from tests.server.process import StoreServer

DESCRIPTION = re.compile(r"Token (\d+): (\".*?\"), id (-?\d+)(?:, logprob (\S+) \((\S+) %\))?")


def answer(page: Page) -> Locator:
    """Locate the tokens of the answer, which handle the keys."""
    return page.get_by_role("group", name="Answer")


def selected_token(page: Page) -> tuple[int, str, int, float | None]:
    """Return position, text, id and logprob of the selected token, as described below the text."""
    found = DESCRIPTION.fullmatch(page.get_by_text(DESCRIPTION).inner_text())
    assert found is not None
    place, text, token_id, logprob, _ = found.groups()
    return int(place), json.loads(text), int(token_id), None if logprob is None else float(logprob)


def highlighted(page: Page) -> Locator:
    return page.locator(".tokens .chosen")


@pytest.fixture
def rollout(filled: Filled) -> Rollout:
    """A rollout whose first call has one answer."""
    return next(each for each in filled.rollouts if each.number % 5 and each.status == "succeeded")


@pytest.fixture
def recorded(filled: Filled, rollout: Rollout) -> Generation:
    """The first call of that rollout, as vLLM recorded it."""
    with open_store(filled.server.url) as store:
        return next(each for each in store.generations(rollout_id=rollout.rollout_id))


def choice_of(generation: Generation) -> tuple[list[int], list[float]]:
    [choice] = generation.choices
    assert choice.token_ids is not None
    assert choice.logprobs is not None
    return choice.token_ids.tolist(), choice.logprobs.tolist()


def test_tokens_joined_are_the_text(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")

    assert answer(page).text_content() == f"{recorded.choices[0].text}{END}"


def test_arrow_keys_select_tokens_and_show_id_and_logprob(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    token_ids, logprobs = choice_of(recorded)
    answer(page).focus()
    for place, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
        page.keyboard.press("ArrowRight")
        expect(page.get_by_text(f"Token {place}:")).to_be_visible()
        found = selected_token(page)
        assert (found[0], found[2]) == (place, token_id)
        assert found[3] == pytest.approx(logprob, rel=1e-4)
        assert tokens(found[1]) == [token_id]
    last = len(token_ids) - 1
    for key, place in (("ArrowRight", last), ("ArrowLeft", last - 1), ("Home", 0), ("ArrowLeft", 0), ("End", last)):
        page.keyboard.press(key)
        assert selected_token(page)[0] == place


def test_click_selects_a_token(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    answer(page).get_by_text("calculator", exact=True).click()

    place, text, token_id, logprob = selected_token(page)
    assert text == "calculator"
    assert (token_id, pytest.approx(logprob, rel=1e-4)) == tuple(each[place] for each in choice_of(recorded))
    expect(highlighted(page)).to_have_text("calculator")
    answer(page).get_by_text("name", exact=True).click()
    expect(highlighted(page)).to_have_text("name")


def test_link_to_a_token_selects_it(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    answer(page).get_by_text("calculator", exact=True).click()
    link = page.get_by_role("link", name="Link to this page").get_attribute("href")

    for address in (page.url, link):
        assert address
        other = look(address)
        expect(highlighted(other)).to_have_text("calculator")
        assert selected_token(other) == selected_token(page)


def test_link_to_a_distant_token_scrolls_to_it(look: Open, filled: Filled) -> None:
    page = look(f"/generation?id={filled.long.id}#t20000")
    token_ids, _ = choice_of(filled.long)

    expect(highlighted(page)).to_be_in_viewport()
    assert selected_token(page)[2] == token_ids[20_000]
    answer(page).focus()
    page.keyboard.press("End")
    expect(highlighted(page)).to_be_in_viewport()
    expect(highlighted(page)).to_have_text(END)
    assert selected_token(page)[0] == LONG_IDS - 1
    page.keyboard.press("Home")
    expect(highlighted(page)).to_be_in_viewport()
    assert selected_token(page)[0] == 0


def test_unfolded_prompt_shows_its_tokens(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    prompt = page.get_by_role("group", name="Prompt: ")
    expect(prompt).to_have_count(0)
    assert recorded.prompt_token_ids is not None
    page.get_by_text(f"{len(recorded.prompt_token_ids)} tokens", exact=True).click()

    expect(prompt).to_be_visible()
    assert prompt.text_content() == recorded.prompt_text
    prompt.get_by_text("calculator").click()
    assert selected_token(page)[1:] == (" calculator", tokens(" calculator")[0], None)
    page.keyboard.press("ArrowRight")
    # The address names only tokens of the answer.
    assert "#" not in page.url


def test_every_special_token_is_framed(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    assert recorded.prompt_token_ids is not None
    page.get_by_text(f"{len(recorded.prompt_token_ids)} tokens", exact=True).click()
    prompt = page.get_by_role("group", name="Prompt: ")
    expect(prompt).to_be_visible()

    for text in (START, END):
        tokens_of_it = prompt.get_by_text(text, exact=True)
        assert tokens_of_it.count() > 0
        for each in tokens_of_it.all():
            expect(each).to_have_css("outline-style", "dashed")
    expect(prompt.get_by_text("calculator")).to_have_css("outline-style", "none")


@pytest.mark.parametrize("size", ["phone", "desktop"])
def test_description_is_shown_once_and_covers_nothing(look: Open, filled: Filled, size: str) -> None:
    page = look(f"/generation?id={filled.long.id}", size=size)
    described = page.locator(".description")
    plot = page.get_by_role("img", name="Plot of logprobs")
    # Before a token is chosen there is nothing to cover anything with.
    expect(described).to_have_text([""])
    assert described.evaluate("each => each.getBoundingClientRect().height") == 0
    assert filled.long.prompt_token_ids is not None
    page.get_by_text(f"{len(filled.long.prompt_token_ids)} tokens", exact=True).click()
    page.get_by_role("group", name="Prompt: ").get_by_text("story").click()
    expect(described.first).to_contain_text("story")
    expect(described.last).to_have_text("")
    plot.scroll_into_view_if_needed()
    answer(page).locator(".t").nth(3).click()
    # Of the two, only the last chosen is described.
    expect(described.first).to_have_text("")
    expect(described.last).to_contain_text("Token 3")
    for step in range(12):
        overlaps = page.evaluate(OVERLAPS)
        assert not overlaps, step
        page.mouse.wheel(0, 120)
    # The chosen token itself is never behind its description.
    answer(page).focus()
    for _ in range(40):
        page.keyboard.press("ArrowDown")
    expect(highlighted(page)).to_be_in_viewport(ratio=1)
    page.wait_for_function(f"!({COVERED})")
    page.keyboard.press("Escape")
    expect(described).to_have_text(["", ""])
    third = answer(page).locator(".t").nth(3)
    third.click()
    expect(described.last).to_contain_text("Token 3")
    third.click()
    expect(described).to_have_text(["", ""])


OVERLAPS = """() => {
  const [bar, plot] = [[...document.querySelectorAll(".description")].at(-1), document.getElementById("plot")];
  const [one, other] = [bar.getBoundingClientRect(), plot.getBoundingClientRect()];
  return one.top < other.bottom && other.top < one.bottom;
}"""
COVERED = """[...document.querySelectorAll(".description")].at(-1).getBoundingClientRect().top <
  document.querySelector(".chosen").getBoundingClientRect().bottom"""


def test_part_of_a_character_is_shown_as_bytes(look: Open, rollout: Rollout) -> None:
    page = look(f"/generation?id={rollout.generation_id(1, len(rollout.answers) - 1)}")

    expect(answer(page)).to_contain_text("\\xf0\\x9f\\x98\\x80")


def test_plot_of_logprobs_has_a_description_and_selects_tokens(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    _, logprobs = choice_of(recorded)
    lowest = logprobs.index(min(logprobs))
    plot = page.get_by_role("img", name="Plot of logprobs")

    expect(plot).to_have_accessible_name(re.compile(rf"{len(logprobs)} tokens, mean .* at token {lowest}$"))
    box = plot.locator("canvas").bounding_box()
    assert box is not None
    assert min(box["width"], box["height"]) > 100
    page.get_by_role("link", name=str(lowest), exact=True).click()
    assert selected_token(page)[0] == lowest
    # A click in the plot selects a token.
    plot.click()
    assert selected_token(page)[0] == pytest.approx(len(logprobs) / 2, abs=len(logprobs) / 4)


def test_plot_fits_a_narrower_window(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    page.set_viewport_size({"width": 500, "height": 800})

    expect(page.get_by_role("img", name="Plot of logprobs").locator("canvas")).to_be_in_viewport(ratio=1)


def test_choice_link_shows_that_choice(look: Open, filled: Filled) -> None:
    rollout = next(each for each in filled.rollouts if not each.number % 5 and each.status == "succeeded")
    page = look(f"/generation?id={rollout.generation_id(1, 0)}")
    expect(answer(page)).to_contain_text("calculator")
    page.get_by_role("link", name="Choice 1").click()

    expect(answer(page)).to_contain_text("times")
    expect(page.get_by_role("link", name="Choice 1")).to_have_attribute("aria-current", "page")
    expect(answer(look(page.url))).to_contain_text("times")


def test_raw_json_is_exactly_what_was_recorded(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    page.get_by_role("link", name="Raw JSON").click()

    found = json.loads(page.get_by_text("prompt_token_ids").inner_text())
    assert found["choices"][0]["token_ids"] == choice_of(recorded)[0]
    assert found["prompt_text"] == recorded.prompt_text


def test_unknown_id_says_so(look: Open) -> None:
    expect(look("/generation?id=nothing").get_by_role("heading")).to_have_text("There is no generation 'nothing'")


def test_page_without_scripts_shows_the_answer(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}", javascript=False)

    assert answer(page).text_content() == f"{recorded.choices[0].text}{END}"
    expect(page.get_by_text("Logprobs: mean")).to_be_visible()


def test_chosen_token_shows_its_neighbours_alternatives_and_mask(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server:
        with open_store(server.url) as store:
            store.add([FULL])
        page = visit(server).page
        page.goto(f"/generation?id={FULL.id}#t0")
        details = page.get_by_role("region", name="Answer: the chosen token")
        expect(details.locator(".neighbours")).to_have_text("[7][8]")
        # The sampled one, and the one that the client asked to see beside it.
        rows = details.get_by_role("row")
        expect(rows).to_have_text([re.compile("Token"), re.compile(r"sampled\s*7\s*-0.1\s*90.5 %"), re.compile("-2.5")])
        expect(details).to_contain_text(
            'Chosen from 3 ids that top-p, top-k and min-p left: "[7]" "[9]" "[2147483647]"'
        )
        answer(page).focus()
        page.keyboard.press("End")
        expect(details).to_contain_text("Chosen from 1 id ")
        page.keyboard.press("Escape")
        expect(details).to_be_hidden()
        page.get_by_text("4 tokens", exact=True).click()
        page.get_by_role("group", name="Prompt: ").locator(".t").nth(2).click()
        prompt = page.get_by_role("region", name="Prompt: the chosen token")
        expect(prompt.get_by_role("row")).to_have_count(3)
        expect(prompt).not_to_contain_text("Chosen from")
        for address in ("at=2", "at=0&choice=9", "at=4&of=prompt"):
            page.goto(f"/generation/token?id={FULL.id}&{address}")
            expect(page.get_by_role("heading")).to_have_text("There is no such token")


def test_text_and_ids_can_be_copied(look: Open, recorded: Generation) -> None:
    page = look(f"/generation?id={recorded.id}")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    token_ids, _ = choice_of(recorded)
    for name, copied in (("Copy text", recorded.choices[0].text), ("Copy ids", json.dumps(token_ids))):
        page.get_by_role("button", name=name).click()
        expect(page.get_by_text(f"Copied {len(copied or '')} characters")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == copied


def test_previous_and_next_go_through_the_calls_of_the_rollout(look: Open, rollout: Rollout) -> None:
    page = look(f"/generation?id={rollout.generation_id(1, 0)}")
    heading = page.get_by_role("heading", level=1)
    expect(page.get_by_text(f"Call 1 of {len(rollout.answers)}")).to_be_visible()
    expect(page.get_by_role("link", name="Previous call")).to_have_count(0)
    page.get_by_role("link", name="Next call").click()
    expect(heading).to_contain_text(rollout.generation_id(1, 1))
    page.goto(f"/generation?id={rollout.generation_id(1, len(rollout.answers) - 1)}")
    expect(page.get_by_role("link", name="Next call")).to_have_count(0)
    # The reward of the attempt is that of its last call.
    expect(page.get_by_text("reward 1", exact=True)).to_be_visible()


def test_unknown_values_are_said_to_be_unknown(visit: Callable[..., Visit], tmp_path: Path) -> None:
    with StoreServer(tmp_path / "store.db") as server:
        with open_store(server.url) as store:
            store.add([FULL, EMPTY])
        page = visit(server).page
        page.goto(f"/generation?id={FULL.id}")
        # Without a vocabulary, and with a logprob of minus infinity.
        expect(page.get_by_text("has not sent its vocabulary")).to_be_visible()
        assert answer(page).text_content() == "[7][8]"
        expect(page.get_by_text("what came out", exact=True)).to_be_visible()
        expect(page.get_by_text("2 in each of 3 layers, of 2 ids")).to_be_visible()
        answer(page).focus()
        page.keyboard.press("End")
        assert selected_token(page) == (1, "[8]", 8, -math.inf)
        page.goto(f"/generation?id={FULL.id}&choice=1")
        expect(page.get_by_text("No logprobs are recorded")).to_be_visible()
        page.goto(f"/generation?id={FULL.id}&choice=2")
        expect(page.get_by_text("Its token ids are not recorded")).to_be_visible()
        page.goto(f"/generation?id={EMPTY.id}")
        expect(page.get_by_text("Its token ids are not recorded")).to_have_count(2)
