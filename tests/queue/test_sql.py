"""What only a durable queue can show: crashes, upgrades, backups, several writers, and where it refuses to live."""

from __future__ import annotations

import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
import sqlalchemy as sa

from permed_compute.errors import QueueError
from permed_compute.queue import bulk, mounts, schema
from permed_compute.queue.backup import restore
from permed_compute.queue.events import Anchor, verify
from permed_compute.queue.port import Queue
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue
from permed_compute.states import JobState
from permed_compute.testing.queue import a_move, a_spec

KINDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture
def new_url(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], sa.URL]:
    """Fresh places for queues, by kind."""
    files = (tmp_path / f"queue-{number}.db" for number in range(100))

    def new(kind: str) -> sa.URL:
        return sqlite_url(next(files)) if kind == "sqlite" else request.getfixturevalue("postgres_urls")()

    return new


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, new_url: Callable[[str], sa.URL]) -> sa.URL:
    return new_url(request.param)


@pytest.fixture
def opened() -> Iterator[Callable[..., SqlQueue]]:
    """Opens queues, and closes them after the test."""
    queues: list[SqlQueue] = []

    def open_one(url: sa.URL, **options: object) -> SqlQueue:
        queues.append(SqlQueue(url, **options))
        return queues[-1]

    yield open_one
    for queue in queues:
        queue.close()


def log_and_jobs_agree(queue: Queue) -> None:
    """The chain holds, and every job is where the log says."""
    verify(queue)
    folded = {event.job_id: event.after for event in queue.events() if event.action != "NOTED"}
    assert folded == {job.id: job.state.value for job in queue.jobs()}


def fill(queue: Queue) -> None:
    """Jobs of several kinds, in several states; a lease; a note."""
    jobs = queue.submit([a_spec(params={"ø": [1, 2.5]}), a_spec(array=[{"n": "x"}] * 30)], owner="ada")
    queue.submit([a_spec(name="b", resources={"gpus": 1})], owner="bob", held=True)
    [job] = queue.apply([a_move(jobs[3], JobState.RESERVED, attempt=1, detail={"grants": [{"node": "n"}]})])
    [job] = queue.apply([a_move(job, JobState.LAUNCHING)])
    queue.apply([a_move(job, JobState.RUNNING, started_at=5)])
    assert queue.acquire("controller", 10_000) is not None
    queue.note("policy-applied", actor="ada", data={"text": "\u0000 'quoted' \"é\" \\"}, policy="p1")


# ------------------------------------------------------------------------------------------- reopening


def test_what_was_there_is_there_again(url: sa.URL, opened: Callable[..., SqlQueue]) -> None:
    first = opened(url)
    fill(first)
    jobs, events, head = first.jobs(), first.events(), first.head()
    first.close()
    second = opened(url)
    assert (second.jobs(), second.events(), second.head()) == (jobs, events, head)
    assert second.acquire("another", 1000) is None  # the lease outlives its holder's process
    log_and_jobs_agree(second)


def test_a_closed_queue_says_so(url: sa.URL) -> None:
    queue = SqlQueue(url)
    queue.close()
    queue.close()
    with pytest.raises(QueueError, match="closed"):
        queue.submit([a_spec()], owner="ada")


def test_close_waits_for_what_was_asked(url: sa.URL, opened: Callable[..., SqlQueue]) -> None:
    queue = opened(url)
    acknowledged, refused = [], []

    def submit() -> None:
        try:
            while True:
                acknowledged.append(queue.submit([a_spec()], owner="ada")[0].id)
        except QueueError as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(acknowledged) < 20:
        threading.Event().wait(0.01)
    queue.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(refused) == 8
    assert {job.id for job in opened(url).jobs()} == set(acknowledged)


# ------------------------------------------------------------------------------------------- crashes

SUBMITTER = """
import sys, threading
from pathlib import Path
from permed_compute.queue.events import Anchor
from permed_compute.queue.sql import SqlQueue
from permed_compute.testing.queue import a_spec
queue = SqlQueue(sys.argv[1], anchor=Anchor(Path(sys.argv[2])))
lock = threading.Lock()
def submit(number):
    while True:
        job = queue.submit([a_spec(params={"by": number})], owner="ada")[0]
        with lock:
            print(job.id, flush=True)
threads = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]
"""


