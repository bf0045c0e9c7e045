"""Composition root: the only place where adapters are chosen, and what the CLI and Python users stand on.

`open_client(settings)` talks to the controller of this home through its socket where one runs; else this process is
the controller for as long as the client is open (the home's lock sees to it that there is only one).
"""

from __future__ import annotations

import fcntl
import getpass
import grp
import os
import pwd
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permed_compute.admission.explain import Explanation
from permed_compute.admission.fold import Picture
from permed_compute.admission.snapshot import Node
from permed_compute.admission.top import Standing
from permed_compute.errors import EngineError, LeaseLostError, NotFoundError, QueueError, SettingsError
from permed_compute.execution.controller import Controller, ended
from permed_compute.execution.delegated import Delegated, Word
from permed_compute.execution.device import local_node
from permed_compute.execution.port import Attempt, Executor
from permed_compute.governance.desk import Desk
from permed_compute.paths import HomePaths, JobPaths, replacing
from permed_compute.queue.events import Anchor
from permed_compute.queue.port import Event, Job, Queue, wall_clock
from permed_compute.queue.rows import event_from_row, job_from_row
from permed_compute.queue.server import Caller as Peer
from permed_compute.queue.server import Gateway, GatewayClient, connect
from permed_compute.service import Caller, JobService, Service, handle
from permed_compute.settings import Settings, resolve, site
from permed_compute.spec import JobSpec, load
from permed_compute.states import ENDED, JobState
from permed_compute.tracking.files import Drained, Spool, drain
from permed_compute.tracking.port import Tracker
from permed_compute.tracking.record import record_of

_LOCK_WAIT_S = 10.0
_POLL_S = 0.2
_ROUNDS = 8
_SWITCH_S = 0.0005
"""Callers' threads answer between two bytecodes of a decision; Python's 5 ms would be most of a submission's time."""


# ------------------------------------------------------------------------------------------- adapters


def open_queue(settings: Settings) -> Queue:
    """The queue that the settings name: SQLite in the home, or what `queue_url` says."""
    from permed_compute.queue.sql import SqlQueue

    home = settings.paths.create()
    anchor = Anchor.of(Path(settings.anchor), home.root)
    return SqlQueue(settings.queue_url or f"sqlite:///{home.database}", anchor=anchor)


def make_executor(settings: Settings) -> Executor:
    """The engine that the settings name."""
    if settings.executor == "slurm":
        from permed_compute.execution.slurm import SlurmExecutor

        return SlurmExecutor(settings, settings.paths)
    if settings.executor == "inprocess":
        from permed_compute.execution.inprocess import InProcessExecutor

        return InProcessExecutor(settings)
    try:
        from permed_compute.execution.ray import RayExecutor
    except ImportError as error:
        raise EngineError(
            f"The executor is ray, which is not installed ({error.name}).",
            remedy="pip install 'permed-compute[ray]', or --executor inprocess.",
        ) from None
    return RayExecutor(settings, settings.paths)


def make_tracker(settings: Settings) -> Tracker | None:
    """The tracking server that the settings name, or None where it is switched off or MLflow is not installed."""
    if settings.tracking_uri == "none":
        return None
    from importlib.util import find_spec

    if find_spec("mlflow") is None:
        return None
    from permed_compute.tracking.mlflow import MlflowTracker, embedded

    return MlflowTracker(settings.tracking_uri) if settings.tracking_uri else embedded(settings.paths)


# ------------------------------------------------------------------------------------------- client


