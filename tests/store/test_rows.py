"""Tests of the conversion of records to rows: columns follow from the types of fields."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from agentlightning.errors import InvalidRecord
from agentlightning.generation import SharedText, Status, Uuid, field_types, new_id, with_arrays, with_lists
from agentlightning.store.rows import Layout, versions_of, versions_text

pytestmark = pytest.mark.tier("check")


@dataclass(slots=True)
class Sample:
    """A record of a store, made up."""

    sample_id: SharedText | None
    call_id: Uuid | None
    size: int
    status: Status
    text: str | None
    token_ids: array[int] | None


LAYOUT = Layout(Sample)


def rows_of(samples: list[Sample], keys: dict[str | None, int | None]) -> list[Any]:
    columns = LAYOUT.columns_of(LAYOUT.values_of(samples), keys)
    return [
        SimpleNamespace(**dict(zip(LAYOUT.columns.values(), row, strict=True))) for row in zip(*columns, strict=True)
    ]


def test_fields_of_a_new_record_have_columns_and_are_read_back() -> None:
    samples = [
        Sample("one", new_id(), 7, "aborted", "a\0b", array("i", [1, 2])),
        Sample(None, None, 0, "finished", None, None),
    ]

    found = rows_of(samples, {None: None, "one": 1})

    assert LAYOUT.texts_in(LAYOUT.values_of(samples)) == {"one", None}
    assert (found[0].sample_key, found[0].size, found[0].status) == (1, 7, 1)
    assert (found[1].sample_key, found[1].call_id, found[1].token_ids) == (None, None, None)
    assert [Sample(**each) for each in LAYOUT.records_of(found, {None: None, 1: "one"})] == samples


def test_no_record_has_no_row() -> None:
    assert rows_of([], {}) == LAYOUT.records_of([], {}) == []


def test_unknown_status_is_refused_with_those_that_are_known() -> None:
    asleep: Any = "asleep"

    with pytest.raises(InvalidRecord, match="'asleep' is not one of finished, aborted, error"):
        rows_of([Sample(None, None, 0, asleep, None, None)], {None: None})


def test_types_of_a_new_record_are_plain_and_its_arrays_lists() -> None:
    types = field_types(Sample, {list[int]: bytes})

    assert types == {
        **dict.fromkeys(("sample_id", "call_id", "text"), str | None),
        "size": int,
        "status": Status,
        "token_ids": bytes | None,
    }
    sample = Sample("one", None, 7, "error", None, array("i", [1, 2]))
    assert with_lists(sample)["token_ids"] == [1, 2]
    assert Sample(**with_arrays(Sample, with_lists(sample))) == sample


@pytest.mark.parametrize(
    "versions",
    [[], [("0", 0, 5)], [('é"\\\ud800', 0, 5), ("b", 5, 9)], [(3, 0, 1)]],
    ids=["none", "one", "text", "number"],
)
def test_weight_versions_of_any_name_are_read_as_they_were_written(versions: list[Any]) -> None:
    written = versions_text(versions)

    assert json.loads(written) == [[*each] for each in versions]
    assert versions_of(written) == versions
