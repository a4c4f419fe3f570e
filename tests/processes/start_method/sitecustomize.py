"""On the path of a server: its engine core is started by the method that `ENGINE_CORE` names.

vLLM's CPU platform insists on spawn. Builds for GPUs start it by fork where vLLM is used as a library.
"""

import multiprocessing
import os

get_context = multiprocessing.get_context


def get_chosen_context(method=None):
    return get_context(os.environ["ENGINE_CORE"] if method == "spawn" else method)


multiprocessing.get_context = get_chosen_context
