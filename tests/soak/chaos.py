"""A mixed load on a Ray of several nodes while everything is killed, dropped and filled; then every promise is checked.

    python tests/soak/chaos.py --minutes 10 --seed 1

Load: map jobs (some share parts), small gangs, clinical work that preempts, cancels, an operator's preemptions. Blows:
the controller, workers, drivers, raylets and Ray's head are killed with -9; PostgreSQL drops every connection; the file
system of the home is filled. Each raylet stands in a network namespace of its own, the home on a small tmpfs (root).
The clock is not moved here, where other processes live by it: `faults.py` moves it.

Prints its counts as JSON and exits 1 where a promise is broken: a job lost, a part published twice, more promised than
there is, a process that lives beyond its reservation or the run, a broken audit chain.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from permed_compute.admission.policy import CPU, MEMORY, Account, Member, Policy, Quota
from permed_compute.client import RemoteService
from permed_compute.errors import NotFoundError, PermedError, QueueError
from permed_compute.execution import processes, records
from permed_compute.execution.processes import ATTEMPT_MARK, ProcessTable
from permed_compute.paths import HomePaths
from permed_compute.queue.events import Anchor
from permed_compute.queue.port import Job
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.server import connect
from permed_compute.queue.sql import SqlQueue
from permed_compute.spec import Band, JobSpec
from permed_compute.states import ENDED, LIVE, JobState
from permed_compute.testing import postgres
from permed_compute.testing.cluster import RayCluster
from permed_compute.testing.invariants import Broken, Sighting, examine, sighted

CODE = """
    import time
    from permed_compute import Map, Part, PartResult, Result

    def plan(spec, state, ctx):
        bag = spec.params["bag"]
        return [Part(f"part-{n}", inputs=(f"{bag}-{n}",), params={}) for n in range(spec.params["count"])]

    def run(part, model, ctx):
        time.sleep(ctx.spec.params["seconds"])
        (ctx.out / "out.txt").write_text(part.inputs[0])
        return PartResult()

    parts = Map(plan=plan, run=run)

    def train(spec, ctx):
        found = ctx.restore()
        step = int((found / f"rank-{ctx.rank}" / "step.txt").read_text()) if found else 0
        while step < spec.params["count"]:
            time.sleep(spec.params["seconds"])
            step += 1
            stop = ctx.should_stop()
            if stop or step % 3 == 0:
                ctx.checkpoint(lambda folder: (folder / "step.txt").write_text(str(step)))
            if stop:
                return None
        return Result({"steps": step})
