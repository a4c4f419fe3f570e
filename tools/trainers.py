"""Run a program with the trainers that `agentlightning.trainers` is for: `python -m tools.trainers -m examples.train`.

They are beside the packages of the tests' environment, which has PyTorch and transformers already: its interpreter
finds them by `PYTHONPATH`. None of them brings what it depends on, or pip would install another PyTorch, with CUDA.
"""

from __future__ import annotations

import os
import sys

from tools.peer import environment

__all__ = ["python_path"]

# All that is imported where rows are handed over; named exactly, since nothing else limits the versions.
REQUIREMENTS = (
    "accelerate==1.15.0",
    "antlr4-python3-runtime==4.9.3",
    "atif==1.8.0",
    "cachetools==8.0.2",
    "cloudpathlib==0.26.0",
    "codetiming==1.4.0",
    "distro==1.9.0",
    "hydra-core==1.3.8",
    "jaxtyping==0.3.11",
    "msgpack==1.2.4",
    "omegaconf==2.4.0",
    "peft==0.21.2",
    "pyvers==0.2.3",
    "ray==2.60.0",
    "tensordict==0.15.3",
    "tinker==0.38.0",
    "torchdata==0.11.0",
    "trl==1.16.0",
    "verl==0.9.1",
)
# It asks for Python 3.12 because of pydantic, which takes the TypedDict of typing_extensions before that.
SKYRL = ("skyrl==0.4.0", "skyrl-gym==0.4.0")


def python_path() -> str:
    """The `PYTHONPATH` with which this interpreter imports the trainers; they are installed where they are not yet."""
    folders = (
        environment("trainers", "TRL, verl, Tinker and ATIF", ("--no-deps", *REQUIREMENTS)),
        environment("skyrl", "SkyRL", ("--no-deps", "--python-version", "3.12", *SKYRL)),
    )
    return os.pathsep.join(str(next(each.parent.glob("lib/python*/site-packages"))) for each in folders)


if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, "PYTHONPATH": python_path()})