@dataclass(slots=True)
class Client:
    """An open connection. `queue` is None where another process is the controller."""

    settings: Settings
    service: Service
    queue: Queue | None = None
    _lead: _Lead | None = None

    @property
    def home(self) -> HomePaths:
        return self.settings.paths

    @property
    def embedded(self) -> bool:
        """True where this process is the controller."""
        return self.queue is not None

    @property
    def delegated(self) -> bool:
        """True where a site's own scheduler places the jobs: what is submitted is sent at once, by this process."""
        return self.settings.executor == "slurm"

    def submit(self, *jobs: JobSpec | Path | str, held: bool = False) -> list[Job]:
        """Queue jobs given as specs or job files. Durable when it returns."""
        specs = [job if isinstance(job, JobSpec) else load(Path(job)) for job in jobs]
        return self.service.submit(specs, held=held)

    def paths(self, job: Job) -> JobPaths:
        return self.home.job(job.id)

    def wait(self, job_ids: Sequence[str], look: Callable[[list[Job]], None] = lambda jobs: None) -> list[Job]:
        """Until every job has ended or is held; runs them here where this process is the controller.

        `look` is called often with the jobs as they stand (progress bars). Ctrl-C leaves through `KeyboardInterrupt`:
        the caller decides between `interrupt` and leaving the jobs to the controller.
        """
        last: list[Job] = []

        def all_ended() -> bool:
            nonlocal last
            last = [self.service.job(job_id) for job_id in job_ids]
            look(last)
            return all(ended(job) for job in last)

        if self._lead is not None:
            self._lead.run(all_ended)
        else:
            while not all_ended():
                time.sleep(_POLL_S)
        return last

    def interrupt(self, grace_s: float = 15.0) -> list[Job]:
        """Stop what runs in this process's charge and hold it, so that `resume` finishes it."""
        return self._lead.controller().interrupt(grace_s) if self._lead is not None else []

    def flush_tracking(self) -> Drained:
        """Send what waits for the tracking server, now."""
        tracker = make_tracker(self.settings)
        spool = Spool(self.home.spool)
        if tracker is None:
            return Drained(0, len(spool.pending()), "Tracking is switched off, or MLflow is not installed.")
        return drain(spool, tracker)

    def serve(self, until: Callable[[], bool], *, track_every_s: float = 5.0) -> None:
        """Be the controller until told otherwise. Raises `QueueError` where another process already is."""
        if self._lead is None:
            raise QueueError("This home has a controller already.", remedy="`permed status` shows what it does.")
        sys.setswitchinterval(_SWITCH_S)
        self.service.arrived()  # whoever received them may have been ended before it said so
        with _Sender(self, track_every_s):
            self._lead.run(until)


@dataclass(slots=True)
class _Lead:
    """What only the controlling process has. The executor and the lease come at the first need."""

    settings: Settings
    queue: Queue
    picture: Picture
    desk: Desk
    _controller: Controller | None = None
    _executor: Executor | None = None
    _runs: bool = False
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def executor(self) -> Executor:
        if self._executor is None:
            self._executor = make_executor(self.settings)
        return self._executor

    def controller(self) -> Controller:
        if self._controller is None:
            home = self.settings.paths
            spool = Spool(home.spool)

            def announce(job: Job, state: JobState, exit_record: Mapping[str, Any] | None) -> None:
                spool.put(record_of(job, state, home.job(job.id), wall_clock()))

            executor = self.executor()
            controller = Controller(
                self.queue, executor, home, self.settings, announce=announce, picture=self.picture,
                clear=self.desk.clear_launch,
            )  # fmt: skip
            controller.lead()
            self._controller = controller
        return self._controller

    def run(self, until: Callable[[], bool]) -> None:
        self._runs = True
        try:
            with self._turn:
                self.controller().run(until)
        finally:
            self._runs = False

    def wake(self) -> None:
        if self._runs and self._controller is not None:
            self._controller.wake()
        elif self.settings.executor == "slurm":
            self.catch_up()

    def catch_up(self) -> None:
        """Fold in what became of the jobs that a site has, and send it those that wait: nobody else may be there to.

        A few rounds, since a decision leads to a launch; where another controller leads the queue, that one does it.
        """
        with self._turn, suppress(LeaseLostError):
            controller = self.controller()
            for _ in range(_ROUNDS):
                if not controller.tick():
                    return

    def nodes(self) -> tuple[Node, ...]:
        """What there is to reserve, before the controller has looked."""
        return self.executor().nodes() if self.settings.executor == "slurm" else (local_node(self.settings),)

    def says(self, job: Job) -> Word | None:
        """The engine's own word of a live attempt, where it places jobs itself."""
        if not job.attempt or not isinstance(executor := self._delegate(), Delegated):
            return None
        attempt = Attempt.read(self.settings.paths.job(job.id).attempt(job.attempt))
        return executor.says(attempt) if attempt is not None else None

    def fits(self, spec: JobSpec) -> None:
        """Raises `SiteRefusalError` where the site would refuse the job."""
        if isinstance(executor := self._delegate(), Delegated):
            executor.require(spec)

    def queued(self, jobs: Sequence[Job]) -> None:
        if isinstance(executor := self._delegate(), Delegated):
            executor.queued(jobs)

    def _delegate(self) -> Executor | None:
        return self.executor() if self.settings.executor == "slurm" else None

    def close(self) -> None:
        if self._controller is not None:
            self._controller.close()
        if self._executor is not None:
            self._executor.close()


