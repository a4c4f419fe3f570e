"""A real vLLM registers with its store, and sends its vocabulary."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psutil
import vllm
from sqlalchemy import Connection, func, select

import agentlightning
from agentlightning.generation import Generation
from agentlightning.store import open_database, senders, tables
from tests.common.answers import fetch, post
from tests.common.reference import tokenizer
from tests.recording.server import RecordingServer
from tests.recording.test_api_servers import FEW, ask_all, until_kept
from tests.recording.test_endpoints import TALK


@contextmanager
def reading(server: RecordingServer) -> Iterator[Connection]:
    with closing(open_database(server.store, read_only=True)) as database, database.reading() as connection:
        yield connection


def seen(server: RecordingServer) -> list[senders.SenderReport]:
    with reading(server) as connection:
        return senders.recent(connection, 0)


def written(each: senders.SenderReport) -> tuple[int, int, int]:
    return (
        sum(minute.generations for minute in each.minutes),
        sum(minute.prompt_tokens for minute in each.minutes),
        sum(minute.output_tokens for minute in each.minutes),
    )


def ids_of(generation: Generation) -> tuple[list[int], list[list[int]]]:
    """Return the ids of a generation's prompt, which are empty for embeddings, and of its choices."""
    return list(generation.prompt_token_ids or ()), [list(choice.token_ids or ()) for choice in generation.choices]


def test_the_store_knows_the_server_and_counts_its_generations(recording: RecordingServer, rollout: str) -> None:
    post(recording, "/v1/completions", recording.body(prompt="one two", n=3, temperature=1.0))
    kept = recording.recorded()

    [found] = seen(recording)
    assert found.sender.pid == fetch(recording, "/v1/agl/status")["pid"]
    assert (found.sender.version, found.sender.vllm) == (agentlightning.__version__, vllm.__version__)
    assert found.sender.model == recording.model
    prompts = sum(len(ids_of(each)[0]) for each in kept)
    assert written(found) == (len(kept), prompts, sum(len(ids) for each in kept for ids in ids_of(each)[1]))
    # Since before its first answer, however late it was told.
    assert found.sender.started_at < min(each.finished_at for each in kept)
    assert found.lost == 0
    assert fetch(recording, "/v1/agl/status")["counters"]["failures"] == {}


def test_each_id_stands_for_the_tokenizers_own_token(recording: RecordingServer) -> None:
    post(recording, "/v1/chat/completions", recording.body(messages=TALK))
    # Ids that no text becomes: special ones, and halves of characters.
    post(recording, "/v1/completions", recording.body(prompt=[*range(len(tokenizer()))], max_tokens=64))
    kept = recording.recorded()

    for each in kept:
        prompt, choices = ids_of(each)
        with reading(recording) as connection:
            vocabulary = senders.vocabulary_of(connection, each.id)
        assert vocabulary is not None
        for token_ids in (prompt, *choices):
            assert [vocabulary.tokens[each] for each in token_ids] == tokenizer().convert_ids_to_tokens(token_ids)
        assert vocabulary.special == {*tokenizer().all_special_ids}


def test_each_api_server_is_a_sender_and_all_have_one_vocabulary(
    two_api_servers: RecordingServer, rollout: str
) -> None:
    asyncio.run(ask_all(two_api_servers, rollout, FEW))
    until_kept(two_api_servers, rollout, FEW)

    found = seen(two_api_servers)
    processes = psutil.Process(two_api_servers.process.pid).children(recursive=True)
    assert len(found) == len({each.sender.pid for each in found}) == 2
    assert {each.sender.pid for each in found} <= {process.pid for process in processes}
    assert sum(written(each)[0] for each in found) == len(two_api_servers.kept())
    with reading(two_api_servers) as connection:
        # Of each generation, though nothing of a text is kept.
        digests = {senders.vocabulary_digest_of(connection, each.id) for each in two_api_servers.kept()}
        how_many = connection.execute(select(func.count()).select_from(tables.vocabularies)).scalar()
    assert digests == {each.vocabulary_digest for each in found}
    assert len(digests - {None}) == how_many == 1
