"""Jobs that become durable per second, each with one chained event, beside queues that chain nothing."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs.home import controller, disk_folder, new_home
from permed_compute.client import RemoteService
from permed_compute.errors import NotFoundError
from permed_compute.queue.events import Anchor, verify
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.server import connect
from permed_compute.queue.sql import SqlQueue
from permed_compute.spec import JobSpec
from permed_compute.testing import postgres

TITLE = "Submitting jobs"
WHY = (
    "A user waits for `submit`, and a study of 10,000 series must not take minutes. Every job is on the disk, with its"
    " event in the hash chain, before its submitter hears of it. Goals: 500/s from one client, so that a script that"
    " submits one by one is no burden; 4,000/s from 64 clients that each wait for their own answer; 10,000/s as one"
    " array. By the controller's socket the clients are other processes on the same cores, and the controller's rounds"
    " go on beside. After each measurement the queue is opened anew, the jobs counted and the chain recomputed."
)

Submit = Callable[[Sequence[JobSpec]], object]
Target = Callable[[], AbstractContextManager["Submit"]]
"""Opens an empty queue, gives what submits to it, and checks at the end what has become durable."""


def cases(quick: bool) -> list[Case]:
    one, each, elements = (50, 4, 500) if quick else (1000, 200, 10_000)
    slow = 2 if quick else 20  # jobs per client of a peer that commits each by itself: the rate is what matters
    rig = _Rig()
    one_by_one, many, array = "one client, a job a call", "64 clients, a job a call", "one array of 10,000 jobs"
    goals: dict[str, dict[str, Any]] = {
        one_by_one: {"goal": "≥ 500/s", "limit": 500},
        many: {"goal": "≥ 4,000/s", "limit": 4000},
        array: {"goal": "≥ 10,000/s", "limit": 10_000},
    }

    def by_socket() -> float:
        return _at_once_by_socket(each)

    def case(group: str, name: str, rate: Callable[[], float], *, peer: bool = False) -> Case:
        # 64 clients by the socket are processes that share the cores with the controller: shown, without a goal.
        goal = {} if peer or (group == many and rate is by_socket) else goals[group]
        return Case(group, name, "jobs/s", "higher", rate, peer=peer, close=rig.close, **goal)

    return [
        case(one_by_one, "ours, SQLite", lambda: _one_by_one(_ours(_sqlite), one)),
        case(one_by_one, "ours, PostgreSQL", lambda: _one_by_one(_ours(rig.postgres), one)),
        case(one_by_one, "ours, SQLite, by the controller's socket", lambda: _one_by_one(_socket, one)),
        case(one_by_one, "huey on SQLite, fsync", lambda: _one_by_one(_huey, one), peer=True),
        case(one_by_one, "INSERT and COMMIT, SQLite", lambda: _one_by_one(_rows(_sqlite), one), peer=True),
        case(one_by_one, "INSERT and COMMIT, PostgreSQL", lambda: _one_by_one(_rows(rig.postgres), one), peer=True),
        case(one_by_one, "the disk alone: 4 KiB and fsync", lambda: _one_by_one(_disk, one), peer=True),
        case(many, "ours, SQLite", lambda: _at_once(_ours(_sqlite), each)),
        case(many, "ours, PostgreSQL", lambda: _at_once(_ours(rig.postgres), each)),
        case(many, "ours, SQLite, by the controller's socket", by_socket),
        case(many, "huey on SQLite, fsync", lambda: _at_once(_huey, slow), peer=True),
        case(many, "INSERT and COMMIT, SQLite", lambda: _at_once(_rows(_sqlite), slow), peer=True),
        case(many, "INSERT and COMMIT, PostgreSQL", lambda: _at_once(_rows(rig.postgres), slow), peer=True),
        case(array, "ours, SQLite", lambda: _array(_ours(_sqlite), elements)),
        case(array, "ours, PostgreSQL", lambda: _array(_ours(rig.postgres), elements)),
        case(array, "ours, SQLite, by the controller's socket", lambda: _array(_socket, elements)),
        case(array, "INSERT of all and one COMMIT, SQLite", lambda: _array(_rows(_sqlite), elements), peer=True),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- the three ways

_CLIENTS = 64


def _spec(number: int) -> JobSpec:
    return JobSpec(
        name=f"bench-{number}", workload="radiology/brain-extraction", inputs=("series",), params={"number": number}
    )


def _one_by_one(target: Target, count: int) -> float:
    specs = [_spec(number) for number in range(count)]
    with target() as submit:
        began = time.perf_counter()
        for spec in specs:
            submit([spec])
        seconds = time.perf_counter() - began
    return count / seconds


def _at_once(target: Target, each: int) -> float:
    """From 64 threads of this process."""
    with target() as submit:
        began, ended = _from_threads([submit] * _CLIENTS, 0, each, lambda: None)
    return _CLIENTS * each / (ended - began)


def _array(target: Target, elements: int) -> float:
    spec = _spec(0).model_copy(update={"array": tuple({"index": index} for index in range(elements))})
    with target() as submit:
        began = time.perf_counter()
        submit([spec])
        seconds = time.perf_counter() - began
    return elements / seconds


def _from_threads(submits: Sequence[Submit], first: int, each: int, ready: Callable[[], object]) -> tuple[float, float]:
    """(began, ended), by the machine's monotonic clock: a thread per client, each waits for each of its answers."""
    specs = [[_spec(first + client * each + call) for call in range(each)] for client in range(len(submits))]
    start = threading.Barrier(len(submits) + 1)
    failures: list[BaseException] = []

    def client(submit: Submit, mine: Sequence[JobSpec]) -> None:
        try:
            start.wait()
            for spec in mine:
                submit([spec])
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that measures
            failures.append(error)

    threads = [threading.Thread(target=client, args=pair, daemon=True) for pair in zip(submits, specs, strict=True)]
    for thread in threads:
        thread.start()
    ready()
    began = time.monotonic()
    start.wait()
    for thread in threads:
        thread.join()
    ended = time.monotonic()
    if failures:
        raise failures[0]
    return began, ended


