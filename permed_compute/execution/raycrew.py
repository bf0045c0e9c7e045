"""What lives in Ray: the actor that drives one attempt, and the members that it works with."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, get_placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from permed_compute.errors import EngineError, PermedError
from permed_compute.execution import device, processes, raybridge, raysetup
from permed_compute.execution.context import check_fence
from permed_compute.execution.cores import cores_file
from permed_compute.execution.driver import drive
from permed_compute.execution.gang import TERMINATION
from permed_compute.execution.port import Attempt
from permed_compute.execution.processes import ATTEMPT_MARK, ProcessTable
from permed_compute.execution.records import last_sign
from permed_compute.execution.watchdog import Watchdog
from permed_compute.execution.worker import Member, Row, WorkerLost
from permed_compute.paths import AttemptPaths, read_json, write_json
from permed_compute.queue.port import wall_clock

LOCAL_NODE = "local"
_BEAT_S = 2.0
_DYING_S = 2.0
"""A node dies within so long: its processes are not gone all at once."""
_LOOK_AT_NODES_S = 5.0
_ORPHANED_S = 60.0
"""A member ends itself when its attempt has shown no sign of life (one every 2 s) for so long."""
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class AttemptActor:
    """Drives the attempt in a thread, and ends with it: the group goes last, and takes the actor along."""

    def __init__(self, root: str, engine: Row) -> None:
        self._paths, self._engine = AttemptPaths(Path(root)), engine
        _speak_into(self._paths.log)
        processes.adopt_orphans()
        processes.pin(os.getpid(), _cores(self._paths) or os.sched_getaffinity(0))
        self._name = ""
        attempt = Attempt.read(self._paths)
        self._crew = RayCrew(attempt) if attempt is not None else None
        self._name = attempt.name if attempt is not None else ""
        threading.Thread(target=self._drive, name="permed-drive", daemon=True).start()

    def _drive(self) -> None:
        try:
            drive(self._paths, lambda attempt: self._crew or RayCrew(attempt), self._engine)
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._name:
            processes.kill_attempt(self._name, spare={os.getpid()}, timeout_s=2.0)
            with contextlib.suppress(RayError, ValueError):
                remove_placement_group(get_placement_group(self._name))
                time.sleep(5.0)
        os._exit(0)


class MemberActor:
    """A `Member` in a process of its own. Threads: two parts, and one to spare."""

    def __init__(self, root: str, slot: int) -> None:
        paths = AttemptPaths(Path(root))
        check_fence(paths)
        _speak_into(paths.log)
        processes.adopt_orphans()
        processes.pin(os.getpid(), _cores(paths) or os.sched_getaffinity(0))  # before it starts what inherits that
        attempt = Attempt.read(paths)
        grant = attempt.grants[slot] if attempt is not None else None
        cpus = grant.cpu_milli / 1000 if grant is not None else 1.0
        gpus = device.visible(grant.devices) if grant is not None and grant.devices else ""
        with contextlib.suppress(ValueError):  # not in the main thread: then SIGTERM does what Ray lets it do
            TERMINATION.listen()
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._member = Member(root, slot, isolated=True, dask_get=_dask_get(cpus), gpu_env=gpus, address=address)
        self._table = ProcessTable()
        threading.Thread(target=_end_when_orphaned, args=(paths.root,), name="permed-orphan", daemon=True).start()

    def call(self, name: str, row: Row) -> Row:
        answer: Row = getattr(self._member, name)(row)
        return answer

    def use(self) -> Row:
        """What this worker uses on its node, for drivers on another."""
        member = self._member
        found = processes.of_attempt(member.attempt.name, self._table.look()).get(str(member.slot), [])
        gpus = device.use_of(member.attempt.grants[member.slot].devices)
        return {**processes.use_of([process.pid for process in found]), "gpus": gpus}


class RayCrew:
    """See `worker.Crew`. Members live in the bundles of the attempt's group, and so does what they start in Ray."""

    def __init__(self, attempt: Attempt) -> None:
        self.size = len(attempt.grants)
        self._attempt = attempt
        self._group = get_placement_group(attempt.name)
        self._hires = itertools.count(1)
        self._open: dict[Future[Row], int] = {}
        self._closed = threading.Event()
        self._watchdog = Watchdog(
            attempt.name, [grant.memory for grant in attempt.grants], _cores(attempt.paths), self._driver_over
        )
        self._members = [self._hired(slot) for slot in range(self.size)]
        nodes = raybridge.living(ray.nodes())  # type: ignore[no-untyped-call]
        self._raylets = {row["name"]: (row["address"], row["port"]) for row in nodes}
        if any(grant.node != LOCAL_NODE for grant in attempt.grants):
            threading.Thread(target=self._watch_nodes, name="permed-nodes", daemon=True).start()
        here = attempt.grants[0].node  # the driver stands in the first bundle
        self._devices = {index for grant in attempt.grants if grant.node == here for index in grant.devices}
        self._elsewhere: dict[int, Row] = {slot: {} for slot, grant in enumerate(attempt.grants) if grant.node != here}
        self._watchdog.start()

    def start(self, slot: int, call: str, row: Row) -> Future[Row]:
        outer: Future[Row] = Future()
        self._open[outer] = slot
        outer.add_done_callback(self._open.pop)
        inner: Future[Row] = self._members[slot].call.remote(call, row).future()
        inner.add_done_callback(lambda done: self._hand_over(slot, done, outer))
        return outer

    def restart(self, slot: int) -> None:
        if not self._watchdog.end_slot(slot):
            raise EngineError(f"Processes of worker {slot} cannot be ended.")
        ray.kill(self._members[slot])
        self._members[slot] = self._hire(slot)

    def facts(self) -> Mapping[str, Any]:
        return self._watchdog.facts()

    def use(self) -> Mapping[str, Any]:
        """Of workers on other nodes: what they said when asked last, so that a silent one keeps nobody waiting."""
        rows = [*self._elsewhere.values(), {**self._watchdog.use(), "gpus": device.use_of(self._devices)}]
        for slot in self._elsewhere:
            self._members[slot].use.remote().future().add_done_callback(partial(self._told, slot))
        return {
            "cpu_s": sum(row.get("cpu_s", 0.0) for row in rows), "rss_mib": sum(row.get("rss_mib", 0) for row in rows),
            "gpus": [gpu for row in rows for gpu in row.get("gpus", ())],
        }  # fmt: skip

    def _told(self, slot: int, done: Future[Row]) -> None:
        if done.exception() is None:
            self._elsewhere[slot] = done.result()

    def close(self) -> None:
        self._closed.set()
        self._watchdog.look()
        self._watchdog.stop()
        self._watchdog.end_all()  # first, while what they started is still below them
        for member in self._members:
            ray.kill(member)

    def _hired(self, slot: int) -> Any:
        """The member that was hired with the attempt, or a new one where that was cut short."""
        try:
            return ray.get_actor(_member_name(self._attempt.name, slot))
        except ValueError:
            return self._hire(slot)

    def _hire(self, slot: int) -> Any:
        """Named, too: Ray is asked for members by name when the attempt is ended."""
        name = f"{_member_name(self._attempt.name, slot)}-{next(self._hires)}"
        return hire(self._attempt, slot, self._group, name=name)

    def _watch_nodes(self) -> None:
        """Of a member that had not begun when its node died, Ray says nothing: it looks for a place for ever."""
        while not self._closed.wait(_LOOK_AT_NODES_S):
            with contextlib.suppress(RayError):
                there = {row["name"] for row in raybridge.living(ray.nodes())}  # type: ignore[no-untyped-call]
                for outer, slot in list(self._open.items()):
                    if self._attempt.grants[slot].node not in there:
                        _fail(outer, _node_lost(slot))

    def _hand_over(self, slot: int, done: Future[Row], outer: Future[Row]) -> None:
        error = done.exception()
        if error is None:
            with contextlib.suppress(InvalidStateError):
                outer.set_result(done.result())
        elif isinstance(error, RayTaskError):
            cause = error.cause
            known = isinstance(cause, PermedError)
            _fail(outer, cause if known else EngineError(f"Worker {slot}: {type(cause).__name__}."))
        else:  # which takes seconds, and this thread is Ray's
            threading.Thread(target=self._tell_loss, args=(slot, error, outer), name="permed-loss", daemon=True).start()

    def _tell_loss(self, slot: int, error: BaseException, outer: Future[Row]) -> None:
        _fail(outer, self._watchdog.reason(slot) or self._loss(slot, error))

    def _loss(self, slot: int, error: BaseException) -> WorkerLost:
        """Of a node that has died Ray knows after seconds, and says at first that its process has."""
        lost = _loss(slot, error)
        raylet = self._raylets.get(self._attempt.grants[slot].node)
        if lost.code == "worker-lost" and raylet is not None and not raybridge.holds(*raylet, _DYING_S):
            return _node_lost(slot)
        return lost

    def _driver_over(self, why: WorkerLost) -> None:
        """This very process holds too much: say so and go at once, before the driver could say something else."""
        record = {"outcome": "FAILED", "reason": why.code, "sentence": why.message, "remedy": why.remedy}
        write_json(self._attempt.paths.exit, {**record, "at": wall_clock()})
        os._exit(1)  # the members die with their owner; `end` looks for the rest