@pytest.mark.parametrize("kind", KINDS)
def test_no_acknowledged_job_is_lost_by_kill_9(
    kind: str, new_url: Callable[[str], sa.URL], opened: Callable[..., SqlQueue], tmp_path: Path
) -> None:
    url, acknowledged = new_url(kind), set()
    for lines in (1, 40, 150):
        command = [sys.executable, "-c", SUBMITTER, url.render_as_string(False), str(tmp_path / "anchor")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            acknowledged |= {process.stdout.readline().strip() for _ in range(lines)}
            process.send_signal(signal.SIGKILL)
            # The last line may be cut: only whole ones were acknowledged to anybody.
            acknowledged |= {line.strip() for line in process.stdout.read().splitlines(True) if line.endswith("\n")}
        queue = SqlQueue(url)
        assert acknowledged <= {job.id for job in queue.jobs()}
        verify(queue, Anchor(tmp_path / "anchor"))
        log_and_jobs_agree(queue)
        queue.close()
    assert len(acknowledged) >= 191


# ------------------------------------------------------------------------------------------- writing together


def test_two_processes_worth_of_writers_keep_one_chain(url: sa.URL, opened: Callable[..., SqlQueue]) -> None:
    queues = [opened(url), opened(url)]

    def submit(number: int) -> list[str]:
        return [queues[number % 2].submit([a_spec()], owner=f"u{number}")[0].id for _ in range(10)]

    with ThreadPoolExecutor(16) as pool:
        ids = [job_id for found in pool.map(submit, range(16)) for job_id in found]
    assert [job.id for job in queues[0].jobs()] == [job.id for job in queues[1].jobs()]
    assert {job.id for job in queues[0].jobs()} == set(ids)
    log_and_jobs_agree(queues[0])


def test_a_row_that_the_database_refuses_harms_its_own_caller_only(
    url: sa.URL, opened: Callable[..., SqlQueue]
) -> None:
    queue, barrier = opened(url), threading.Barrier(32)

    def submit(number: int) -> str:
        barrier.wait()
        try:
            return queue.submit([a_spec()], owner="\ud800" if number == 7 else f"u{number}")[0].owner
        except QueueError as error:
            return error.code

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(submit, range(32)))
    assert answers == ["queue" if number == 7 else f"u{number}" for number in range(32)]
    assert len(queue.jobs()) == 31
    log_and_jobs_agree(queue)


