"""`make check-release`: what a wheel has of all that is patched, read from its source alone."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentlightning import instrumentation
from agentlightning.instrumentation.vllm._releases import NEWEST_KNOWN
from tests.common.environments import CHECKOUT
from tests.common.made_up_vllm import made_up_vllm
from tools.sources import Source

PATCH_SETS = list(instrumentation.status())
CHAT = "vllm.entrypoints.openai.chat_completion.serving"
# Whoever imports it fails.
NOT_TO_BE_IMPORTED = {"__version__ = ": "raise ImportError('it was imported')\n__version__ = "}


@dataclass(frozen=True)
class Check:
    """Return what the command printed, and its exit status."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)

    @property
    def left_off(self) -> dict[str, list[str]]:
        """The details of each set that is not all there, by its name."""
        return {found["name"]: found["details"] for found in self.json["patch_sets"] if found["state"] != "there"}


def wheel_of(
    folder: Path,
    version: str,
    edits: Mapping[str, str] | None = None,
    moved: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> Path:
    """A wheel of the made-up vLLM.

    Args:
        folder: where it comes to lie.
        version: what it calls itself.
        edits: text in its files, and what stands there instead.
        moved: files below `vllm/`, and where they are instead.
        more: files below `vllm/` that it has besides, and what is in them.
    """
    made_up_vllm(folder, "from 0.33", {**NOT_TO_BE_IMPORTED, **(edits or {})})
    package = folder / "vllm"
    for old, new in (moved or {}).items():
        (package / new).parent.mkdir(parents=True, exist_ok=True)
        (package / old).rename(package / new)
    for file, text in (more or {}).items():
        (package / file).write_text(text)
    wheel = folder / f"vllm-{version}-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in package.rglob("*.py"):
            archive.write(file, file.relative_to(folder))
    return wheel


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(tmp_path_factory.mktemp("known"), "0.33.0")


def check(wheel: Path | str, known: Path, *options: str) -> Check:
    command = [sys.executable, "-m", "tools.check_release", str(wheel), "--known", str(known), *options]
    checked = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False)
    return Check(checked.returncode, checked.stdout, checked.stderr)


def test_a_release_in_which_all_is_there(known: Path, tmp_path: Path) -> None:
    checked = check(wheel_of(tmp_path, "0.34.0"), known, "--json")

    assert checked.status == 0, checked.stderr
    assert (checked.json["version"], checked.json["ok"], checked.json["tested"]) == ("0.34.0", True, "only read")
    assert [found["name"] for found in checked.json["patch_sets"]] == PATCH_SETS
    assert checked.left_off == {}
    assert checked.json["new"] == {"routes": [], "serving classes": [], "launchers": []}


def test_the_table_names_each_set_and_where_it_was_found(known: Path, tmp_path: Path) -> None:
    checked = check(wheel_of(tmp_path, "0.34.0"), known)

    assert checked.status == 0, checked.stderr
    lines = checked.stdout.splitlines()
    assert lines[0] == "vLLM 0.34.0 (only read)"
    assert f"there chat {CHAT}" in [" ".join(line.split()) for line in lines]
    assert lines[-1] == "All that is patched is there."


def test_a_module_that_has_moved_is_found_where_it_is(known: Path, tmp_path: Path) -> None:
    moved = {"entrypoints/common/cli_args.py": "entrypoints/arguments/parser.py"}
    checked = check(wheel_of(tmp_path, "0.34.0", moved=moved), known, "--json")

    assert checked.status == 1
    missing, found = checked.left_off["start-up check"]
    assert missing.startswith("no module vllm.entrypoints.common.cli_args or vllm.entrypoints.launchers.cli_args")
    assert found == "validate_parsed_serve_args moved to vllm.entrypoints.arguments.parser: all is there"
    assert list(checked.left_off) == ["start-up check"]


