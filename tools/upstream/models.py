"""A Hugging Face cache: one tiny model, or an adapter to it, under every name that vLLM's tests ask for."""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from tests.common.tiny_model import tiny_model

__all__ = ["hugging_face_home"]

MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAMES_ALONE = ("gpt2",)
REVISION = "0" * 40


def hugging_face_home(tests: Path, files: Iterable[str]) -> Path:
    """The folder for `HF_HOME`, for the models that these files of the tests name, and those that they import from."""
    home = tests.parent / "huggingface"
    shutil.rmtree(home, ignore_errors=True)
    model = tiny_model()
    adapter = _adapter(model, home / "adapter")
    names = {*NAMES_ALONE, *_named(tests / file for file in _with_helpers(tests, files))}
    for name in names:
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        for part in (adapter if "lora" in name.lower() else model).iterdir():
            (snapshot / part.name).symlink_to(part)
    return home


def _adapter(model: Path, folder: Path) -> Path:
    """The folder of a LoRA adapter for the model, which changes a little of what it says."""
    config = json.loads((model / "config.json").read_text())
    hidden, rank = config["hidden_size"], 8
    generator = numpy.random.default_rng(0)
    weights = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight": generator.normal(0, 0.1, shape)
        for layer in range(config["num_hidden_layers"])
        for name in ("q_proj", "v_proj")
        for part, shape in (("A", (rank, hidden)), ("B", (hidden, rank)))
    }
    folder.mkdir(parents=True)
    save_file(
        {name: weight.astype("float32") for name, weight in weights.items()}, folder / "adapter_model.safetensors"
    )
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def _with_helpers(tests: Path, files: Iterable[str]) -> set[str]:
    """Return these, and what lies beside them or above them and is no test: fixtures and helpers name models too."""
    found = set(files)
    for file in files:
        for folder in (tests / file).parents:
            if not folder.is_relative_to(tests / "tests"):
                break
            helpers = (path for path in folder.glob("*.py") if not path.name.startswith("test_"))
            found.update(str(path.relative_to(tests)) for path in helpers)
    return found


def _named(files: Iterable[Path]) -> Iterator[str]:
    """Every text in them that may be a model's name; one that is something else costs a folder."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and MODEL.fullmatch(node.value):
                yield node.value
