"""The argument parser of every subcommand, and the times that several of them take."""

from __future__ import annotations

import argparse
import re
from datetime import datetime, timedelta, timezone
from typing import NoReturn

__all__ = ["Parser", "nanoseconds"]

_DATE = re.compile(r"\d{4}-\d\d-\d\d")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong argument with one sentence, and not with its whole usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nsee {self.prog} --help\n")


def nanoseconds(text: str) -> int:
    """Convert a time to nanoseconds since the epoch."""
    try:
        return (_parsed(text).astimezone() - EPOCH) // timedelta(microseconds=1) * 1_000
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; write it like 2026-11-24T10:30") from error


def _parsed(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        # Before Python 3.11 it reads neither Z nor 24.5 s. pydantic reads both, but takes a bare number as seconds.
        if not _DATE.match(text):
            raise
        from pydantic import TypeAdapter

        return TypeAdapter(datetime).validate_python(text)
