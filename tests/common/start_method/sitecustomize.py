"""On the path of a server: its processes are started by the method that `START_METHOD` names.

vLLM's CPU platform insists on spawn. Builds for GPUs start it by fork where vLLM is used as a library.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

get_context = multiprocessing.get_context


def get_chosen_context(method=None):
    return get_context(os.environ["START_METHOD"] if method == "spawn" else method)


multiprocessing.get_context = get_chosen_context

# Python takes the first on the path alone: a test may have put another one behind this.
others = (Path(folder, "sitecustomize.py") for folder in sys.path if folder != str(Path(__file__).parent))
other = next((path for path in others if path.exists()), None)
if other:
    runpy.run_path(str(other))