def hire_all(attempt: Attempt, group: PlacementGroup) -> None:
    """All members, named: they start while the attempt's actor does, which finds them by name. Twice is as once."""
    for slot in range(len(attempt.grants)):
        hire(attempt, slot, group, name=_member_name(attempt.name, slot), lifetime="detached", get_if_exists=True)


def variables(name: str, paths: AttemptPaths, slot: str) -> dict[str, str]:
    """What every process of the attempt bears: whose it is, and the fence that it has to pass (`raysetup`)."""
    return {ATTEMPT_MARK: f"{name}/{slot}", raysetup.FENCE: f"{paths.number} {paths.job.fence}"}


def hire(attempt: Attempt, slot: int, group: PlacementGroup, **options: Any) -> Any:
    """A member in that slot's bundle. One that is named outlives who hired it, and goes with the attempt's group."""
    grant = attempt.grants[slot]
    threads = str(max(1, grant.cpu_milli // 1000))
    environment = variables(attempt.name, attempt.paths, str(slot)) | dict.fromkeys(_THREAD_VARIABLES, threads)
    if grant.flavor == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif grant.node == LOCAL_NODE:
        environment["CUDA_VISIBLE_DEVICES"] = device.visible(grant.devices)
    where = PlacementGroupSchedulingStrategy(group, slot, placement_group_capture_child_tasks=True)
    # On no CPU of its bundle: those are for what it starts in Ray, e.g. by Dask, which would else wait for ever.
    actor = ray.remote(MemberActor).options(
        num_cpus=0, max_restarts=0, max_concurrency=3, scheduling_strategy=where, runtime_env={"env_vars": environment},
        **options,
    )  # fmt: skip
    return actor.remote(str(attempt.paths.root), slot)


def _member_name(attempt: str, slot: int) -> str:
    return f"{attempt}/{slot}"


def _end_when_orphaned(root: Path) -> None:
    """End this process when nobody drives the attempt any more. The clock stands still while the machine sleeps."""
    sign, since = 0, time.monotonic()
    while time.monotonic() - since < _ORPHANED_S:
        time.sleep(_BEAT_S)
        if (newest := last_sign(root)) != sign:
            sign, since = newest, time.monotonic()
    os._exit(1)


def _fail(outer: Future[Row], error: BaseException) -> None:
    """Unless somebody else has said what became of it."""
    with contextlib.suppress(InvalidStateError):
        outer.set_exception(error)


def _loss(slot: int, error: BaseException) -> WorkerLost:
    words = str(error)
    if "node has died" in words or "node was terminated" in words or type(error).__name__ == "NodeDiedError":
        return _node_lost(slot)
    if type(error).__name__ == "RuntimeEnvSetupError":
        return WorkerLost(f"The environment of worker {slot} cannot be started.", code="bad-image")
    if type(error).__name__ == "OutOfMemoryError":
        return WorkerLost(f"Worker {slot} was ended because the machine ran out of memory.", code="over-memory")
    return WorkerLost(f"The process of worker {slot} is gone.", remedy="See `permed logs`.")


def _node_lost(slot: int) -> WorkerLost:
    return WorkerLost(f"The node of worker {slot} is gone.", code="node-lost")


def _cores(paths: AttemptPaths) -> Sequence[int]:
    return [int(core) for core in read_json(cores_file(paths)) or ()]


def _dask_get(cpus: float) -> Callable[..., Any] | None:
    """Dask-on-Ray inside the bundle: tasks of one core each, or of the part of one that was granted."""
    if importlib.util.find_spec("dask") is None:
        return None

    def get(*args: Any, **kwargs: Any) -> Any:
        from ray.util.dask import ray_dask_get  # dear: only where it is used

        return ray_dask_get(*args, **{"ray_remote_args": {"num_cpus": min(1.0, cpus)}, **kwargs})

    return get


def _speak_into(log: Path) -> None:
    """What this process and its children print goes to the attempt's log."""
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
