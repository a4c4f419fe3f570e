"""Exact token ids from an unmodified vLLM, kept with the rollout that they belong to.

A runner takes rollouts from a store, and a trainer takes triplets (prompt ids, response ids, reward) from it:

    import agentlightning as agl

    with agl.open_store("http://127.0.0.1:4747") as store:  # or the path of a file, or postgresql://
        queued = store.enqueue_rollout({"question": "Paris?"})
        while rollout := store.dequeue_rollout(worker_id="runner-1"):  # None: the queue is empty
            answer = run_my_agent(base_url=rollout.base_url("http://localhost:8000"))
            rollout.reward(1.0)
            rollout.finish("succeeded")
        store.wait_for_rollouts([queued.rollout_id], recorded=True)  # ended, and vLLM has written every call
        for triplet in store.triplets():
            print(triplet.prompt_token_ids, triplet.response_token_ids, triplet.reward)

vLLM itself needs no program: start it with `AGL_INSTRUMENT=1` and `AGL_STORE`. `import agentlightning` loads none of
the modules below; each is imported when one of its names is first used.
"""

# Arms this interpreter if AGL_INSTRUMENT asks for it and no .pth file was run.
import _agentlightning  # noqa: F401  # pyright: ignore[reportUnusedImport]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agentlightning.completeness import Completeness, Shortfall
    from agentlightning.drift import AttemptDrift, Break
    from agentlightning.errors import (
        AgentLightningError,
        InvalidRecord,
        LogprobsDiffer,
        NotFound,
        RolloutTooLarge,
        RolloutUnderWay,
        StoreError,
        StoreRefused,
        StoreUnavailable,
        TrainingError,
        UnusableRows,
        WeightsRefused,
    )
    from agentlightning.generation import Choice, Generation
    from agentlightning.instrumentation import instrument_vllm, status, uninstrument_vllm
    from agentlightning.rollout_name import rollout, rollouts
    from agentlightning.rollout_records import (
        Attempt,
        NewRollout,
        Pruned,
        Resources,
        Rollout,
        RolloutConfig,
        Span,
        Worker,
    )
    from agentlightning.store import Store, open_store
    from agentlightning.trajectory import Trajectory
    from agentlightning.triplet import Triplet

__all__ = [
    "AgentLightningError",
    "Attempt",
    "AttemptDrift",
    "Break",
    "Choice",
    "Completeness",
    "Generation",
    "InvalidRecord",
    "LogprobsDiffer",
    "NewRollout",
    "NotFound",
    "Pruned",
    "Resources",
    "Rollout",
    "RolloutConfig",
    "RolloutTooLarge",
    "RolloutUnderWay",
    "Shortfall",
    "Span",
    "Store",
    "StoreError",
    "StoreRefused",
    "StoreUnavailable",
    "TrainingError",
    "Trajectory",
    "Triplet",
    "UnusableRows",
    "WeightsRefused",
    "Worker",
    "__version__",
    "instrument_vllm",
    "open_store",
    "rollout",
    "rollouts",
    "status",
    "uninstrument_vllm",
]

__version__ = "0.1.0"

_HOMES = {
    "agentlightning.completeness": ("Completeness", "Shortfall"),
    "agentlightning.drift": ("AttemptDrift", "Break"),
    "agentlightning.errors": (
        *("AgentLightningError", "InvalidRecord", "LogprobsDiffer", "NotFound", "TrainingError", "UnusableRows"),
        "WeightsRefused",
        *("RolloutTooLarge", "RolloutUnderWay", "StoreError", "StoreRefused", "StoreUnavailable"),
    ),
    "agentlightning.generation": ("Choice", "Generation"),
    "agentlightning.instrumentation": ("instrument_vllm", "status", "uninstrument_vllm"),
    "agentlightning.rollout_name": ("rollout", "rollouts"),
    "agentlightning.rollout_records": (
        *("Attempt", "NewRollout", "Pruned", "Resources", "Rollout"),
        *("RolloutConfig", "Span", "Worker"),
    ),
    "agentlightning.store": ("Store", "open_store"),
    "agentlightning.trajectory": ("Trajectory",),
    "agentlightning.triplet": ("Triplet",),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            found = globals()[name] = getattr(import_module(module), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> "list[str]":
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