def test_a_database_that_stays_locked_fails_the_call_and_not_the_queue(
    tmp_path: Path, opened: Callable[..., SqlQueue]
) -> None:
    queue = opened(sqlite_url(tmp_path / "queue.db"))
    queue._connection.exec_driver_sql("PRAGMA busy_timeout = 50")
    queue._connection.rollback()
    with closing(sqlite3.connect(tmp_path / "queue.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(QueueError, match="locked"):
            queue.submit([a_spec()], owner="ada")
        assert queue.jobs() == []  # reading goes on
        other.execute("ROLLBACK")
    queue.submit([a_spec()], owner="ada")
    log_and_jobs_agree(queue)


def test_many_specs_at_once_are_each_stored_once(url: sa.URL, opened: Callable[..., SqlQueue]) -> None:
    queue = opened(url)
    queue.submit([a_spec(name=f"n{number % 3}") for number in range(9)], owner="ada")
    queue.submit([a_spec(name="n1"), a_spec(array=5000)], owner="ada")
    again = opened(url)
    assert [job.spec for job in again.jobs()] == [job.spec for job in queue.jobs()]
    with queue._engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(schema.specs)).scalar() == 4


@pytest.mark.postgres
def test_a_connection_that_the_server_ends_is_opened_again(
    new_url: Callable[[str], sa.URL], opened: Callable[..., SqlQueue]
) -> None:
    url = new_url("postgresql")
    queue = opened(url)
    queue.submit([a_spec()], owner="ada")
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
    engine.dispose()
    queue.submit([a_spec()], owner="ada")
    assert len(queue.jobs()) == 2
    log_and_jobs_agree(queue)


# ------------------------------------------------------------------------------------------- upgrades


def rows_of(queue: SqlQueue) -> dict[sa.Table, list[dict[str, object]]]:
    with queue._engine.connect() as connection:
        return {
            table: [dict(row) for row in connection.execute(sa.select(table)).mappings()] for table in schema.TABLES
        }


def as_old(url: sa.URL, rows: dict[sa.Table, list[dict[str, object]]]) -> None:
    """A database at the first revision that holds these rows."""
    engine = schema.engine_for(url)
    with engine.connect() as connection, schema.writing(connection).begin():
        schema.upgrade(connection, "0001")
        bulk.insert(connection, rows)
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_database_is_upgraded_while_jobs_run(
    kind: str, new_url: Callable[[str], sa.URL], opened: Callable[..., SqlQueue]
) -> None:
    present = opened(new_url(kind))
    fill(present)
    url = new_url(kind)
    as_old(url, rows_of(present))
    with ThreadPoolExecutor(3) as pool:  # three at once: one upgrades, the others find it done
        queue, *_ = pool.map(opened, [url] * 3)
    assert queue.jobs() == present.jobs()
    assert queue.events() == present.events()
    [running] = queue.jobs(states=[JobState.RUNNING])
    assert running.detail == {"grants": [{"node": "n"}]}
    assert queue.apply([a_move(running, JobState.SUCCEEDED)])[0].started_at == 5
    log_and_jobs_agree(queue)
    with queue._engine.connect() as connection:
        assert schema.revision_of(connection) == schema.REVISION
        assert sa.inspect(connection).get_indexes("queue_events")


def test_a_newer_database_is_refused(url: sa.URL) -> None:
    queue = SqlQueue(url)
    with queue._engine.connect() as connection, schema.writing(connection).begin():
        connection.exec_driver_sql("UPDATE queue_version SET version_num = '9999'")
    queue.close()
    with pytest.raises(QueueError, match="newer"):
        SqlQueue(url)


def test_the_newest_migration_is_the_one_the_code_expects(url: sa.URL, opened: Callable[..., SqlQueue]) -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [schema.REVISION]
    with opened(url)._engine.connect() as connection:
        for table in schema.TABLES:
            columns = [column["name"] for column in sa.inspect(connection).get_columns(table.name)]
            assert columns == list(table.c.keys())


# ------------------------------------------------------------------------------------------- backup


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_a_backup_taken_while_jobs_move_is_whole(
    source: str, target: str, new_url: Callable[[str], sa.URL], opened: Callable[..., SqlQueue], tmp_path: Path
) -> None:
    queue = opened(new_url(source))
    fill(queue)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            [job] = queue.submit([a_spec()], owner="ada")
            queue.apply([a_move(job, JobState.HELD, detail={"x": 1})])

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work) for _ in range(3)]
        try:
            for number in range(3):
                assert str(tmp_path / f"backup-{number}") in queue.backup(str(tmp_path / f"backup-{number}"))
        finally:
            stop.set()
        for worker in workers:
            worker.result()
    final = {event.seq: event for event in queue.events()}
    for number in range(3):
        file = tmp_path / f"backup-{number}"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        url = new_url(target)
        restore(str(file), url)
        copy = opened(url)
        log_and_jobs_agree(copy)
        assert all(final[event.seq] == event for event in copy.events())
        assert copy.jobs(states=[JobState.RUNNING]) == queue.jobs(states=[JobState.RUNNING])
        copy.submit([a_spec()], owner="ada")  # and it goes on from there
        log_and_jobs_agree(copy)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_queue_is_never_restored_over(url: sa.URL, opened: Callable[..., SqlQueue], tmp_path: Path) -> None:
    queue = opened(url)
    fill(queue)
    queue.backup(str(tmp_path / "backup"))
    before = queue.events()
    with pytest.raises(QueueError, match="already"):
        restore(str(tmp_path / "backup"), url)
    assert queue.events() == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_backup_is_upgraded(
    kind: str, new_url: Callable[[str], sa.URL], opened: Callable[..., SqlQueue], tmp_path: Path
) -> None:
    present = opened(new_url("sqlite"))
    fill(present)
    old = new_url("sqlite")
    as_old(old, rows_of(present))
    url = new_url(kind)
    restore(str(old.database), url)
    assert opened(url).events() == present.events()


