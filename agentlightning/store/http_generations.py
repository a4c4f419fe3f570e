"""Generations on their way to an `agl store`: in blocks, in a version that it reads, in parts if they are too large."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from agentlightning.errors import InvalidRecord, StoreError, StoreUnavailable
from agentlightning.generation import Generation, Loss
from agentlightning.store import wire
from agentlightning.store.chains import Recent
from agentlightning.store.http_client import HttpClient, TooLarge, UnknownMediaType
from agentlightning.store.wire import Refusal

__all__ = ["GenerationSender"]

SECONDS_OF_AN_OLDER_VERSION = 60.0
"""Time for which messages are sent in an older version before the newest is tried again."""

logger = logging.getLogger("agentlightning.store")


class _Added(msgspec.Struct):
    new: int
    refused: list[Refusal]
    sender: Literal["known", "unknown"] | None = None
    blocks: dict[str, tuple[list[int], list[int]]] = {}
    lacking: list[str] = []


class GenerationSender:
    """Sender of generations to one server, with the version that it reads and the blocks that it has.

    Args:
        register_again: registers a sender that the server does not know any more.
    """

    def __init__(self, http: HttpClient, register_again: Callable[[str], object]) -> None:
        self._http = http
        self._register_again = register_again
        self._blocks = Recent()
        self._version = wire.VERSIONS[0]
        self._version_until = math.inf
        self._told_missing: set[str] = set()

    def send(
        self, generations: Sequence[Generation], sender_id: str | None, recent: Recent | None = None
    ) -> tuple[int, list[Refusal]]:
        """Send generations; returns how many are new, and those that were refused.

        Args:
            recent: blocks that the store is assumed to have; None for those of earlier answers.
        """
        if not generations:
            return 0, []
        try:
            answer = self._post(generations, sender_id, self._blocks if recent is None else recent)
        except TooLarge as error:
            if len(generations) == 1:
                return 0, [Refusal(str(generations[0].id), str(error))]
        except InvalidRecord as error:
            # The store refused the message, not one of its generations.
            return 0, [Refusal(str(each.id), str(error)) for each in generations]
        else:
            return self._send_lacking(generations, sender_id, answer, was_whole=recent is not None)
        middle = len(generations) // 2
        first, refused = self.send(generations[:middle], sender_id, recent)
        second, more = self.send(generations[middle:], sender_id, recent)
        return first + second, [*refused, *more]

    def send_losses(self, losses: Sequence[Loss]) -> None:
        """Send reports of losses."""
        self._ask_in_any_version(lambda version: wire.encode((), losses, version=version))

    def _send_lacking(
        self, generations: Sequence[Generation], sender_id: str | None, answer: _Added, was_whole: bool
    ) -> tuple[int, list[Refusal]]:
        """Send those of which the store lacks blocks again, with all of their blocks; returns what `send` does.

        The store has another database, or the blocks were deleted.

        Args:
            was_whole: all blocks were sent already: they go on after a generation that was refused.
        """
        new, refused = answer.new, answer.refused
        lacking = frozenset(answer.lacking)
        again = [generation for generation in generations if generation.id in lacking]
        if was_whole and len(again) == len(generations) == 1:
            raise self._http.strange()
        for part in [[each] for each in again] if was_whole else [again]:
            more, more_refused = self.send(part, sender_id, Recent())
            new, refused = new + more, [*refused, *more_refused]
        return new, refused

    def _post(self, generations: Sequence[Generation], sender_id: str | None, recent: Recent) -> _Added:
        answer = self._post_message(generations, sender_id, recent)
        if answer.sender == "unknown" and sender_id is not None:
            with suppress(StoreError):
                self._register_again(sender_id)
        return answer

    def _post_message(self, generations: Sequence[Generation], sender_id: str | None, recent: Recent) -> _Added:
        """Send one message, in blocks unless the server is too old for them, and keep what the store has since."""
        sent: wire.Sent = {}

        def encode(version: str) -> bytes:
            nonlocal sent
            try:
                if not wire.has_blocks(version):
                    return wire.encode(generations, sender_id=sender_id, version=version)
                body, sent = wire.encode_in_blocks(generations, sender_id, recent, version)
            except InvalidRecord as error:
                raise TooLarge(str(error)) from error
            return body

        added: _Added = self._http.read(self._ask_in_any_version(encode), _Added)
        for generation_id, keys_of_each in added.blocks.items():
            for names, keys in zip(sent.get(generation_id, ()), keys_of_each, strict=False):
                for name, key in zip(names, keys, strict=False):
                    self._blocks.put(name, key)
        return added

    def _ask_in_any_version(self, encode: Callable[[str], bytes]) -> bytes:
        """Send a message in the newest version that the server knows, and return its answer.

        The server may be replaced by that of a newer release: once it was away, or after a while, newer ones are tried.
        """
        if time.monotonic() > self._version_until:
            self._version = wire.VERSIONS[0]
        while True:
            version = self._version
            try:
                answer = self._http.ask("POST", "/generations", body=encode(version), kind=version, repeatable=True)
            except UnknownMediaType:
                older = wire.VERSIONS[wire.VERSIONS.index(version) + 1 :]
                if not older:
                    raise
                self._version, self._version_until = older[0], time.monotonic() + SECONDS_OF_AN_OLDER_VERSION
            except StoreUnavailable:
                self._version = wire.VERSIONS[0]
                raise
            else:
                self._warn_of_missing(version)
                return answer

    def _warn_of_missing(self, version: str) -> None:
        """Name the fields that the server does not get in this version, each once."""
        new = [name for name in wire.missing_in(version) if name not in self._told_missing]
        if new:
            self._told_missing.update(new)
            logger.warning(
                "agentlightning: %s is of an earlier release, which does not keep %s: these are not recorded until it "
                "is updated",
                self._http.shown,
                ", ".join(new),
            )
