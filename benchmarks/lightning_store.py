"""`agl store` on a disk, beside the in-memory store of Agent Lightning 0.3: two servers that are asked the same.

What would make such numbers lie, and what is done about it:

- The client shares the machine with the server. So it does next to nothing (`benchmarks/load.py`): what it sends was
  made before, and what it is answered is looked at afterwards.
- Agent Lightning's store looks through all rollouts that are under way, every ten seconds. So those that a turn has
  started are finished after it: no server ever has more of them than there are runners.
- LiteLLM, which Agent Lightning imports, asks the network for prices when it starts, and waits where there is none. It
  is told not to.
- A server that loses what it is sent is quick. So every answer must be one of success, and afterwards each server must
  say that it has as many rollouts and spans as it was sent.
"""

from __future__ import annotations

import http.client
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from agentlightning.generation import new_id
from agentlightning.rollout_records import RolloutConfig
from agentlightning.store import open_database, tables
from agentlightning.store.database import insert_rows
from agentlightning.store.documents import to_json
from benchmarks.environments import CHECKOUT, interleaved, without_python
from benchmarks.load import HOST, Connection, Load, UnexpectedAnswer, ask, at_once, get, post, send
from benchmarks.machine import BusyMeter
from benchmarks.report import Part, Row, Section, Target, say
from tests.common.vllm import free_port
from tools.peer import peer

IDS, VOCABULARY = 1_024, 151_936
BATCH = 64
RUNNERS = 32
EXPORTERS = 8
READERS = 4
WAITING = 64
FEW = 1_000
PROTOBUF = "application/x-protobuf"
SECONDS = 120
OURS = "agl store, SQLite on a disk"

ROLLOUT = {"input": {"question": "What is 6 x 7?"}, "mode": "train", "metadata": {"split": 1}}


@dataclass(frozen=True)
class Sizes:
    """The amount that is measured.

    Attributes:
        rollouts: of a turn, as `spans`, `batches` and `reads`.
        read: spans of the rollout that is read.
        kept: spans that our server is sent before its memory is measured.
        kept_by_peer: spans that the other one is sent.
        dequeued: of a turn, by each of those that wait.
    """

    rounds: int
    rollouts: int
    spans: int
    batches: int
    reads: int
    read: int
    starts: int
    kept: int
    kept_by_peer: int
    finished: int
    dequeued: int


FULL = Sizes(
    rounds=15,
    rollouts=512,
    spans=512,
    batches=24,
    reads=8,
    read=512,
    starts=6,
    kept=100_000,
    kept_by_peer=20_000,
    finished=1_000_000,
    dequeued=4,
)
QUICK = Sizes(
    rounds=3,
    rollouts=256,
    spans=128,
    batches=8,
    reads=4,
    read=512,
    starts=1,
    kept=10_000,
    kept_by_peer=2_000,
    finished=100_000,
    dequeued=2,
)

STARTED, ADDED, EXPORTED, READ = "Rollouts started", "Spans added", "Spans added over OTLP", "Spans read"
TARGETS = {
    STARTED: Target(2, at_least=True),
    ADDED: Target(3, at_least=True),
    EXPORTED: Target(5, at_least=True),
    READ: Target(3, at_least=True),
}

ABOUT = (
    "Both servers run at the same time and take turns with the same requests, from a client that keeps its connections "
    f"open. A span has {IDS:,} token ids in its attributes. Every answer was one of success, and afterwards each "
    "server had as many rollouts and spans as it was sent."
)


def measure(quick: bool) -> Part:
    """Everything, with stores that are gone afterwards."""
    sizes = QUICK if quick else FULL
    commands = peer()
    busy = BusyMeter(lambda: [process.pid for process in psutil.Process().children(recursive=True)])
    with tempfile.TemporaryDirectory(prefix="agl-bench-") as name, busy.running():
        sections = uvloop.run(all_of(Servers(Path(name), commands), sizes))
    return Part("agl store", ABOUT, sections, busy.share_of_others())