@pytest.mark.postgres
@pytest.mark.parametrize("keep", [0, 1, 20, -1])
def test_a_cut_dump_is_refused_and_leaves_nothing(
    keep: int, new_url: Callable[[str], sa.URL], opened: Callable[..., SqlQueue], tmp_path: Path
) -> None:
    queue = opened(new_url("postgresql"))
    fill(queue)
    queue.backup(str(tmp_path / "backup"))
    lines = (tmp_path / "backup").read_text().splitlines(True)
    (tmp_path / "cut").write_text("".join(lines[:keep]))
    url = new_url("sqlite")
    with pytest.raises(QueueError, match=r"incomplete|not a backup"):
        restore(str(tmp_path / "cut"), url)
    assert not Path(str(url.database)).exists()


def test_other_files_are_no_backup(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE t (x)")
    for name in ("text", "other.db", "missing"):
        with pytest.raises(QueueError):
            restore(str(tmp_path / name), sqlite_url(tmp_path / "target.db"))


# ------------------------------------------------------------------------------------------- where it lives


def test_the_files_are_private(tmp_path: Path, opened: Callable[..., SqlQueue]) -> None:
    (tmp_path / "queue.db").touch(mode=0o644)
    opened(sqlite_url(tmp_path / "queue.db")).submit([a_spec()], owner="ada")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("queue.db", "queue.db-wal", "queue.db-shm"), 0o600)


def test_every_commit_reaches_the_disk(tmp_path: Path, opened: Callable[..., SqlQueue]) -> None:
    with opened(sqlite_url(tmp_path / "queue.db"))._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


MOUNTS = """\
21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 21 0:5 / /cluster rw,relatime shared:1 - lustre mds@tcp:/project rw
23 22 0:6 / /cluster/local\\040disk rw,relatime - xfs /dev/vdb rw
24 21 0:7 / /home rw - autofs systemd-1 rw
25 21 0:8 / /home rw - nfs4 server:/home rw
26 21 0:9 / /homes rw - ext4 /dev/vdc rw
27 21 0:9 / /mnt/ssh rw - fuse.sshfs a@b:/ rw
"""


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/var/lib/x", "/", "ext4"),
        ("/cluster/project/queue.db", "/cluster", "lustre"),
        ("/cluster/local disk/queue.db", "/cluster/local disk", "xfs"),
        ("/home/ada/.permed/queue.db", "/home", "nfs4"),
        ("/homes/ada", "/homes", "ext4"),
        ("/mnt/ssh/x", "/mnt/ssh", "fuse.sshfs"),
    ],
)
def test_which_file_system_holds_a_path(path: str, point: str, kind: str) -> None:
    assert mounts.filesystem(Path(path), MOUNTS) == (point, kind)
    if kind in ("ext4", "xfs"):
        mounts.refuse_network(Path(path), MOUNTS)
    else:
        with pytest.raises(QueueError, match=kind):
            mounts.refuse_network(Path(path), MOUNTS)


def test_sqlite_on_a_network_is_refused_before_a_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "NETWORK", {mounts.filesystem(tmp_path)[1]})
    with pytest.raises(QueueError, match="PostgreSQL"):
        SqlQueue(sqlite_url(tmp_path / "queue.db"))
    assert not (tmp_path / "queue.db").exists()


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://host/db"])
def test_where_no_queue_can_live(url: str) -> None:
    with pytest.raises(QueueError) as caught:
        SqlQueue(url)
    assert caught.value.remedy


def test_an_unreachable_server_and_a_file_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(QueueError):
        SqlQueue(f"postgresql+psycopg://nobody@/none?host={tmp_path}")
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to be taken for one" * 20)
    with pytest.raises(QueueError):
        SqlQueue(sqlite_url(tmp_path / "text.db"))


def test_the_lease_row_is_the_lease(url: sa.URL, opened: Callable[..., SqlQueue]) -> None:
    queue = opened(url)
    for holder in ("a", "a", "a"):
        lease = queue.acquire(holder, 1000)
    assert lease is not None
    assert rows_of(queue)[schema.lease] == [asdict(lease)]