@dataclass(slots=True)
class _Sender:
    """Drains the spool beside the controller; a server that is down is asked again at the next round."""

    client: Client
    every_s: float
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> _Sender:
        self._thread = threading.Thread(target=self._run, name="permed-tracking", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(30.0)

    def _run(self) -> None:
        spool = Spool(self.client.home.spool)
        while not self._stop.wait(self.every_s):
            if spool.pending():
                self.client.flush_tracking()


@contextmanager
def open_client(settings: Settings | None = None) -> Iterator[Client]:
    """A client of this home's controller, or the controller itself where none runs."""
    settings = settings or resolve()
    settings.paths.create()
    with ExitStack() as stack:
        remote = _join_or_lock(settings, stack)
        if remote is not None:
            stack.callback(remote.close)
            _same_site(settings)
            yield Client(settings, RemoteService(remote))
            return
        queue = open_queue(settings)
        stack.callback(queue.close)
        picture = Picture(queue, grace_ms=settings.grace * 1000)
        _bind_site(settings, queue)
        desk = _desk(settings, queue, picture)
        lead = _Lead(settings, queue, picture, desk)
        stack.callback(lead.close)

        def service_for(caller: Caller) -> JobService:
            return JobService(
                queue, caller, lead.nodes, picture, settings.grace * 1000, wake=lead.wake, fits=lead.fits,
                queued=lead.queued, engine_says=lead.says, desk=desk, received=settings.paths.transfers,
            )  # fmt: skip

        def on_call(peer: Peer, call: str, args: Mapping[str, Any]) -> Any:
            return handle(
                service_for, Caller(peer.user, peer.uid in (0, os.getuid()), groups_of(peer.user)), call, args
            )

        stack.enter_context(Gateway(settings.paths.socket, on_call))
        me = Caller(getpass.getuser(), operator=True, groups=groups_of(getpass.getuser()))
        if settings.executor == "slurm":
            lead.catch_up()
        yield Client(settings, service_for(me), queue, lead)


def _desk(settings: Settings, queue: Queue, picture: Picture) -> Desk:
    def entity_of(account: str) -> str:
        return picture.look().policy(wall_clock())[0].fact(account, "legal_entity")

    return Desk(queue, settings.paths, lambda: picture.look().models, entity_of)


def _site_at_home(settings: Settings) -> str:
    """The site that this home's jobs go to, '' where none has been named yet."""
    from permed_compute.settings import home_file

    return str(home_file(settings.paths).get("site", ""))


def _same_site(settings: Settings) -> None:
    """A home has one engine: jobs of a site whose scheduler has them must not be launched by another one beside it."""
    bound = _site_at_home(settings)
    if settings.executor == "slurm" and bound != settings.site:
        raise SettingsError(
            f"This home's jobs go to {bound or 'its own machine'}, not to {settings.site}.",
            remedy="Use a home of its own: --home.",
        )
    if bound and settings.executor != "slurm" and site(bound).get("executor") == "slurm":
        raise SettingsError(
            f"This home's jobs go to {bound}; the executor would be {settings.executor}"
            f" ({settings.source.get('executor', 'default')}).",
            remedy="Use another home (--home), or leave the executor to the site.",
        )


def _bind_site(settings: Settings, queue: Queue) -> None:
    """From the first command that names it, a home belongs to its site, so that the next need not name it again."""
    if settings.executor == "slurm" and not _site_at_home(settings):
        if queue.jobs(states=set(JobState) - ENDED, limit=1):
            raise SettingsError(
                "This home has jobs that wait for its own machine.",
                remedy="Use a home of its own for the site: --home.",
            )
        file = settings.paths.settings
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        with replacing(file) as new:
            new.write_text(f"{before.rstrip()}\nsite: {settings.site}\n".lstrip(), encoding="utf-8")
    _same_site(settings)


def groups_of(user: str) -> tuple[str, ...]:
    """The operating system's groups of a user, by name."""
    try:
        ids = os.getgrouplist(user, pwd.getpwnam(user).pw_gid)
    except KeyError:
        return ()
    names = []
    for number in ids:
        with suppress(KeyError):
            names.append(grp.getgrgid(number).gr_name)
    return tuple(names)


def _join_or_lock(settings: Settings, stack: ExitStack) -> GatewayClient | None:
    """A connection to the controller that runs, or None once this process holds the home's lock."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    lock = os.open(settings.paths.lock, os.O_RDWR | os.O_CREAT, 0o600)
    stack.callback(os.close, lock)
    while True:
        try:
            return connect(settings.paths.socket)
        except NotFoundError:
            pass
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise QueueError(
                    "Another process holds this home and does not answer.", remedy=f"See {settings.paths.lock}."
                ) from None
            time.sleep(0.05)
        else:
            return None


@dataclass(slots=True)
class RemoteService:
    """`Service` through the controller's socket."""

    gateway: GatewayClient

    def submit(self, specs: Sequence[JobSpec], *, held: bool = False) -> list[Job]:
        rows = self.gateway.call("submit", specs=[spec.canonical() for spec in specs], held=held)
        single = [spec.element(index) for spec in specs for index in range(max(1, len(spec.array)))]
        return [job_from_row(row, spec) for row, spec in zip(rows, single, strict=True)]

    def job(self, job_id: str) -> Job:
        return self._job("job", job_id)

    def jobs(
        self, *, states: Iterable[JobState] | None = None, owner: str | None = None, limit: int | None = None
    ) -> list[Job]:
        named = [state.value for state in states] if states is not None else None
        return [job_from_row(row) for row in self.gateway.call("jobs", states=named, owner=owner, limit=limit)]

    def cancel(self, job_id: str) -> Job:
        return self._job("cancel", job_id)

    def hold(self, job_id: str) -> Job:
        return self._job("hold", job_id)

    def release(self, job_id: str) -> Job:
        return self._job("release", job_id)

    def resume(self, job_id: str) -> Job:
        return self._job("resume", job_id)

    def arrived(self) -> list[Job]:
        return [job_from_row(row) for row in self.gateway.call("arrived")]

    def why(self, job_id: str) -> Explanation:
        row = self.gateway.call("why", job_id=job_id)
        return Explanation(
            row["job"], row["state"], row["code"], row["sentence"], row["change"], tuple(row["blockers"]),
            row["estimate"], row["basis"], tuple(row["ahead"]),
        )  # fmt: skip

    def top(self) -> Standing:
        return Standing(**self.gateway.call("top"))

    def preview(self, spec: JobSpec) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self.gateway.call("preview", spec=spec.canonical())
        return row

    def preempt(self, job_id: str) -> Job:
        return self._job("preempt", job_id)

    def model(self, action: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        row: Mapping[str, Any] = self.gateway.call("model", action=action, data=data)
        return row

    def models(self) -> list[dict[str, Any]]:
        return list(self.gateway.call("models"))

    def admin(self, reason: str, data: Mapping[str, Any]) -> Event:
        return event_from_row(self.gateway.call("admin", reason=reason, data=data))

    def events(self, *, job_id: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        return [event_from_row(row) for row in self.gateway.call("events", job_id=job_id, after=after, limit=limit)]

    def _job(self, call: str, job_id: str) -> Job:
        return job_from_row(self.gateway.call(call, job_id=job_id))


def submit(*jobs: JobSpec | Path | str, settings: Settings | None = None) -> list[Job]:
    """Queue jobs and return; `permed controller`, or the next `permed run`, works them off."""
    with open_client(settings) as client:
        return client.submit(*jobs)
