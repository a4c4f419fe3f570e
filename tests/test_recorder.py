"""The recorder: no caller waits for the store, and lost generations are counted and recorded."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest

from agentlightning.errors import InvalidRecord, NotFound, StoreRefused, StoreUnavailable
from agentlightning.generation import Generation
from agentlightning.recorder import LOST, Recorder, _connection, _trouble
from agentlightning.recorder import _recorder as recording
from agentlightning.recorder._recorder import GATHERING_SECONDS
from agentlightning.sender import Progress, Sender, UnfinishedCalls
from agentlightning.store import Store, open_database, open_store, senders, watermarks
from agentlightning.store.database_store import DatabaseStore
from tests.common.generations import generation

pytestmark = pytest.mark.tier("check")

SECONDS = 60
NOBODY = 65534
NBYTES = 1_000
PROGRAM = """\
import sys
from agentlightning.recorder import Recorder
from tests.common.generations import generation

recorder = Recorder(sys.argv[1], 1 << 30)
# To import what the store needs may take longer, on a busy machine, than a program that ends waits for its writes.
recorder.start(patience=60)
for number in range(300):
    recorder.record(lambda number=number: generation(number), 1_000)
"""
ROOMY = 1 << 30


def record(recorder: Recorder, generations: list[Generation]) -> None:
    for each in generations:
        recorder.record(lambda each=each: each, NBYTES)


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def kept(path: Path) -> list[str]:
    with open_store(str(path), read_only=True) as store:
        return [each.id for each in store.generations()]


def ids(generations: list[Generation]) -> list[str]:
    return [each.id for each in generations]


def some(count: int, first: int = 0, prompt: int = 12) -> list[Generation]:
    return [generation(number, prompt=prompt) for number in range(first, first + count)]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the file by another writer, until the end of the block."""
    open_store(str(path)).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as another:
        another.execute("BEGIN IMMEDIATE")
        yield
        another.execute("ROLLBACK")


