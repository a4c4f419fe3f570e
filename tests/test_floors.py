"""The package's imports lead down the floors of docs/design.md."""

from __future__ import annotations

import re

import pytest

from tools import floors

pytestmark = pytest.mark.tier("check")


def test_imports_lead_down_alone() -> None:
    found = floors.arrows()

    assert floors.upward(found) == []
    assert found["server", "store"] > 10


def test_an_import_that_leads_up_is_found() -> None:
    found = floors.arrows()
    found["store", "server"] = 1

    assert floors.upward(found) == [("store", "server")]


def test_no_sql_stands_outside_of_the_store() -> None:
    outside = [path for path in floors.PACKAGE.rglob("*.py") if "store" not in path.relative_to(floors.PACKAGE).parts]

    assert len(outside) > 50
    assert [path.name for path in outside if re.search(r"connection\.exec", path.read_text())] == []


def test_every_module_has_a_floor() -> None:
    parts = {
        path.name.removesuffix(".py")
        for path in floors.PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }

    assert parts - {"__pycache__", "py.typed"} <= {name for names in floors.FLOORS for name in names}