async def all_of(servers: Servers, sizes: Sizes) -> list[Section]:
    with servers.theirs() as theirs, servers.ours() as ours:
        sections = await rates((theirs, ours), sizes, TARGETS)
    sections += [await memory(servers, sizes), starting(servers, sizes.starts), await dequeuing(servers, sizes)]
    return sections


class Server:
    """One that runs, and what it was sent."""

    def __init__(self, label: str, command: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.label = label
        self._log = log
        self.port = free_port()
        self.rollouts = self.spans = 0
        with log.open("wb") as output:
            started = time.perf_counter()
            self._process = subprocess.Popen(
                [*command, f"--host={HOST}", f"--port={self.port}"], env=env, stdout=output, stderr=output
            )
        self._wait_until_healthy()
        self.seconds_to_start = time.perf_counter() - started

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                sys.exit(f"{self.label} does not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.002)

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=SECONDS)
        try:
            connection.request("GET", "/v1/agl/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def mebibytes(self) -> float:
        """Its resident memory, with that of its child processes."""
        process = psutil.Process(self.pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / 2**20

    async def send(self, requests: Sequence[bytes], connections: int) -> Load:
        return await send(self.port, requests, connections)

    async def start_rollouts(self, count: int) -> tuple[Load, list[Any]]:
        """Returns the rollouts, too."""
        request = post("/v1/agl/rollouts", msgspec.json.encode(ROLLOUT))
        load = await self.send([request] * count, RUNNERS)
        self.rollouts += count
        return load, load.parsed()

    @asynccontextmanager
    async def under_way(self, count: int) -> AsyncIterator[list[Any]]:
        """Rollouts that are finished afterwards."""
        _, rollouts = await self.start_rollouts(count)
        yield rollouts
        await self.finish(rollouts)

    async def finish(self, rollouts: Sequence[Any]) -> None:
        await self.send([finishing(each) for each in rollouts], RUNNERS)

    async def check(self) -> None:
        """Check that it has what it was sent."""
        said = await ask(self.port, get("/v1/agl/statistics"))
        has, sent = (said["total_rollouts"], said["total_spans"]), (self.rollouts, self.spans)
        if has != sent:
            raise UnexpectedAnswer(f"{self.label} has {has} rollouts and spans, and was sent {sent}")


class Servers:
    """Starts them, each with a store of its own in a folder.

    Args:
        commands: the folder of the other one's.
    """

    def __init__(self, folder: Path, commands: Path) -> None:
        self._folder = folder
        self._commands = commands
        self._started = 0
        site_packages = commands.parent.glob("lib/python*/site-packages")
        version = next(iter(distributions(name="agentlightning", path=[str(each) for each in site_packages]))).version
        self.their_label = f"Agent Lightning {version}, in memory"

    def theirs(self) -> AbstractContextManager[Server]:
        # In the folder, or else it would import this package, which has the name of its own.
        env = {**without_python(), "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": str(self._folder)}
        return running(self.their_label, [str(self._commands / "agl"), "store"], env, self._new_log())

    def ours(self, path: Path | None = None, label: str = OURS) -> AbstractContextManager[Server]:
        """
        Args:
            path: the store; a new one if not given.
        """
        return agl_store(path or self.new_path(), self._new_log(), label)

    def new_path(self) -> Path:
        self._started += 1
        return self._folder / f"{self._started}.db"

    def _new_log(self) -> Path:
        return self.new_path().with_suffix(".log")


def agl_store(store: Path | str, log: Path, label: str = OURS) -> AbstractContextManager[Server]:
    """Ours, as it runs meanwhile.

    Args:
        store: the path of a file, or the URL of a database.
    """
    command = [sys.executable, "-m", "agentlightning", "store", f"--store={store}"]
    return running(label, command, {**without_python(), "PYTHONPATH": str(CHECKOUT)}, log)


@contextmanager
def running(label: str, command: Sequence[str], env: dict[str, str], log: Path) -> Iterator[Server]:
    server = Server(label, command, env, log)
    try:
        yield server
    finally:
        server.stop()


async def rates(servers: Sequence[Server], sizes: Sizes, targets: Mapping[str, Target]) -> list[Section]:
    """Measure how much two servers do a second.

    Args:
        targets: of the second, by what is done.
    """

    async def rate(title: str, about: str, turn: Callable[[Server], Awaitable[float]]) -> Section:
        return await turns(servers, sizes.rounds, title, "a second", about, turn, targets.get(title))

    return [
        await rate(
            STARTED,
            f"One a request, {RUNNERS} requests at once.",
            lambda server: rollouts_started(server, sizes.rollouts),
        ),
        await rate(
            ADDED,
            f"One a request, {RUNNERS} requests at once, each of a rollout of its own.",
            lambda server: spans_added(server, sizes.spans),
        ),
        await rate(
            EXPORTED,
            f"{BATCH} a request, in protobuf, {EXPORTERS} requests at once, each of a rollout of its own.",
            lambda server: spans_exported(server, sizes.batches),
        ),
        await rate(
            READ,
            f"All {sizes.read} of a rollout a request, {READERS} requests at once.",
            await reading(servers, sizes),
        ),
    ]


async def turns(
    servers: Sequence[Server],
    rounds: int,
    title: str,
    unit: str,
    about: str,
    turn: Callable[[Server], Awaitable[float]],
    target: Target | None = None,
) -> Section:
    """Measure in turns what each of two servers does: the first, and the second beside it."""
    measured: dict[Server, list[float]] = {server: [] for server in servers}
    for server in interleaved(list(servers), rounds, title):
        measured[server].append(await turn(server))
    for server in servers:
        await server.check()
    first, second = servers
    rows = [
        Row.of(first.label, measured[first], measured[first]),
        Row.of(second.label, measured[second], measured[first], target),
    ]
    return Section(title, unit, about, rows)


async def rollouts_started(server: Server, count: int) -> float:
    load, rollouts = await server.start_rollouts(count)
    await server.finish(rollouts)
    return count / load.seconds


async def spans_added(server: Server, count: int) -> float:
    async with server.under_way(RUNNERS) as rollouts:
        requests = [
            post("/v1/agl/spans", span(rollouts[number % RUNNERS], number // RUNNERS + 1)) for number in range(count)
        ]
        load = await server.send(requests, RUNNERS)
        server.spans += count
    return count / load.seconds


async def spans_exported(server: Server, batches: int) -> float:
    async with server.under_way(EXPORTERS) as rollouts:
        load = await export(server, rollouts, batches)
    return batches * BATCH / load.seconds


async def export(server: Server, rollouts: Sequence[Any], batches: int) -> Load:
    requests = [
        post("/v1/traces", exported(rollouts[number % len(rollouts)]), content_type=PROTOBUF)
        for number in range(batches)
    ]
    load = await server.send(requests, len(rollouts))
    server.spans += batches * BATCH
    return load


async def reading(servers: Sequence[Server], sizes: Sizes) -> Callable[[Server], Awaitable[float]]:
    """A turn, and the rollouts that it reads."""
    requests: dict[Server, bytes] = {}
    for server in servers:
        async with server.under_way(1) as rollouts:
            await export(server, rollouts, sizes.read // BATCH)
        asked = {"rollout_id": rollouts[0]["rollout_id"], "limit": -1}
        requests[server] = post("/v1/agl/spans/search", msgspec.json.encode(asked))
        check_spans(await ask(server.port, requests[server]), sizes.read)

    async def turn(server: Server) -> float:
        load = await server.send([requests[server]] * sizes.reads, READERS)
        check_spans(load.parsed()[-1], sizes.read)
        return sizes.reads * sizes.read / load.seconds

    return turn


def check_spans(page: Any, count: int) -> None:
    """Check that a page has all spans of a rollout, in their order, each with its ids."""
    numbers = [each["sequence_id"] for each in page["items"]]
    ids = {len(each["attributes"]["response_token_ids"]) for each in page["items"]}
    if len(numbers) != count or numbers != sorted(numbers) or ids != {IDS}:
        raise UnexpectedAnswer(f"{len(numbers)} spans of {count}, with {ids} ids")


async def memory(servers: Servers, sizes: Sizes) -> Section:
    """After as many spans as a run of some hours leaves."""
    measured: list[tuple[str, float]] = []
    for count, running in ((sizes.kept_by_peer, servers.theirs()), (sizes.kept, servers.ours())):
        with running as server:
            say(f"memory: {count:,} spans to {server.label}")
            batches = count // BATCH + 1
            async with server.under_way(EXPORTERS) as rollouts:
                for first in range(0, batches, BATCH):
                    await export(server, rollouts, min(BATCH, batches - first))
            await server.check()
            measured.append((f"{count:,} spans: {server.label}", server.mebibytes()))
    (label, theirs), (our_label, ours) = measured
    rows = [Row.of(label, [theirs], [theirs]), Row.of(our_label, [ours], [theirs], Target(0.5))]
    fewer = (
        f" The first was sent only {sizes.kept_by_peer:,} spans, the second {sizes.kept:,}: with as many, the ratio "
        "would be smaller."
    )
    about = f"Resident memory of a server that was sent spans over OTLP, {BATCH} a request."
    return Section("Memory", "MiB", about + (fewer if sizes.kept_by_peer < sizes.kept else ""), rows)


def starting(servers: Servers, starts: int) -> Section:
    """From asking for the process to its health, with a new store."""
    measured: dict[str, list[float]] = {servers.their_label: [], OURS: []}
    for running in interleaved([servers.theirs, servers.ours], starts, "Start"):
        with running() as server:
            measured[server.label].append(server.seconds_to_start)
    theirs, ours = measured.values()
    rows = [Row.of(servers.their_label, theirs, theirs), Row.of(OURS, ours, theirs, Target(0.2))]
    about = "From asking for the process to the first 200 from /v1/agl/health; LiteLLM is told not to ask the network."
    return Section("Start", "s", about, rows)


async def dequeuing(servers: Servers, sizes: Sizes) -> Section:
    """Measure whether our store is slower once it has been in use for long."""
    paths = {count: servers.new_path() for count in (FEW, sizes.finished)}
    for count, path in paths.items():
        say(f"dequeue: writing {count:,} finished rollouts")
        fill(path, count)
    with (
        servers.ours(paths[FEW], f"among {FEW:,} rollouts") as few,
        servers.ours(paths[sizes.finished], f"among {sizes.finished:,}") as many,
    ):
        few.rollouts, many.rollouts = paths
        return await dequeued((few, many), sizes, Target(1.5))


async def dequeued(servers: Sequence[Server], sizes: Sizes, target: Target | None = None) -> Section:
    """Measure how long a runner waits for its next rollout."""
    about = (
        f"{WAITING} runners at once, each of which finishes a rollout before it asks for the next; the mean of a turn."
    )
    return await turns(
        servers,
        sizes.rounds,
        "Dequeuing a rollout",
        "ms",
        about,
        lambda server: dequeue_turn(server, sizes.dequeued),
        target,
    )


async def dequeue_turn(server: Server, each: int) -> float:
    """Milliseconds, in the mean."""
    queued = msgspec.json.encode({"rollouts": [ROLLOUT] * (WAITING * each)})
    await server.send([post("/v1/agl/queues/rollouts/enqueue", queued)], 1)
    server.rollouts += WAITING * each
    took: list[float] = []
    found: set[str] = set()

    async def run(number: int, connection: Connection) -> None:
        request = post("/v1/agl/queues/rollouts/dequeue", msgspec.json.encode({"worker_id": f"runner-{number}"}))
        for _ in range(each):
            started = time.perf_counter()
            answer = await connection.ask(request)
            took.append(time.perf_counter() - started)
            [rollout] = msgspec.json.decode(answer)
            found.add(rollout["rollout_id"])
            await connection.ask(finishing(rollout))

    await at_once(server.port, WAITING, run)
    if len(found) != WAITING * each:
        raise UnexpectedAnswer(f"{len(found)} of {WAITING * each} rollouts were dequeued")
    return sum(took) / len(took) * 1e3


def fill(path: Path, count: int) -> None:
    """A store of finished rollouts, each with its attempt."""
    database = open_database(str(path))
    now, config = time.time(), to_json(RolloutConfig().as_dict())
    task, metadata = (msgspec.json.encode(ROLLOUT[name]).decode() for name in ("input", "metadata"))
    columns = task, now, now, "train", None, "succeeded", config, metadata, None, 1, 0
    rollouts = ((key, f"ro-{new_id()}", *columns) for key in range(1, count + 1))
    ended = now, now, "succeeded", "runner-0", now, None, None
    attempts = ((key, 1, f"at-{new_id()}", *ended) for key in range(1, count + 1))
    while some := list(islice(rollouts, 20_000)):
        with database.writing() as connection:
            insert_rows(connection, tables.rollouts, some)
            insert_rows(connection, tables.attempts, list(islice(attempts, 20_000)))
    database.close()


def finishing(rollout: Any) -> bytes:
    attempt = rollout["attempt"]["attempt_id"]
    return post(f"/v1/agl/rollouts/{rollout['rollout_id']}/attempts/{attempt}", b'{"status":"succeeded"}')


def random_hex(size: int) -> str:
    return os.urandom(size).hex()


draw = random.Random(0)
# A few lists for all spans: to draw each of their own would take the client longer than the server to keep them.
TOKEN_IDS = [[draw.randrange(VOCABULARY) for _ in range(IDS)] for _ in range(16)]


def span(rollout: Any, sequence_id: int) -> bytes:
    """Make a span as Agent Lightning's client sends one."""
    trace_id, span_id, now = random_hex(16), random_hex(8), time.time()
    context = {"trace_id": trace_id, "span_id": span_id, "is_remote": False, "trace_state": {}}
    return msgspec.json.encode(
        {
            "rollout_id": rollout["rollout_id"],
            "attempt_id": rollout["attempt"]["attempt_id"],
            "sequence_id": sequence_id,
            "trace_id": trace_id,
            "span_id": span_id,
            "parent_id": None,
            "name": "openai.chat.completion",
            "status": {"status_code": "OK", "description": None},
            "attributes": {"gen_ai.response.id": span_id, "response_token_ids": draw.choice(TOKEN_IDS)},
            "events": [],
            "links": [],
            "start_time": now - 1,
            "end_time": now,
            "context": context,
            "parent": None,
            "resource": {"attributes": {"service.name": "runner"}, "schema_url": ""},
        }
    )


def token_ids_attribute(token_ids: Sequence[int]) -> KeyValue:
    attribute = KeyValue(key="response_token_ids")
    values = attribute.value.array_value.values
    for number in token_ids:
        values.add().int_value = number
    return attribute


ATTRIBUTES = [token_ids_attribute(each) for each in TOKEN_IDS]


def exported(rollout: Any) -> bytes:
    """A batch of spans as OpenTelemetry's exporter sends one."""
    request = ExportTraceServiceRequest()
    of_resource = request.resource_spans.add()
    about = {
        "service.name": "runner",
        "agentlightning.rollout_id": rollout["rollout_id"],
        "agentlightning.attempt_id": rollout["attempt"]["attempt_id"],
    }
    for name, value in about.items():
        of_resource.resource.attributes.add(key=name).value.string_value = value
    of_scope = of_resource.scope_spans.add()
    of_scope.scope.name = "opentelemetry.instrumentation.openai"
    trace_id, now = os.urandom(16), time.time_ns()
    for _ in range(BATCH):
        each = of_scope.spans.add(
            trace_id=trace_id,
            span_id=os.urandom(8),
            name="openai.chat.completion",
            kind=Span.SPAN_KIND_CLIENT,
            start_time_unix_nano=now - 10**9,
            end_time_unix_nano=now,
            attributes=[draw.choice(ATTRIBUTES)],
        )
        each.status.code = Status.STATUS_CODE_OK
    return request.SerializeToString()