def _at_once_by_socket(each: int) -> float:
    """64 connections from as many processes as there are cores, to a controller in another process."""
    processes = min(_CLIENTS, max(2, os.cpu_count() or 2))
    connections = _CLIENTS // processes
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(processes), context.SimpleQueue()
    with _served(processes * connections * each) as socket:
        clients = [
            context.Process(target=_client_process, args=(socket, number, connections, each, start, answers))
            for number in range(processes)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        if any(client.exitcode for client in clients):
            raise RuntimeError("A process of clients failed.")
        spans = [answers.get() for _ in clients]
    return processes * connections * each / (max(ended for _, ended in spans) - min(began for began, _ in spans))


def _client_process(socket: str, number: int, connections: int, each: int, start: Any, answers: Any) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(Path(socket))) for _ in range(connections)]
        submits = [_held(RemoteService(client)) for client in clients]
        answers.put(_from_threads(submits, number * connections * each, each, start.wait))


# --------------------------------------------------------------------------------------------- ours

Place = Callable[[], AbstractContextManager[tuple[sa.URL, Path]]]
"""Gives the URL of an empty database, and an empty folder beside it."""


class _Rig:
    """The PostgreSQL server, started when first needed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._server: sa.URL | None = None

    @contextmanager
    def postgres(self) -> Iterator[tuple[sa.URL, Path]]:
        if self._server is None:
            try:
                self._server = self._stack.enter_context(postgres.server())
            except NotFoundError as error:
                raise LeftOutError(str(error)) from None
        with disk_folder() as folder, postgres.database(self._server) as url:
            yield url, folder

    def close(self) -> None:
        self._stack.close()


@contextmanager
def _sqlite() -> Iterator[tuple[sa.URL, Path]]:
    with disk_folder() as folder:
        yield sqlite_url(folder / "queue.db"), folder


def _ours(place: Place) -> Target:
    """The queue in this process, as the controller uses it: with its anchor."""

    @contextmanager
    def target() -> Iterator[Submit]:
        with place() as (url, folder):
            queue, calls = SqlQueue(url, anchor=Anchor(folder / "anchor")), _Count()
            try:
                yield calls.counting(lambda specs: queue.submit(specs, owner="bench"))
            finally:
                queue.close()
            _check(url, folder / "anchor", calls.jobs)

    return target


@contextmanager
def _socket() -> Iterator[Submit]:
    """One connection to a controller."""
    calls = _Count()
    with _served(calls) as socket, connect(Path(socket)) as client:
        yield calls.counting(_held(RemoteService(client)))


@contextmanager
def _served(expected: int | _Count) -> Iterator[str]:
    """The socket of a controller in a process of its own; its queue is checked when it has stopped."""
    with new_home("inprocess") as settings:
        with controller(settings):
            yield str(settings.paths.socket)
        anchor = Anchor.of(Path(settings.anchor), settings.paths.root)
        jobs = expected if isinstance(expected, int) else expected.jobs
        _check(sqlite_url(settings.paths.database), anchor.folder, jobs)


def _held(service: RemoteService) -> Submit:
    """Held, so that the controller has nothing to run meanwhile."""
    return lambda specs: service.submit(specs, held=True)


class _Count:
    """How many jobs were submitted and acknowledged."""

    def __init__(self) -> None:
        self.jobs = 0
        self._lock = threading.Lock()

    def counting(self, submit: Submit) -> Submit:
        def submit_and_count(specs: Sequence[JobSpec]) -> None:
            submit(specs)
            with self._lock:
                self.jobs += sum(max(1, len(spec.array)) for spec in specs)

        return submit_and_count


def _check(url: sa.URL, anchor: Path, jobs: int) -> None:
    """Every acknowledged job is stored, with one SUBMITTED event of its own in an unbroken chain."""
    queue = SqlQueue(url)
    try:
        verify(queue, Anchor(anchor))
        submitted = [event.job_id for event in queue.events() if event.action == "SUBMITTED"]
        stored = [job.id for job in queue.jobs()]
    finally:
        queue.close()
    if not (len(submitted) == jobs and set(submitted) == set(stored) and len(stored) == jobs):
        raise RuntimeError(f"{jobs} jobs were acknowledged, {len(stored)} are stored, {len(submitted)} have an event.")


# --------------------------------------------------------------------------------------------- peers


def _rows(place: Place) -> Target:
    """A table of jobs, without events: every call is one transaction."""

    @contextmanager
    def target() -> Iterator[Submit]:
        with place() as (url, _):
            engine = sa.create_engine(url, pool_size=_CLIENTS, connect_args=_patient(url))
            if url.get_backend_name() == "sqlite":
                sa.event.listen(engine, "connect", _make_durable)
            table = sa.Table(
                "job", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("spec", sa.Text)
            )
            table.create(engine)
            statement, calls = table.insert(), _Count()

            def submit(specs: Sequence[JobSpec]) -> None:
                elements = [spec.element(i) for spec in specs for i in range(max(1, len(spec.array)))]
                rows = [{"spec": element.canonical()} for element in elements]
                with engine.begin() as connection:
                    connection.execute(statement, rows)

            try:
                yield calls.counting(submit)
                with engine.connect() as connection:
                    _expect(connection.scalar(sa.select(sa.func.count()).select_from(table)), calls.jobs)
            finally:
                engine.dispose()

    return target


def _patient(url: sa.URL) -> dict[str, Any]:
    return {"timeout": 60.0} if url.get_backend_name() == "sqlite" else {}


def _make_durable(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


@contextmanager
def _huey() -> Iterator[Submit]:
    try:
        from huey import SqliteHuey
    except ImportError:
        raise LeftOutError("huey is not installed (extra: bench)") from None
    with disk_folder() as folder:
        queue, calls = SqliteHuey(filename=str(folder / "huey.db"), fsync=True, timeout=60), _Count()

        @queue.task()
        def job(spec: str) -> None:
            """Never run: only queued."""

        def submit(specs: Sequence[JobSpec]) -> None:
            for spec in specs:
                job(spec.canonical())

        yield calls.counting(submit)
        _expect(queue.pending_count(), calls.jobs)
        queue.storage.close()


@contextmanager
def _disk() -> Iterator[Submit]:
    """What one commit costs at least: the same bytes to the end of a file, and fsync."""
    with disk_folder() as folder, (folder / "file").open("wb", buffering=0) as file:

        def submit(specs: Sequence[JobSpec]) -> None:
            file.write(bytes(4096))
            os.fsync(file.fileno())

        yield submit


def _expect(stored: int | None, jobs: int) -> None:
    if stored != jobs:
        raise RuntimeError(f"{jobs} jobs were acknowledged, {stored} are stored.")