@contextlib.contextmanager
def not_as_root(folder: str) -> Iterator[None]:
    """root may write any file; so not as root, and in a folder of whoever it is instead."""
    if os.geteuid() != 0:
        yield
        return
    os.chown(folder, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "generations.db"


@pytest.fixture
def recorder(path: Path) -> Iterator[Recorder]:
    recorder = Recorder(str(path), ROOMY)
    yield recorder
    recorder.close()


def test_recorded_generations_are_stored_and_counted(recorder: Recorder, path: Path) -> None:
    generations = some(2_000)

    record(recorder, generations)
    recorder.close()

    assert kept(path) == ids(generations)
    counters = recorder.counters()
    assert (counters.generations, counters.prompt_tokens, counters.output_tokens) == (2_000, 24_000, 10_000)
    assert (counters.queue_bytes, counters.trouble, counters.failed_writes) == (0, None, 0)
    assert counters.lost == dict.fromkeys(LOST, 0)
    assert 1 <= sum(counters.writes) <= 2_000
    assert counters.write_seconds > 0


def test_a_single_generation_is_stored_soon(recorder: Recorder, path: Path) -> None:
    (only,) = some(1)

    record(recorder, [only])

    until(lambda: recorder.counters().generations == 1)
    assert kept(path) == [only.id]


def test_the_store_is_not_opened_before_the_first_generation(path: Path) -> None:
    Recorder(str(path), ROOMY).close()

    assert not path.exists()


def test_a_started_recorder_opens_its_store_at_once(recorder: Recorder, path: Path) -> None:
    recorder.start()

    until(path.exists)


def test_queued_generations_count_by_their_given_bytes(recorder: Recorder, path: Path) -> None:
    with locked(path):
        record(recorder, some(10))
        assert recorder.counters().queue_bytes == 10 * NBYTES

    until(lambda: recorder.counters().queue_bytes == 0)


def test_a_full_queue_loses_generations_and_records_the_loss(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder, generations = Recorder(str(path), 50 * NBYTES), some(80)

    caplog.set_level(logging.INFO)
    with locked(path):
        # Were it to wait for the store, it would wait here for ever.
        record(recorder, generations)
        until(lambda: recorder.counters().trouble)
        assert str(recorder.counters().trouble).startswith(f"{path} cannot be used now: ")
        assert recorder.counters().lost["queue full"] == 30
        assert recorder.counters().generations == 0
    until(lambda: recorder.counters().generations == 50)
    recorder.close()

    assert kept(path) == ids(generations[:50])
    assert recorder.counters().trouble is None
    (full,) = (message for message in caplog.messages if "is full" in message)
    why = "the queue of 0 MiB (AGL_QUEUE_MB) is full, since the store is too slow or away"
    assert full == f"agentlightning: {why}; generations lost so far: 1"
    assert "agentlightning: generations are written to the store again" in caplog.messages
    with open_store(str(path)) as store:
        (loss,) = store.losses()
    assert (loss.count, loss.reason, loss.pid, loss.host) == (30, "queue full", os.getpid(), os.uname().nodename)
    assert loss.first_at <= loss.last_at <= time.time_ns()


def test_a_generation_larger_than_the_queue_is_accepted_when_it_is_empty(path: Path) -> None:
    recorder, (large, after) = Recorder(str(path), NBYTES), some(2)

    with locked(path):
        recorder.record(lambda: large, 5 * NBYTES)
        recorder.record(lambda: after, 1)
    recorder.close()

    assert kept(path) == [large.id]
    assert recorder.counters().lost["queue full"] == 1


def test_a_generation_that_cannot_be_built_is_lost_alone(recorder: Recorder, path: Path) -> None:
    before, after = some(1), some(1, first=1)

    def fail() -> Generation:
        raise LookupError("no such thing")

    record(recorder, before)
    recorder.record(fail, NBYTES)
    record(recorder, after)
    recorder.close()

    assert kept(path) == ids(before + after)
    assert recorder.counters().lost["not built"] == 1
    with open_store(str(path)) as store:
        (loss,) = store.losses()
    assert (loss.count, loss.reason) == (1, "not built: LookupError('no such thing')")


def test_a_generation_that_the_store_refuses_is_lost_alone(recorder: Recorder, path: Path) -> None:
    generations = some(20)
    generations[7].id = "no UUID"

    record(recorder, generations)
    recorder.close()

    assert kept(path) == ids(generations[:7] + generations[8:])
    assert recorder.counters().lost["refused"] == 1
    with open_store(str(path)) as store:
        (loss,) = store.losses()
    assert (loss.count, loss.reason) == (1, "refused: no UUID: 'no UUID' is not a lower-case UUID")


class Counting(DatabaseStore):
    """A store that counts calls of `add`."""

    adds = 0

    def add(self, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        self.adds += 1
        return super().add(generations, sender_id)


def test_one_invalid_generation_of_five_hundred_costs_no_second_request(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Counting(open_database(str(path)))
    monkeypatch.setattr(_connection, "open_store", lambda url, **options: store)
    recorder, generations = Recorder(str(path), ROOMY), some(500)
    generations[123].id = "no UUID"
    begin = Event()

    def build_when_all_wait() -> Generation:
        # So that they are written at once.
        begin.wait()
        return generations[0]

    recorder.record(build_when_all_wait, NBYTES)
    record(recorder, generations[1:])
    begin.set()
    recorder.close()

    assert kept(path) == ids(generations[:123] + generations[124:])
    counters = recorder.counters()
    assert (counters.generations, counters.lost["refused"], counters.lost["stopped"]) == (499, 1, 0)
    assert store.adds <= 2


class Refusing(DatabaseStore):
    """A store that refuses whatever it is sent, without naming a generation."""

    def add(self, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        raise InvalidRecord("the body cannot be read")


def test_generations_that_are_refused_as_a_whole_are_counted_as_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "open_store", lambda url, **options: Refusing(open_database(url)))
    recorder = Recorder(str(path), ROOMY)

    record(recorder, some(5))
    recorder.close()

    counters = recorder.counters()
    assert (counters.generations, counters.lost["refused"]) == (0, 5)
    with open_store(str(path)) as store:
        assert sum(loss.count for loss in store.losses()) == 5


def test_several_threads_can_record_at_once(recorder: Recorder, path: Path) -> None:
    batches = [some(500, first=500 * number) for number in range(4)]
    threads = [Thread(target=record, args=(recorder, batch)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()

    assert sorted(kept(path)) == sorted(each for batch in batches for each in ids(batch))
    assert (recorder.counters().generations, recorder.counters().queue_bytes) == (2_000, 0)


def test_a_store_that_does_not_exist_yet_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "to come" / "generations.db"
    recorder, generations = Recorder(str(path), ROOMY), some(5)

    record(recorder, generations)
    until(lambda: recorder.counters().trouble)
    assert os.strerror(errno.ENOENT) in str(recorder.counters().trouble)
    path.parent.mkdir()
    until(lambda: recorder.counters().generations == 5)
    recorder.close()

    assert kept(path) == ids(generations)


def test_a_file_that_is_moved_away_is_created_again(recorder: Recorder, path: Path) -> None:
    first, second = some(3), some(3, first=3)
    record(recorder, first)
    until(lambda: recorder.counters().generations == 3)

    for file in path.parent.iterdir():
        file.rename(path.parent / file.name.replace("generations", "old"))
    record(recorder, second)
    until(lambda: recorder.counters().generations == 6)

    assert kept(path) == ids(second)
    assert kept(path.parent / "old.db") == ids(first)


def test_closing_twice_is_a_no_op_and_later_generations_are_counted_as_lost(recorder: Recorder, path: Path) -> None:
    record(recorder, some(1))
    recorder.close()
    recorder.close()

    record(recorder, some(2))

    assert recorder.counters().lost["stopped"] == 2
    assert len(kept(path)) == 1


@pytest.mark.tier("test")
def test_generations_unwritten_at_the_end_are_counted(path: Path) -> None:
    recorder = Recorder(str(path), ROOMY)

    with locked(path):
        record(recorder, some(700))
        recorder.close(timeout=2)
        until(lambda: recorder.counters().lost["stopped"] == 700)

    assert kept(path) == []


def test_the_loss_at_the_end_is_recorded_if_possible(path: Path) -> None:
    recorder, (first, *others) = Recorder(str(path), ROOMY), some(700)
    building, go_on = Event(), Event()

    def build() -> Generation:
        building.set()
        assert go_on.wait(SECONDS)
        return first

    recorder.record(build, NBYTES)
    assert building.wait(SECONDS)
    record(recorder, others)
    # No time is left, and the thread is at work.
    recorder.close(timeout=0)
    go_on.set()
    recorder.close()

    assert kept(path) == [first.id]
    assert recorder.counters().lost["stopped"] == 699
    with open_store(str(path)) as store:
        losses = [*store.losses()]
    assert sum(loss.count for loss in losses) == 699
    assert {loss.reason for loss in losses} == {"stopped: the process ended before they were written"}


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[StoreUnavailable]:
    """Return a store's `add` that refuses the first generations."""
    answers: list[StoreUnavailable] = []
    add = DatabaseStore.add

    def add_if_not_busy(self: DatabaseStore, generations: Sequence[Generation], sender_id: str | None = None) -> int:
        if answers:
            raise answers.pop(0)
        return add(self, generations, sender_id)

    monkeypatch.setattr(DatabaseStore, "add", add_if_not_busy)
    return answers


@pytest.fixture
def pausing(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Return an event that is set when a recorder has begun a pause longer than any test."""
    begun = Event()

    class Noted(Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None and timeout > SECONDS:
                begun.set()
            return super().wait(timeout)

    monkeypatch.setattr(recording, "Event", Noted)
    return begun


def test_a_store_that_asked_for_a_long_pause_is_asked_again_before_the_end(
    path: Path, busy: list[StoreUnavailable], pausing: Event
) -> None:
    busy += [StoreUnavailable("busy", retry_after=3_600.0)] * 3
    recorder, generations = Recorder(str(path), ROOMY), some(5)
    record(recorder, generations)
    assert pausing.wait(SECONDS)

    recorder.close()

    assert kept(path) == ids(generations)
    assert recorder.counters().lost == dict.fromkeys(LOST, 0)


@pytest.mark.tier("test")
def test_generations_unwritten_during_a_long_pause_are_recorded_as_lost(
    path: Path, busy: list[StoreUnavailable], pausing: Event
) -> None:
    busy += [StoreUnavailable("busy", retry_after=3_600.0)] * 10_000
    recorder = Recorder(str(path), ROOMY)
    record(recorder, some(5))
    assert pausing.wait(SECONDS)

    recorder.close(timeout=2)
    until(lambda: recorder.counters().lost["stopped"] == 5)
    recorder.close()

    assert kept(path) == []
    with open_store(str(path)) as store:
        assert [(loss.count, loss.reason) for loss in store.losses()] == [
            (5, "stopped: the process ended before they were written")
        ]


def test_a_program_that_ends_without_closing_the_recorder_loses_nothing(path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, path], check=True, timeout=SECONDS)

    assert len(kept(path)) == 300


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
def test_generations_waiting_for_a_full_disk_are_written_once(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        path, generations = disk / "generations.db", some(100, prompt=5_000)
        recorder = Recorder(str(path), 60 * NBYTES)
        record(recorder, generations)
        until(lambda: recorder.counters().trouble)
        assert str(recorder.counters().trouble).startswith(f"{path} cannot be used now: ")
        assert recorder.counters().lost["queue full"] == 40

        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        until(lambda: recorder.counters().generations == 60)
        recorder.close()

        assert kept(path) == ids(generations[:60])
        with open_store(str(path)) as store:
            assert [loss.count for loss in store.losses()] == [40]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.forked
def test_generations_waiting_for_a_file_size_limit_are_written_once(path: Path) -> None:
    open_store(str(path)).close()
    generations, recorder = some(100, prompt=5_000), Recorder(str(path), ROOMY)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, unlimited[1]))
    record(recorder, generations)
    until(lambda: recorder.counters().trouble)
    assert str(recorder.counters().trouble).startswith(f"{path} cannot be used now: ")

    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    until(lambda: recorder.counters().generations == 100)
    recorder.close()

    assert kept(path) == ids(generations)


@pytest.mark.forked
def test_generations_waiting_for_a_read_only_file_are_written_once() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, not_as_root(folder):
        path, generations = Path(folder, "generations.db"), some(10)
        open_store(str(path)).close()
        path.chmod(0o400)
        recorder = Recorder(str(path), ROOMY)
        record(recorder, generations)
        until(lambda: recorder.counters().trouble)
        assert str(recorder.counters().trouble).startswith(f"{path} cannot be used now: ")

        # SQLite has given the files beside it the same mode by then.
        for file in Path(folder).iterdir():
            file.chmod(0o600)
        until(lambda: recorder.counters().generations == 10)
        recorder.close()

        assert kept(path) == ids(generations)


def test_a_failing_observer_loses_no_generation(tmp_path: Path) -> None:
    def observe(counters: object) -> None:
        raise ZeroDivisionError

    # Its folder is not there: the first that there is to tell is that.
    path = tmp_path / "later" / "generations.db"
    recorder = Recorder(str(path), ROOMY, observe=observe)
    recorder.start()
    until(lambda: recorder.counters().failed_writes)
    path.parent.mkdir()
    record(recorder, [generation(0), generation(1)])
    recorder.close()

    assert len(kept(path)) == 2


@pytest.mark.forked
def test_a_forked_process_and_its_parent_each_write_their_own_generations(path: Path) -> None:
    recorder, before, in_child, in_parent = Recorder(str(path), ROOMY), some(50), some(50, 50), some(50, 100)
    # So that it is open when the process is forked.
    record(recorder, before[:1])
    until(lambda: recorder.counters().generations == 1)
    record(recorder, before[1:])

    child = os.fork()
    if child == 0:
        record(recorder, in_child)
        recorder.close()
        os._exit(0 if recorder.counters().generations == 50 else 1)
    record(recorder, in_parent)
    recorder.close()

    assert os.waitpid(child, 0)[1] == 0
    assert recorder.counters().generations == 100
    assert kept(path) == ids(before + in_child + in_parent)


@pytest.mark.tier("test")
@pytest.mark.forked
def test_a_fork_does_not_wait_for_a_store_that_does_not_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on, generations = Event(), Event(), some(10)

    def hanging(*arguments: str, **options: float) -> Store:
        store = open_store(*arguments, **options)
        add = store.add

        def wait_and_add(generations: Sequence[Generation], sender_id: str | None = None) -> int:
            begun.set()
            goes_on.wait()
            return add(generations, sender_id)

        monkeypatch.setattr(store, "add", wait_and_add)
        return store

    monkeypatch.setattr("agentlightning.recorder._connection.open_store", hanging)
    recorder = Recorder(str(path), ROOMY)
    record(recorder, generations)
    begun.wait()

    child = os.fork()
    if child == 0:
        os._exit(recorder.counters().generations)
    goes_on.set()
    recorder.close()

    assert os.waitpid(child, 0)[1] == 0
    assert kept(path) == ids(generations)


class Registrar:
    """The `sender` callable of a recorder; its attribute `sender` replaces the default."""

    def __init__(self) -> None:
        self.sender: Sender | None = None
        self._own: Sender | None = None

    def __call__(self) -> Sender:
        if self._own is None or self._own.pid != os.getpid():
            self._own = Sender(host="a host", pid=os.getpid(), started_at=1, version="0.1.0")
        return self.sender or self._own


def counted(path: Path) -> dict[int, int]:
    """Return the number of generations that each process has written, as the store counts them."""
    with closing(open_database(str(path))) as database, database.reading() as connection:
        found = senders.recent(connection, 0)
    return {each.sender.pid: sum(minute.generations for minute in each.minutes) for each in found}


def test_the_sender_is_registered_before_the_first_generation(path: Path) -> None:
    recorder = Recorder(str(path), ROOMY, Registrar())

    recorder.start()

    until(lambda: path.exists() and counted(path) == {os.getpid(): 0})
    recorder.close()


def test_generations_are_stored_under_their_sender_also_in_a_replaced_store(path: Path) -> None:
    recorder, generations = Recorder(str(path), ROOMY, Registrar()), some(5)
    record(recorder, generations[:3])
    until(lambda: recorder.counters().generations == 3)
    assert counted(path) == {os.getpid(): 3}

    for file in path.parent.iterdir():
        file.rename(file.with_name(f"old-{file.name}"))
    record(recorder, generations[3:])
    recorder.close()

    assert kept(path) == ids(generations[3:])
    assert counted(path) == {os.getpid(): 2}


def test_a_changed_sender_is_registered_again(path: Path) -> None:
    registrar = Registrar()
    recorder, generations = Recorder(str(path), ROOMY, registrar), some(2)
    record(recorder, generations[:1])
    until(lambda: recorder.counters().generations == 1)

    registrar.sender = replace(registrar(), model="a model")
    record(recorder, generations[1:])
    recorder.close()

    with closing(open_database(str(path))) as database, database.reading() as connection:
        [found] = senders.recent(connection, 0)
    assert found.sender.model == "a model"
    assert sum(minute.generations for minute in found.minutes) == 2


@pytest.mark.tier("test")
@pytest.mark.parametrize("error", [StoreUnavailable, StoreRefused, InvalidRecord])
def test_a_failed_registration_loses_no_generation_and_is_retried(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    attempts: list[str] = []

    def away(self: DatabaseStore, sender: Sender) -> None:
        attempts.append(sender.id)
        if len(attempts) < 3:
            raise error("no body as large")
        register(self, sender)

    register = DatabaseStore.register_sender
    monkeypatch.setattr(DatabaseStore, "register_sender", away)
    monkeypatch.setattr("agentlightning.recorder._connection.SECONDS_BETWEEN_REGISTRATIONS", 0)
    recorder, generations = Recorder(str(path), ROOMY, Registrar()), some(5)
    record_one_by_one(recorder, generations)
    recorder.close()

    assert kept(path) == ids(generations)
    assert recorder.counters().failed_writes == 0
    assert len(attempts) == 3
    # Of those that were written once it had got through.
    assert 0 < counted(path)[os.getpid()] <= len(generations)


def test_a_sender_whose_vocabulary_is_refused_reports(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_vocabulary(self: DatabaseStore, sender: Sender) -> None:
        self._database.write(lambda connection: senders.register_without_vocabulary(connection, sender, None))
        raise InvalidRecord("a proxy accepts no body as large")

    monkeypatch.setattr(DatabaseStore, "register_sender", refuse_vocabulary)
    recorder = Recorder(str(path), ROOMY, Registrar())
    recorder.start()

    until(lambda: path.exists() and 0 < written_until(path) < float("inf"))
    recorder.close()


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """Return the reports that stores have accepted, in order."""
    found: list[Progress] = []
    report = DatabaseStore.report_progress

    def note_and_report(self: DatabaseStore, sender_id: str, progress: Progress) -> int:
        at = report(self, sender_id, progress)
        found.append(progress)
        return at

    monkeypatch.setattr(DatabaseStore, "report_progress", note_and_report)
    return found


def written_until(path: Path) -> float:
    """Return the moment, in seconds since the epoch, up to which all live senders have written."""
    with closing(open_database(str(path))) as database, database.reading() as connection:
        return watermarks.recorded_until(connection)


def test_a_process_that_was_started_with_patience_is_known_to_its_store(path: Path, tmp_path: Path) -> None:
    recorder = Recorder(str(path), ROOMY, Registrar())
    recorder.start(SECONDS)
    assert counted(path) == {os.getpid(): 0}
    recorder.close()

    # A store that cannot be opened is not waited for: this would take a minute.
    away = Recorder(str(tmp_path / "nowhere" / "generations.db"), ROOMY, Registrar())
    away.start(SECONDS)
    assert away.counters().trouble
    away.close()


def test_an_idle_process_reports_once_a_second(path: Path, reports: list[Progress]) -> None:
    recorder = Recorder(str(path), ROOMY, Registrar())
    recorder.start()
    until(lambda: len(reports) > 3)
    recorder.close()

    told = [each.watermark for each in reports]
    assert told == sorted(told)
    # The second at once: until the store's time is known, the first says nothing.
    assert [each.store_time is None for each in reports[:3]] == [True, False, False]
    assert [each.has_ended for each in reports] == [*[False] * (len(reports) - 1), True]
    assert recorder.counters().failed_writes == 0


def test_a_watermark_passes_a_generation_only_when_it_is_written(path: Path, reports: list[Progress]) -> None:
    recorder, (first, second) = Recorder(str(path), ROOMY, Registrar()), some(2)
    recorder.start()
    until(lambda: reports)
    building, go_on = Event(), Event()

    def build() -> Generation:
        building.set()
        assert go_on.wait(SECONDS)
        return second

    record(recorder, [first])
    recorder.record(build, NBYTES)
    ended_at = time.time()
    assert building.wait(SECONDS)
    assert written_until(path) < ended_at
    go_on.set()

    until(lambda: written_until(path) > ended_at)
    assert kept(path) == ids([first, second])
    recorder.close()


def test_a_watermark_waits_for_a_store_that_cannot_be_written(path: Path) -> None:
    recorder = Recorder(str(path), ROOMY, Registrar())
    recorder.start()
    until(lambda: path.exists() and written_until(path) > 0)
    with locked(path):
        record(recorder, some(3))
        ended_at = time.time()
        until(lambda: recorder.counters().trouble)
        assert written_until(path) < ended_at
    until(lambda: written_until(path) > ended_at)

    assert len(kept(path)) == 3
    assert recorder.counters().trouble is None
    recorder.close()


@pytest.mark.parametrize("at_once", [10, 3 * recording.BATCH_GENERATIONS])
def test_a_watermark_is_reported_with_what_is_written(
    path: Path, reports: list[Progress], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    # Nothing is told unless something is written.
    monkeypatch.setattr(recording, "SECONDS_BETWEEN_REPORTS", 10 * SECONDS)
    recorder = Recorder(str(path), ROOMY, Registrar())
    recorder.start()
    until(lambda: len(reports) == 2)

    record(recorder, some(at_once))
    ended_at = time.time()

    until(lambda: written_until(path) > ended_at)
    assert len(kept(path)) == at_once
    recorder.close()


def test_unfinished_generations_are_reported_by_rollout_and_attempt(path: Path, reports: list[Progress]) -> None:
    under_way = [("r", "a"), ("r", None), ("r", "a"), (None, None)]
    recorder = Recorder(str(path), ROOMY, Registrar(), under_way=lambda: under_way)
    recorder.start()
    until(lambda: reports)
    recorder.close()

    assert reports[0].under_way == [
        UnfinishedCalls("r", "a", 2),
        UnfinishedCalls("r", None, 1),
        UnfinishedCalls(None, None, 1),
    ]
    assert (reports[-1].has_ended, reports[-1].under_way) == (True, ())


def test_losses_are_reported_by_rollout_once(path: Path, reports: list[Progress]) -> None:
    def fail() -> Generation:
        raise LookupError("no such thing")

    recorder, refused = Recorder(str(path), 2 * NBYTES, Registrar()), generation(7)
    refused.id = "no UUID"
    with locked(path):
        recorder.record(fail, NBYTES, lambda: ("not built", "a"))
        record(recorder, [refused])
        for _ in range(3):
            recorder.record(lambda: generation(1), NBYTES, lambda: ("full", None))
    until(lambda: sum(len(each.lost) for each in reports) == 3)
    recorder.close()

    lost = {(each.rollout_id, each.attempt_id, each.count, each.reason) for told in reports for each in told.lost}
    assert lost == {
        ("not built", "a", 1, "not built"),
        (refused.rollout_id, refused.attempt_id, 1, "refused"),
        ("full", None, 3, "queue full"),
    }


def test_more_losses_than_a_report_takes_are_all_named_before_the_moment_passes(
    path: Path, reports: list[Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "LOSSES_AT_ONCE", 1000)
    names = [f"r-{number}" for number in range(4500)]
    recorder = Recorder(str(path), NBYTES, Registrar())
    with locked(path):
        record(recorder, some(1))
        for name in names:
            recorder.record(lambda: generation(1), NBYTES, lambda name=name: (name, None))
    recorder.close()

    assert [each.rollout_id for told in reports for each in told.lost] == names
    parts = [told for told in reports if told.lost]
    assert [len(told.lost) for told in parts] == [1000, 1000, 1000, 1000, 500]
    assert max(told.watermark for told in parts[:-1]) < parts[-1].watermark
    assert not any(told.has_ended for told in parts[:-1])


def nobody() -> tuple[str, str]:
    raise LookupError("no such request")


def test_calls_that_our_code_fails_to_record_are_lost_by_name(path: Path, reports: list[Progress]) -> None:
    recorder = Recorder(str(path), ROOMY, Registrar())
    recorder.note_lost(lambda: ("r", "a"), LookupError("no detokenizer"))
    recorder.note_lost(nobody, LookupError("no detokenizer"))
    generations = some(1)
    record(recorder, generations)
    recorder.close()

    lost = {(each.rollout_id, each.attempt_id, each.reason) for told in reports for each in told.lost}
    assert lost == {("r", "a", "not built"), (None, None, "not built")}
    assert recorder.counters().lost["not built"] == 2
    assert kept(path) == ids(generations)
    with open_store(str(path), read_only=True) as store:
        assert sum(each.count for each in store.losses()) == 2


def test_calls_under_way_at_the_end_are_lost_by_name(path: Path, reports: list[Progress]) -> None:
    recorder = Recorder(str(path), ROOMY, Registrar(), under_way=lambda: [("r", "a"), ("r", "a")])
    recorder.start()
    until(lambda: reports)
    recorder.close()

    assert reports[-1].has_ended
    [lost] = reports[-1].lost
    assert (lost.rollout_id, lost.attempt_id, lost.count, lost.reason) == ("r", "a", 2, "stopped")


def test_a_process_that_cannot_list_what_is_under_way_does_not_say_that_it_ends(
    path: Path, reports: list[Progress]
) -> None:
    lists: list[list[tuple[str, str]]] = [[]]
    recorder = Recorder(str(path), ROOMY, Registrar(), under_way=lambda: lists[0])
    recorder.start()
    until(lambda: reports)
    lists.clear()
    recorder.close()

    assert not reports[-1].has_ended


def test_starting_twice_waits_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    class Noted(Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return True

    recorder = Recorder(str(path), ROOMY)
    monkeypatch.setattr(recorder, "_was_opened", Noted())
    for patience in (SECONDS, 100 * SECONDS):
        recorder.start(patience)
    recorder.close()

    assert [each is not None and 0 < each <= SECONDS for each in waits] == [True, True]


def test_a_store_that_refuses_reports_is_logged_once_until_it_accepts_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The first that is accepted is repeated at once.
    answers = [False, False, False, True, True, False, False]
    report = DatabaseStore.report_progress

    def answer(self: DatabaseStore, sender_id: str, progress: Progress) -> int:
        if answers and not answers.pop(0):
            raise StoreRefused("no such route")
        return report(self, sender_id, progress)

    monkeypatch.setattr(DatabaseStore, "report_progress", answer)
    monkeypatch.setattr(_trouble, "SECONDS_BETWEEN_LOGS", 0)
    monkeypatch.setattr(recording, "SECONDS_BETWEEN_REPORTS", 0.01)
    recorder = Recorder(str(path), ROOMY, Registrar())
    recorder.start()
    until(lambda: not answers)
    recorder.close()

    assert len([message for message in caplog.messages if "refuses to hear" in message]) == 2


def test_an_idle_process_whose_store_hangs_ends_without_naming_a_loss(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opening, go_on = Event(), Event()

    def hang(*arguments: str, **options: float) -> Store:
        opening.set()
        assert go_on.wait(SECONDS)
        return open_store(*arguments, **options)

    monkeypatch.setattr(_connection, "open_store", hang)
    recorder = Recorder(str(path), ROOMY, Registrar())
    recorder.start()
    assert opening.wait(SECONDS)
    recorder.close(0.01)
    assert caplog.messages == []

    go_on.set()
    recorder.close(SECONDS)


def test_a_report_that_fails_is_repeated_and_loses_no_generation(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = [StoreUnavailable("away"), StoreRefused("no such route"), NotFound("who?")]
    report = DatabaseStore.report_progress

    def fail_at_first(self: DatabaseStore, sender_id: str, progress: Progress) -> int:
        if errors:
            raise errors.pop(0)
        return report(self, sender_id, progress)

    monkeypatch.setattr(DatabaseStore, "report_progress", fail_at_first)
    recorder, generations = Recorder(str(path), ROOMY, Registrar()), some(3)
    record(recorder, generations)
    ended_at = time.time()
    until(lambda: path.exists() and recorder.counters().generations == 3 and written_until(path) > ended_at)
    recorder.close()

    assert kept(path) == ids(generations)
    assert recorder.counters().lost == dict.fromkeys(LOST, 0)
    assert [message for message in caplog.messages if "refuses to hear" in message]


def test_a_process_that_ends_says_so(path: Path) -> None:
    recorder = Recorder(str(path), ROOMY, Registrar())
    record(recorder, some(1))
    recorder.close()

    with closing(open_database(str(path))) as database, database.reading() as connection:
        [found] = watermarks.all_of(connection)
    assert (found.state, found.under_way) == ("ended", [])


def record_one_by_one(recorder: Recorder, generations: Sequence[Generation]) -> None:
    """Record each generation when the previous one is written."""
    for number, each in enumerate(generations, 1):
        record(recorder, [each])
        until(lambda number=number: recorder.counters().generations == number)


def refused() -> Sender:
    return Sender(id="no UUID", host="a host", pid=7, started_at=1, version="0.1.0")


def not_known() -> Sender:
    raise RuntimeError("who am I?")


@pytest.mark.parametrize("sender", [refused, not_known])
def test_a_refused_sender_loses_no_generation_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture, sender: Callable[[], Sender]
) -> None:
    recorder, generations = Recorder(str(path), ROOMY, sender), some(2)
    record_one_by_one(recorder, generations)
    recorder.close()

    assert kept(path) == ids(generations)
    assert recorder.counters().failed_writes == 0
    assert [message for message in caplog.messages if "could not be registered" in message] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.mark.forked
def test_a_forked_process_is_another_sender(path: Path) -> None:
    recorder, generations = Recorder(str(path), ROOMY, Registrar()), some(6)
    record(recorder, generations[:1])
    until(lambda: recorder.counters().generations == 1)

    child = os.fork()
    if child == 0:
        record(recorder, generations[1:3])
        recorder.close()
        os._exit(0 if recorder.counters().generations == 2 else 1)
    record(recorder, generations[3:])
    recorder.close()

    assert os.waitpid(child, 0)[1] == 0
    assert counted(path) == {os.getpid(): 4, child: 2}


def test_retries_respect_the_stores_delay_and_are_spread_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test does not wait: the pauses are noted instead."""
    reasons = [
        StoreUnavailable("busy"),
        StoreUnavailable("busy", retry_after=7.0),
        *(StoreUnavailable("away") for _ in range(9)),
    ]
    waits: list[float] = []

    class Noted(Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout != GATHERING_SECONDS:
                waits.append(timeout or 0)
            return self.is_set()

    def busy(*arguments: str, **options: float) -> Store:
        # The first is for the thread, which opens it before there is anything to write.
        if reasons:
            raise reasons.pop(0)
        return open_store(*arguments, **options)

    monkeypatch.setattr(recording, "Event", Noted)
    monkeypatch.setattr(_connection, "open_store", busy)
    generations = [generation(1)]
    recorder = Recorder(str(path), ROOMY)
    record(recorder, generations)
    until(lambda: recorder.counters().generations)
    recorder.close()

    assert kept(path) == ids(generations)
    assert waits[0] == 7.0
    pauses = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0, 2.0]
    assert all(pause / 2 <= wait <= pause for pause, wait in zip(pauses, waits[1:], strict=True))
    assert waits[1:] != pauses