def test_a_class_that_has_moved_is_found_where_it_is(known: Path, tmp_path: Path) -> None:
    old, new = "entrypoints/openai/chat_completion/serving.py", "entrypoints/openai/chat_completion/answering.py"
    checked = check(
        wheel_of(tmp_path, "0.34.0", moved={old: new}, more={old: "# Now in answering.\n"}), known, "--json"
    )

    assert checked.status == 1
    details = checked.left_off["chat"]
    assert f"{CHAT} has no class OpenAIServingChat" in details
    assert details[-1].endswith("moved to vllm.entrypoints.openai.chat_completion.answering: all is there")


def test_a_class_that_is_imported_from_elsewhere_is_there(known: Path, tmp_path: Path) -> None:
    old, new = "entrypoints/openai/chat_completion/serving.py", "entrypoints/openai/chat_completion/answering.py"
    imports = "from .answering import ChatCompletionRequest, OpenAIServingChat\n"
    checked = check(wheel_of(tmp_path, "0.34.0", moved={old: new}, more={old: imports}), known, "--json")

    assert checked.left_off == {}
    assert checked.status == 0


def test_a_method_of_another_name_is_missing(known: Path, tmp_path: Path) -> None:
    checked = check(wheel_of(tmp_path, "0.34.0", {"create_completion": "complete"}), known, "--json")

    assert checked.status == 1
    reason = "vllm.entrypoints.openai.completion.serving has no OpenAIServingCompletion.create_completion"
    assert checked.left_off == {"completions": [reason]}


def test_a_method_that_a_base_class_has_now_is_there(known: Path, tmp_path: Path) -> None:
    edits = {"class AnthropicServingMessages:": "class Messages:"}
    base = "\nclass AnthropicServingMessages(Messages):\n    pass\n"
    wheel = wheel_of(
        tmp_path,
        "0.34.0",
        {
            **edits,
            "async def create_messages(self, request, raw_request=None):\n"
            "        pass\n": "async def create_messages(self, request, raw_request=None):\n        pass\n" + base,
        },
    )
    checked = check(wheel, known, "--json")

    assert checked.left_off == {}


def test_classes_that_have_parted_are_each_found(known: Path, tmp_path: Path) -> None:
    edits = {"class EngineCoreProc(EngineCore):": "class Process:"}
    process = {"v1/engine/process.py": "class EngineCoreProc:\n    def _send_engine_dead(self):\n        pass\n"}
    checked = check(wheel_of(tmp_path, "0.34.0", edits, more=process), known, "--json")

    assert checked.status == 1
    assert checked.left_off == {
        "engine core": [
            "vllm.v1.engine.core has no class EngineCoreProc",
            "EngineCoreProc is defined in vllm.v1.engine.process",
        ]
    }


def test_a_class_that_is_nowhere_is_missing(known: Path, tmp_path: Path) -> None:
    checked = check(wheel_of(tmp_path, "0.34.0", {"EngineCore": "Core"}), known, "--json")

    assert checked.status == 1
    missing = checked.left_off["engine core"]
    assert missing[:2] == [f"vllm.v1.engine.core has no class {name}" for name in ("EngineCoreProc", "EngineCore")]
    assert not [detail for detail in missing if "moved" in detail or "defined" in detail]


def test_each_parameter_that_is_missing_is_named(known: Path, tmp_path: Path) -> None:
    edits = {
        "def abort_requests(self, request_ids, internal)": "def abort_requests(self, ids)",
        "def process_outputs(self, engine_core_outputs)": "def process_outputs(self, outputs)",
    }
    checked = check(wheel_of(tmp_path, "0.34.0", edits), known, "--json")

    processor = "vllm.v1.engine.output_processor.OutputProcessor"
    assert checked.left_off == {
        "capture": [
            f"{processor}.process_outputs(self, outputs) does not take engine_core_outputs",
            f"{processor}.abort_requests(self, ids) does not take request_ids",
        ]
    }


