"""Requests by which a test makes an engine say something, whichever worker a release has, and what that is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from tests.common.reference import greedy
from tests.common.tiny_model import tiny_model
from tests.releases.chosen import ANYTHING, TEXTS, chosen_token_ids
from tests.releases.table import COMPILED, Release


class Engine(Protocol):
    """It says what `tests.releases.chosen` has a name for."""

    def asks(self, what: int, **options: Any) -> dict[str, Any]:
        """The options of a request that it is to say this to."""
        ...

    def says(self, what: int, prompt_token_ids: Sequence[int], tokens: int) -> list[int]:
        """The first ids that come out of it then, with a temperature of zero."""
        ...

    def draws(self, what: int, tokens: int) -> list[int] | None:
        """The same with a higher one; None where nobody else can know."""
        ...


class ChosenTokens:
    """Requests for the tests' own worker, whatever the temperature."""

    def asks(self, what: int, **options: Any) -> dict[str, Any]:
        return {"seed": what, **options}

    def says(self, what: int, prompt_token_ids: Sequence[int], tokens: int) -> list[int]:
        return chosen_token_ids(tiny_model(), what)[:tokens]

    def draws(self, what: int, tokens: int) -> list[int] | None:
        return chosen_token_ids(tiny_model(), what)[:tokens]


class Model:
    """Requests for vLLM's own worker and the tiny model, which says what is most likely, or what a grammar allows."""

    def asks(self, what: int, **options: Any) -> dict[str, Any]:
        options = {"seed": what, "temperature": 0, **options}
        # A call that is named or required has a grammar of its own.
        if what in TEXTS and "tool_choice" not in options:
            options["structured_outputs"] = {"regex": re.escape(TEXTS[what]).replace("\\\n", r"\n")}
        return options

    def says(self, what: int, prompt_token_ids: Sequence[int], tokens: int) -> list[int]:
        assert what == ANYTHING
        return greedy(prompt_token_ids, tokens)

    def draws(self, what: int, tokens: int) -> list[int] | None:
        return None


def engine_of(release: Release) -> Engine:
    return Model() if release.worker == COMPILED else ChosenTokens()