"""
BLOWS = {"controller": 4, "worker": 4, "driver": 2, "raylet": 1, "head": 1, "database": 3, "disk": 2}
"""Blow → how often among all."""
NODES, HOME_MIB, JOBS_AT_ONCE = 3, 64, 5
_SETTLE_S = 300
_MINE = Member(os.environ.get("USER") or "root", bands=tuple(Band))


@dataclass
class Chaos:
    """One run on a cluster that stands. `database` is PostgreSQL's URL, None for a SQLite file in the home."""

    folder: Path
    home: HomePaths
    cluster: RayCluster
    database: sa.URL | None
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    acknowledged: set[str] = field(default_factory=set)
    sightings: list[Sighting] = field(default_factory=list)
    daemon: subprocess.Popen[bytes] | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.code = self.folder / "code"
        self.code.mkdir()
        (self.code / "load.py").write_text(textwrap.dedent(CODE))
        self.url = self.database or sqlite_url(self.home.database)
        self.queue = SqlQueue(self.url)
        self.began = time.monotonic()

    # ------------------------------------------------------------------------------------- the load

    def users(self) -> None:
        """Keep some jobs in the system; now and then cancel one, or preempt one as an operator."""
        try:
            service = RemoteService(connect(self.home.socket, timeout=20.0))
        except PermedError:
            return
        try:
            live = self.queue.jobs(states=set(JobState) - ENDED)
            if len(live) < JOBS_AT_ONCE:
                self.acknowledged |= {job.id for job in service.submit([self._spec()])}
                self.counts["submitted"] += 1
            elif self.chance.random() < 0.1:
                service.cancel(self.chance.choice(live).id)
                self.counts["cancels"] += 1
            elif self.chance.random() < 0.1 and (running := [job for job in live if job.state is JobState.RUNNING]):
                service.preempt(self.chance.choice(running).id)
                self.counts["preemptions asked for"] += 1
        except (PermedError, OSError):
            self.counts["calls without an answer"] += 1
        finally:
            service.gateway.close()

    def _spec(self) -> JobSpec:
        gang, chance = self.chance.random() < 0.2, self.chance
        return JobSpec.model_validate({
            "name": "gang" if gang else "map", "workload": f"load:{'train' if gang else 'parts'}",
            "code": str(self.code), "retries": 20, "time_limit": "1h",
            "band": chance.choice(("clinical", "research", "opportunistic", "opportunistic")),
            "params": {"bag": chance.randrange(10**6), "count": chance.randrange(3, 9), "seconds": 0.7},
            "resources": {"workers": 2 if gang else "1..2", "cpus": 1, "memory": "1GiB"},
        })  # fmt: skip

    # ------------------------------------------------------------------------------------- the blows

    def strike(self) -> None:
        """One blow, chosen by chance; what cannot be struck now is not counted."""
        kinds = [kind for kind in BLOWS if kind != "database" or self.database is not None]
        kind = self.chance.choices(kinds, [BLOWS[kind] for kind in kinds])[0]
        if getattr(self, f"_{kind}")():
            self.counts[f"blow {kind}"] += 1
            print(f"{time.monotonic() - self.began:6.1f} s  {kind}", flush=True)

    def _controller(self) -> bool:
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()
        time.sleep(self.chance.choice((0.0, 1.0, 4.0)))
        return True

    def _worker(self) -> bool:
        return self._kill_one(lambda slot: slot != "driver")

    def _driver(self) -> bool:
        return self._kill_one(lambda slot: slot == "driver")

    def _kill_one(self, wanted: Callable[[str], bool]) -> bool:
        table = ProcessTable().look()
        mine = {pid: mark for pid, mark in table.marked(ATTEMPT_MARK).items() if self._attempt_of(mark) is not None}
        found = [table.processes[pid] for pid, mark in mine.items() if wanted(mark.rpartition("/")[2])]
        if found:
            processes.kill([self.chance.choice(found)])
        return bool(found)

    def _raylet(self) -> bool:
        self.cluster.nodes.pop(self.chance.randrange(len(self.cluster.nodes))).kill()
        self.cluster.add(1, cpus=1)
        return True

    def _head(self) -> bool:
        self.cluster.kill_head()
        time.sleep(self.chance.choice((1.0, 5.0)))
        self.cluster.start_head()
        return True

    def _database(self) -> bool:
        engine = sa.create_engine(self.database, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        engine.dispose()
        return True

    def _disk(self) -> bool:
        ballast = self.home.root / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"\0" * 65536):
                pass
        time.sleep(self.chance.choice((1.0, 4.0)))
        ballast.unlink()
        return True

    # ------------------------------------------------------------------------------------- what sees to it

    def keep_controller(self) -> None:
        """Start it where it is not there, as an operator's supervisor does."""
        if self.daemon is not None and self.daemon.poll() is None:
            return
        if self.daemon is not None and self.daemon.returncode not in (-signal.SIGKILL, 0):
            self.counts["controller ended by itself"] += 1
        start = [sys.executable, "-c", "from permed_compute.cli import main; main()", "--home", str(self.home.root)]
        environment = os.environ | {
            "PERMED_ANCHOR": str(self.folder / "anchor"), "PERMED_EXECUTOR": "ray", "PERMED_GRACE": "8",
            "PERMED_RAY_ADDRESS": self.cluster.address, "PERMED_TRACKING_URI": "none", "PERMED_HEARTBEAT": "10",
            "PERMED_QUEUE_URL": sa.make_url(self.url).render_as_string(hide_password=False),
        }  # fmt: skip
        with (self.folder / "daemon.log").open("ab") as out:
            self.daemon = subprocess.Popen([*start, "controller"], env=environment, stdout=out, stderr=out)
        self.counts["controllers"] += 1

    def watch(self) -> None:
        """Beside it all: which attempts have processes, and between which two events that was."""
        table = ProcessTable()
        while not self.over.wait(0.5):
            with suppress(PermedError):
                before = self.queue.head()[0]
                marked = table.look().marked(ATTEMPT_MARK)
                after = self.queue.head()[0]
                now = f"at {time.monotonic() - self.began:.1f} s process"
                for pid, mark in marked.items():
                    if (who := self._attempt_of(mark)) is not None:
                        what = f"{now} {pid} ({mark.rpartition('/')[2]})"
                        self.sightings.append(Sighting(*who, before, after, what))

    def _attempt_of(self, mark: str) -> tuple[str, int] | None:
        """(job, attempt) of a mark of this home's."""
        job_id, _, number = mark.rpartition("/")[0].removeprefix("permed-").rpartition("-")
        return (job_id, int(number)) if number.isdigit() and self.home.job(job_id).root.is_dir() else None

    # ------------------------------------------------------------------------------------- a run

    def run(self, minutes: float) -> dict[str, object]:
        """The storm, the calm, and the reckoning."""
        self.cluster.add(NODES, cpus=1)
        self.keep_controller()
        _until(lambda: self.home.socket.exists(), 60, "a controller")
        quotas = {CPU: Quota(NODES * 1000), MEMORY: Quota(NODES * 4096)}
        policy = Policy(accounts=(Account("local", quotas=quotas, members=(_MINE,)),), min_runtime=0).sealed()
        service = RemoteService(connect(self.home.socket, timeout=20.0))
        service.admin("policy", {"policy": policy.row()})
        service.gateway.close()
        watcher = threading.Thread(target=self.watch, name="watch")
        watcher.start()
        try:
            end, due = time.monotonic() + 60 * minutes, time.monotonic() + 15
            while time.monotonic() < end:
                self.keep_controller()
                self.users()
                if time.monotonic() > due:
                    self.strike()
                    due = time.monotonic() + self.chance.uniform(2, 8)
                time.sleep(0.5)
            self._settle()
        finally:
            self.over.set()
            watcher.join()
        return self._reckon(minutes)

    def _settle(self) -> None:
        """Everything works again: every job must come to its end."""
        print(f"{time.monotonic() - self.began:6.1f} s  calm", flush=True)
        end = time.monotonic() + _SETTLE_S
        while time.monotonic() < end and self._open_jobs():
            self.keep_controller()
            time.sleep(1.0)

    def _open_jobs(self) -> list[Job]:
        try:
            return self.queue.jobs(states=LIVE | {JobState.QUEUED})
        except QueueError:
            return self.queue.jobs(states=LIVE | {JobState.QUEUED})

    def _reckon(self, minutes: float) -> dict[str, object]:
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait(60)
        broken = examine(
            self.queue, acknowledged=self.acknowledged, first_publications=self._first_publications(),
            anchor=Anchor.of(self.folder / "anchor", self.home.root),
        ) + sighted(self.queue, self.sightings)  # fmt: skip
        marks = ProcessTable().look().marked(ATTEMPT_MARK)
        left = {pid: mark for pid, mark in marks.items() if self._attempt_of(mark) is not None}
        broken += [Broken("orphan", f"process {pid} of {mark} is left") for pid, mark in left.items()]
        jobs = self.queue.jobs()
        told = Counter(dict.fromkeys(("no job lost", "part published once", "capacity", "release", "orphan"), 0))
        told.update({"audit chain": 0})
        told.update(one.promise for one in broken)
        return {
            "minutes": minutes, "seed": self.seed, "database": "postgresql" if self.database else "sqlite",
            **dict(sorted(self.counts.items())), "jobs": len(jobs), "states": Counter(job.state.value for job in jobs),
            "reasons": Counter(job.reason for job in jobs), "attempts": sum(job.attempt for job in jobs),
            "parts": len(list(self.home.ledger.glob("*/??/*/part.json"))), "events": self.queue.head()[0],
            "sightings": len(self.sightings), "broken": dict(told), "first": [str(one) for one in broken[:20]],
        }  # fmt: skip

    def _first_publications(self) -> Iterator[str]:
        for file in self.home.jobs.glob("*/attempts/*/records-driver.jsonl"):
            yield from (row["key"] for row in records.read(file)[0] if row["kind"] == "part" and row.get("first"))


def _until(true: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.2)


@contextmanager
def small_file_system(folder: Path, mib: int) -> Iterator[Path]:
    """A tmpfs of that size, so that a full disk harms nobody else."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


@contextmanager
def _database() -> Iterator[sa.URL | None]:
    """A database of a PostgreSQL of our own; None where the machine has none."""
    with ExitStack() as stack:
        try:
            url = stack.enter_context(postgres.database(stack.enter_context(postgres.server())))
        except NotFoundError as error:
            print(f"SQLite, and no connection is dropped: {error.message}", flush=True)
            url = None
        yield url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        home = HomePaths(stack.enter_context(small_file_system(folder / "home", HOME_MIB))).create()
        url = stack.enter_context(_database())
        cluster = stack.enter_context(RayCluster(durable=True))
        stack.enter_context(cluster.inside())
        chaos = Chaos(folder, home, cluster, url, args.seed)
        stack.callback(chaos.queue.close)
        stack.callback(lambda: chaos.daemon is None or chaos.daemon.kill())
        told = chaos.run(args.minutes)
    print(json.dumps(told, indent=1))
    return 1 if told["first"] else 0


if __name__ == "__main__":
    sys.exit(main())