def test_a_release_before_what_is_patched_is_not_to_have_it(known: Path, tmp_path: Path) -> None:
    moved = {"entrypoints/openai/chat_completion/batch_serving.py": "away.py"}
    edits = {"class GenerateRequest(BaseModel):\n    return_token_ids": "class GenerateRequest(BaseModel):\n    ids"}
    checked = check(wheel_of(tmp_path, "0.18.0", edits, moved), known, "--json")

    assert checked.left_off == {
        "chat batch": ["came with vLLM 0.19.0"],
        "generate": ["GenerateRequest has no field return_token_ids, which came with vLLM 0.30.0"],
    }
    assert checked.status == 0


def test_the_same_is_missing_in_a_release_after(known: Path, tmp_path: Path) -> None:
    moved = {"entrypoints/openai/chat_completion/batch_serving.py": "away.py"}
    checked = check(wheel_of(tmp_path, "0.34.0", moved=moved), known, "--json")

    assert checked.status == 1
    assert checked.left_off == {
        "chat batch": [
            "no module vllm.entrypoints.openai.chat_completion.batch_serving",
            "OpenAIServingChatBatch moved to vllm.away: all is there",
        ]
    }


SERVES_MORE = """\
class OpenAIServingDreams:
    pass

class Dream(CLISubcommand):
    pass

@router.post("/v1/dreams", dependencies=[])
async def create_dream(request):
    pass

@router.websocket("/v1/nightmares")
async def dream_on(websocket):
    pass

async def run_dream_server(app):
    await serve_http(app, None)
"""


def test_what_serves_besides_and_is_patched_by_nothing_is_named(known: Path, tmp_path: Path) -> None:
    checked = check(wheel_of(tmp_path, "0.34.0", more={"entrypoints/dreams.py": SERVES_MORE}), known, "--json")

    assert checked.status == 0
    assert checked.json["new_since"] == "0.33.0"
    assert checked.json["new"] == {
        "routes": ["POST /v1/dreams", "WEBSOCKET /v1/nightmares"],
        "serving classes": ["OpenAIServingDreams"],
        "launchers": ["Dream", "run_dream_server()"],
    }


def test_a_release_that_is_no_row_of_the_matrix_is_not_run(known: Path, tmp_path: Path) -> None:
    checked = check(wheel_of(tmp_path, "0.34.0"), known, "--run")

    assert checked.status == 0
    assert "Not run: tests/releases/table.py has no row 0.34.0." in checked.stdout


def test_missing_file_is_reported(known: Path, tmp_path: Path) -> None:
    checked = check(tmp_path / "vllm-0.34.0-none.whl", known)

    assert checked.status == 1
    assert checked.stderr == f"check_release: no file {tmp_path}/vllm-0.34.0-none.whl\n"


def test_functions_of_the_stubs_take_what_the_source_says(tmp_path: Path) -> None:
    import inspect

    text = (
        "class C:\n    @staticmethod\n    def f(a, /, b: int = 1, *c, d, e=None, **g) -> int: ...\n"
        "if True:\n    async def h(x): ...\nelse:\n    def i(): ...\n"
    )
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("p/__init__.py", text)
    module = Source(tmp_path / "p.zip").module("p")

    assert str(inspect.signature(module.C.f)) == "(a, /, b=None, *c, d, e=None, **g)"
    assert isinstance(inspect.getattr_static(module.C, "f"), staticmethod)
    assert str(inspect.signature(module.h)) == "(x)"
    assert str(inspect.signature(module.i)) == "()"


def test_the_documented_table_has_the_patch_sets_of_today() -> None:
    page = (CHECKOUT / "docs" / "releases.md").read_text()

    assert f"\n| {NEWEST_KNOWN} | {len(PATCH_SETS)} of {len(PATCH_SETS)} | - | - |" in page, (
        "write it again: python -m tools.check_release --all"
    )
