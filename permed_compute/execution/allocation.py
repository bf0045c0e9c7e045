"""What runs inside a Slurm allocation: a Ray of its own, the attempt in it, and Slurm's signals made into pauses.

    python -m permed_compute.execution.allocation ATTEMPT          on the first node, as the batch script
    python -m permed_compute.execution.allocation --of LIST        the same, of several that were sent as one array
    srun … python -m permed_compute.execution.allocation --join ATTEMPT      on every other one

Slurm's SIGTERM goes to every process of the job at once, and Ray's would leave before the work could be kept: they are
started with it blocked, and only this process takes it (`sigtimedwait`). SIGUSR1 is the warning before the time limit
(`sbatch --signal=B:USR1@…`). Either way the attempt pauses, its Ray is ended by its own pids, and the job is put back
into Slurm's queue under the same id (`scontrol requeue`), where that is still its owner's to do.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from permed_compute.admission.snapshot import Gpu, Grant, Node
from permed_compute.errors import EngineError, PermedError
from permed_compute.execution import processes, raykeeper, records
from permed_compute.execution.delegated import ask_pause, paused_file, pauses, unpause
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.ray import RayExecutor
from permed_compute.execution.raybridge import NODE_LABEL
from permed_compute.execution.raylocal import LocalRay, Session, bridge_environment
from permed_compute.execution.slurm import claim_file, warning_s
from permed_compute.execution.slurmjobs import Slurm
from permed_compute.paths import AttemptPaths, HomePaths, read_json, write_json
from permed_compute.queue.port import wall_clock
from permed_compute.settings import Settings

log = logging.getLogger(__name__)

_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}
_POLL_S = 0.2
_LOOK_S = 5.0
_NODES_S = 180.0
"""How long the other nodes may take to join."""
_WARNED_EARLY_S = 90.0
"""Slurm sends its warning up to a minute early."""
_LONGEST_FOLDER = 40
"""Ray's sockets stand below it, and a socket's path has 107 bytes at most."""


def main(words: Sequence[str]) -> int:
    """Run the attempt, or join its Ray; 0 unless it could not be begun."""
    join = words[0] == "--join"
    paths = _of_array(Path(words[1])) if words[0] == "--of" else AttemptPaths(Path(words[-1]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # inherited by all that is started from here
    processes.adopt_orphans()  # so that Slurm, which goes by parents, finds what Ray has detached
    attempt = Attempt.read(paths)
    if attempt is None:
        return 1
    if join:
        return _joined(attempt)
    if not _ours(paths):
        return 0
    try:
        _Lead(attempt).run()
    except PermedError as error:
        _end(paths, "FAILED", error.code, error.message, error.remedy)
    return 0


def _of_array(attempts: Path) -> AttemptPaths:
    """Which of the attempts this task of the array is for; what it prints goes where that attempt's does."""
    folder = Path(attempts.read_text(encoding="utf-8").splitlines()[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    handle = os.open(folder / "slurm.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    return AttemptPaths(folder)


def _ours(paths: AttemptPaths) -> bool:
    """Whether the attempt is this job's to run: not ended, not asked to stop meanwhile, not another job's."""
    if paths.exit.exists():
        return False
    if paths.stop.exists() and not pauses(paths):
        _end(paths, "STOPPED", "stopped", "It was asked to stop before it started.")
        return False
    mine = {"job": _job_id(), "cluster": os.environ.get("SLURM_CLUSTER_NAME", "")}
    try:
        handle = os.open(claim_file(paths), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if (read_json(claim_file(paths)) or mine) != mine:
            log.info("another job has this attempt")
            return False
    else:
        os.close(handle)
        write_json(claim_file(paths), mine)
    unpause(paths)
    return True


def _end(paths: AttemptPaths, outcome: str, reason: str, sentence: str, remedy: str = "") -> None:
    """The exit record, where the driver could not write it."""
    if not paths.exit.exists():
        record = {"outcome": outcome, "reason": reason, "sentence": sentence, "remedy": remedy}
        write_json(paths.exit, {**record, "at": wall_clock()})


# --------------------------------------------------------------------------------------------- the first node


class _Lead:
    """One run of the attempt in this allocation, from Ray's start to its end."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt, self._paths = attempt, attempt.paths
        self._count = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        self._began = time.monotonic()
        self._kept = _kept(attempt.paths)
        self._runtime = _runtime(attempt.name)
        self._node = own_node()
        self._ray = LocalRay(
            self._runtime,
            self._node,
            label=f"{NODE_LABEL}={self._node.name}",
            address=_address() if self._count > 1 else "",
        )
        self._told: signal.Signals | None = None
        self._steps: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        self._runtime.mkdir(mode=0o700, exist_ok=True)
        here = raykeeper.say_here(self._runtime)
        listener = self._step("sleep", "infinity", nodes=1)
        try:
            session = self._ray.start()
            os.environ.update({
                name: value for name, value in bridge_environment(self._ray, session.address).items()
                if name.startswith("RAY_")
            })  # fmt: skip
            self._invite(session)
            executor = _Inside(self._attempt, session, self._count)
            try:
                self._place(executor)
                self._watch(executor, session, listener)
            finally:
                executor.close()
        finally:
            _head_file(self._paths).unlink(missing_ok=True)
            for step in self._steps:
                step.terminate()
            if not self._ray.stop():
                log.warning("processes of Ray are left for Slurm to end")
            os.close(here)
            shutil.rmtree(self._runtime, ignore_errors=True)
        if paused_file(self._paths).exists():
            self._again()

    def _invite(self, session: Session) -> None:
        """Have the other nodes join. The token goes by a file that only this user reads."""
        if self._count == 1:
            return
        token = _token_file(self._paths)
        token.unlink(missing_ok=True)
        token.touch(mode=0o600)
        token.write_text(self._ray.token.read_text())
        head = {"address": session.address, "job": _job_id(), "folder": str(self._runtime), "memory": self._node.memory}
        write_json(_head_file(self._paths), head)
        us = [sys.executable, "-P", "-m", "permed_compute.execution.allocation", "--join", str(self._paths.root)]
        self._step(*us, nodes=self._count - 1, first=1)

    def _place(self, executor: _Inside) -> None:
        """Give each worker its node, once all nodes are there, and start the attempt."""
        deadline = time.monotonic() + _NODES_S
        while len(nodes := executor.nodes()) < self._count:
            left = any(step.poll() is not None for step in self._steps[1:])
            if left or time.monotonic() > deadline:
                raise EngineError(f"{len(nodes)} of {self._count} nodes joined Ray.", remedy="See slurm.out.")
            time.sleep(_POLL_S)
        self._attempt = replace(self._attempt, grants=place(self._attempt.grants, nodes))
        self._attempt.write()
        executor.launch(self._attempt)

    def _watch(self, executor: _Inside, session: Session, listener: subprocess.Popen[bytes] | None) -> None:
        """Until the attempt has ended or paused, or is lost with its Ray."""
        look = time.monotonic() + _LOOK_S
        while not (self._paths.exit.exists() or paused_file(self._paths).exists()):
            got = signal.sigtimedwait(_SIGNALS, _POLL_S)
            number = signal.Signals(got.si_signo) if got is not None else _told_by(listener)
            if number is not None and number is not self._told and not self._tell(number):
                return
            if time.monotonic() > look:
                look = time.monotonic() + _LOOK_S
                if not session.lives() or executor.liveness(self._attempt) is Liveness.GONE:
                    return

    def _tell(self, number: signal.Signals) -> bool:
        """Ask the attempt to pause. False where it was asked to stop before: then it has had its time."""
        log.info("Slurm sends %s", number.name)
        self._told = number
        if self._paths.stop.exists():
            return pauses(self._paths)
        limit = self._began + self._attempt.spec.time_limit
        left = limit - time.monotonic()
        late = number is signal.SIGUSR1 and left < warning_s(self._attempt.spec.time_limit) + _WARNED_EARLY_S
        ask_pause(self._paths, "time-limit" if late else "preempted")
        return True

    def _again(self) -> None:
        """Back into Slurm's queue, or an exit record: stopped, for the controller to decide."""
        reason = (read_json(self._paths.stop) or {}).get("reason", "")
        chained = int((read_json(self._chain) or {}).get("times", 0))
        if reason == "time-limit":
            if chained >= self._attempt.spec.continuations or _kept(self._paths) <= self._kept:
                write_json(self._paths.stop, {"reason": reason, "at": wall_clock(), "continued": chained})
                _end(self._paths, "STOPPED", "stopped", "It stopped where it can go on.")
                return
            write_json(self._chain, {"times": chained + 1})
        slurm = Slurm()
        try:
            states = [job.state for job in slurm.jobs() if job.number == _job_id()]
            if states and states[0] != "RUNNING":  # being cancelled, or put back by Slurm itself
                return
            slurm.requeue(_job_id())
        except EngineError as error:
            log.info("%s", error.message)
            write_json(self._paths.stop, {"reason": "executor-closed", "at": wall_clock()})
            _end(self._paths, "STOPPED", "stopped", "It stopped where it can go on.")

    @property
    def _chain(self) -> Path:
        return self._paths.root / "continued.json"

    def _step(self, *command: str, nodes: int, first: int = 0) -> subprocess.Popen[bytes] | None:
        """A step on that many nodes; None where Slurm's commands are not (in some containers)."""
        words = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--mem=0",
                 f"--relative={first}", "--kill-on-bad-exit=0", "--quiet"]  # fmt: skip
        if nodes > 1 or first:
            words.append(f"--cpus-per-task={os.environ.get('SLURM_CPUS_ON_NODE', '1')}")
        try:
            step = subprocess.Popen([*words, *command], stdin=subprocess.DEVNULL, start_new_session=True)
        except FileNotFoundError:
            log.info("srun is not here: Slurm's early warning is not heard")
            return None
        self._steps.append(step)
        return step


def _told_by(listener: subprocess.Popen[bytes] | None) -> signal.Signals | None:
    """A step gets the SIGTERM that begins a grace period, and the batch script does not."""
    if listener is None or listener.poll() is None:
        return None
    return signal.SIGTERM if listener.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM) else None


def _kept(paths: AttemptPaths) -> int:
    """Finished parts and written checkpoints of the attempt so far."""
    rows = [*records.read(paths.records())[0], *records.read(paths.records("rank-0"))[0]]
    return sum(row["kind"] in ("part", "checkpoint") and row.get("state") not in ("FAILED", "REUSED") for row in rows)


class _Inside(RayExecutor):
    """The allocation's Ray, which the executor is given by address."""

    name = "slurm"

    def __init__(self, attempt: Attempt, session: Session, count: int) -> None:
        super().__init__(Settings(home=str(attempt.home), ray_address=session.address), HomePaths(attempt.home))
        self._count = count

    def facts(self) -> Mapping[str, Any]:
        return {
            "engine": self.name, "job": _job_id(), "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
            "partition": os.environ.get("SLURM_JOB_PARTITION", ""), "nodes": self._count,
            "ray": importlib.metadata.version("ray"),
        }  # fmt: skip


# --------------------------------------------------------------------------------------------- every other node


def _joined(attempt: Attempt) -> int:
    """Be a node of the attempt's Ray until the first node takes its invitation back."""
    head = read_json(_head_file(attempt.paths)) or {}
    if head.get("job") != _job_id():
        return 1
    node = replace(own_node(), memory=head["memory"])
    runtime = _runtime(f"{attempt.name}/{node.name}")
    ray = LocalRay(runtime, node, label=f"{NODE_LABEL}={node.name}", address=_address(), join=head["address"],
                   secret=_token_file(attempt.paths).read_text())  # fmt: skip
    folders = [folder for folder in (runtime, Path(head["folder"])) if not folder.exists()]  # Ray takes its head's too
    for folder in folders:
        folder.mkdir(mode=0o700)
    here = raykeeper.say_here(runtime)
    try:
        try:
            session = ray.start()
        except EngineError:
            log.info("%s", (runtime / "ray-start.log").read_text(errors="replace")[-2000:])
            raise
        while session.lives() and (read_json(_head_file(attempt.paths)) or {}).get("job") == _job_id():
            signal.sigtimedwait(_SIGNALS, 1.0)  # Slurm's signals are the first node's to answer
    finally:
        ray.stop()
        os.close(here)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


# --------------------------------------------------------------------------------------------- what Slurm gave


def own_node() -> Node:
    """What this job may use of this node, by Slurm's variables; where they are silent, by the machine."""
    given = os.environ
    cpus = int(given.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
    memory = int(given.get("SLURM_MEM_PER_NODE") or int(given.get("SLURM_MEM_PER_CPU") or 0) * cpus)
    memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    gpus = range(int(given.get("SLURM_GPUS_ON_NODE") or 0))
    name = given.get("SLURMD_NODENAME") or socket.gethostname()
    return Node(name, cpus * 1000, memory, tuple(Gpu("gpu", place, 0) for place in gpus))


def place(grants: Iterable[Grant], nodes: Iterable[Node]) -> tuple[Grant, ...]:
    """The workers on the allocation's nodes, in order, each on the first that has room for it.

    Admission granted them on the site as a whole. Raises `EngineError` where the allocation is too small.
    """
    rooms = [
        {"node": node, "cpu": node.cpu_milli, "memory": node.memory, "gpus": {gpu.index: 1000 for gpu in node.gpus}}
        for node in nodes
    ]
    made = []
    for number, grant in enumerate(grants):
        found = next((placed for room in rooms if (placed := _placed(grant, room)) is not None), None)
        if found is None:
            raise EngineError(
                f"The allocation has no room for worker {number} ({grant.cpu_milli / 1000:g} CPU, {grant.memory} MiB,"
                f" {grant.gpu_milli / 1000:g} GPU).",
                remedy="`permed site render JOB` shows what was asked for.",
            )
        made.append(found)
    return tuple(made)


def _placed(grant: Grant, room: dict[str, Any]) -> Grant | None:
    whole, share = divmod(grant.gpu_milli, 1000)
    devices = [index for index, left in room["gpus"].items() if left >= (share or 1000)][: whole or bool(share)]
    if room["cpu"] < grant.cpu_milli or room["memory"] < grant.memory or len(devices) < (whole or bool(share)):
        return None
    room["cpu"] -= grant.cpu_milli
    room["memory"] -= grant.memory
    for index in devices:
        room["gpus"][index] -= share or 1000
    return replace(grant, node=room["node"].name, devices=tuple(devices))


def _runtime(name: str) -> Path:
    """A short private folder, this job's on this node alone."""
    digest = hashlib.sha256(f"{name} {_job_id()}".encode()).hexdigest()[:10]
    base = Path(tempfile.gettempdir())
    return (base if len(str(base)) <= _LONGEST_FOLDER else Path("/tmp")) / f"permed-{os.getuid()}-{digest}"  # noqa: S108


def _address() -> str:
    """This node's address for the other nodes, as Slurm knows it."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        return socket.gethostbyname(Slurm().address(name) or name)
    except (OSError, EngineError):
        return socket.gethostbyname(socket.gethostname())


def _head_file(paths: AttemptPaths) -> Path:
    """The first node's invitation to the others; there as long as it wants them."""
    return paths.root / "ray-head.json"


def _token_file(paths: AttemptPaths) -> Path:
    return paths.root / "ray.token"


def _job_id() -> str:
    """As squeue names it: an array's task by the array's number and its place there."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID", "")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
