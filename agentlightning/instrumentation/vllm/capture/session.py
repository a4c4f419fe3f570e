"""From the capture to the recorder: this process's recorder, and the calls that what it is given belongs to.

On the event loop a generation costs the same however long it is: vLLM's lists are taken as they are, and the thread
that writes makes of them what is kept.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import agentlightning
from agentlightning import settings
from agentlightning.generation import Generation
from agentlightning.instrumentation.vllm._isolation import contained
from agentlightning.instrumentation.vllm.capture.metrics import Observer
from agentlightning.recorder import Recorder
from agentlightning.sender import ID_LIMIT, Sender, Vocabulary

__all__ = ["is_on", "keep", "note_engine", "note_model", "recorder", "report", "sender", "served_name"]

# An integer of Python's, and its place in a list.
BYTES_PER_ID = 36
# What else a generation holds on to.
BYTES_PER_GENERATION = 2000


def is_on() -> bool:
    """Whether generations are kept: `AGL_STORE` is set."""
    return settings.store() is not None


def recorder() -> Recorder:
    """The recorder of this process for the store that `AGL_STORE` names now.

    A program may be instrumented again with another store. What was recorded before goes to the store of that time,
    whose recorder stays until the process ends.
    """
    url = settings.store()
    assert url is not None, "asked for where nothing is kept"
    return _recorder(url, settings.queue_bytes())


@functools.cache
def _recorder(url: str, queue_bytes: int) -> Recorder:
    return Recorder(url, queue_bytes, sender, Observer())


def keep(build: Callable[[], Generation], token_ids: int, more_bytes: int = 0) -> None:
    """Have a generation kept.

    Args:
        build: makes it, in the thread that writes.
        token_ids: how many ids it holds on to until then, as Python's integers.
        more_bytes: what else it holds on to, if that is much.
    """
    recorder().record(build, BYTES_PER_GENERATION + BYTES_PER_ID * token_ids + more_bytes)


def report() -> dict[str, Any] | None:
    """For the status: where generations are kept, and what has become of them; None where they are not kept."""
    if not is_on():
        return None
    return {"store": settings.without_secrets(settings.store() or ""), **asdict(recorder().counters())}


# For whom this process records: what its store is told of it, and of the model that it serves.


class _Served(NamedTuple):
    """What is known of the engine: the model's name, and each token's id, as the tokenizer has them."""

    model: str | None = None
    ids: Mapping[Any, int] | None = None
    special: Collection[int] = ()


_served = _Served()
_started_at: int
_said: tuple[_Served, Sender] | None


def _begin() -> None:
    """A process begins, which is another sender than the one that has forked it."""
    global _started_at, _said
    # Not when it is asked for: generations may have been lost by then.
    _started_at, _said = time.time_ns(), None


_begin()
os.register_at_fork(after_in_child=_begin)


def served_name(model_config: Any) -> str | None:
    """The name that a frontend answers with: the first that the model is served under."""
    names = getattr(model_config, "served_model_name", None)
    return names[0] if isinstance(names, list) else names


def note_model(model_config: Any) -> None:
    """Note which model is served."""
    global _served
    _served = _served._replace(model=served_name(model_config))


def note_engine(processor: Any, model_config: Any) -> None:
    """Note which model is served, and its vocabulary.

    In the thread that makes the engine, and before that serves: of two threads that use a tokenizer at once, either may
    be told "Already borrowed", vLLM's too.

    Args:
        processor: vLLM's `OutputProcessor`, which has the tokenizer.
    """
    note_model(model_config)
    contained("reading the vocabulary", _note_vocabulary, getattr(processor, "tokenizer", None))


def _note_vocabulary(tokenizer: Any) -> None:
    global _served
    # In 0.8.5 it is inside of a TokenizerGroup, which has no vocabulary itself.
    if not hasattr(tokenizer, "get_vocab"):
        tokenizer = getattr(tokenizer, "tokenizer", None)
    # With --skip-tokenizer-init there is none.
    if tokenizer is not None:
        # vLLM has both ready.
        _served = _served._replace(ids=tokenizer.get_vocab(), special=tokenizer.all_special_ids)


def sender() -> Sender:
    """Who records, as far as it is known: the same until more is. For the recorder's thread."""
    global _said
    served = _served
    if _said is None:
        _said = _Served(), _this_process()
    if _said[0] is not served:
        vocabulary = contained("putting the vocabulary together", _vocabulary, served)
        _said = served, replace(_said[1], model=served.model, vocabulary=vocabulary)
    return _said[1]


def _this_process() -> Sender:
    return Sender(
        host=os.uname().nodename,
        pid=os.getpid(),
        started_at=_started_at,
        version=agentlightning.__version__,
        vllm=getattr(sys.modules.get("vllm"), "__version__", None),
    )


def _vocabulary(served: _Served) -> Vocabulary | None:
    # Tokenizers of models' own may have bytes for tokens.
    ids = {number: token for token, number in (served.ids or {}).items() if isinstance(token, str)}
    highest = max(ids, default=-1)
    if not 0 <= highest < ID_LIMIT:
        return None
    tokens = [ids.get(number) for number in range(highest + 1)]
    return Vocabulary(tokens, frozenset(number for number in served.special if 0 <= number <= highest))
