"""The Slurm executor: an attempt is one Slurm job of the attempt's name, with a Ray of its own inside (`allocation`).

Slurm places; admission grants on the site as a whole, and `sites.request` makes that into an allocation. No daemon:
whoever opens the home looks (`squeue`), sends what waits, and adopts by name what an earlier process has sent.

The truth about an attempt: its exit record, then squeue, then, for how it ended, sacct. Once: a ticket in the attempt's
folder is written before sbatch is called, under a lock that sbatch inherits; a ticket without a number is looked up by
name before anything is sent again, and the allocation claims the attempt by a file that only the first can create.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from permed_compute.admission.snapshot import Gpu, Node
from permed_compute.errors import EngineError, PermedError, SettingsError
from permed_compute.execution import records
from permed_compute.execution.context import fenced_off
from permed_compute.execution.delegated import EngineAwayError, Word
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.slurmjobs import Slurm, SlurmJob, in_words
from permed_compute.paths import AttemptPaths, HomePaths, JobPaths, is_locked, read_json, replacing, write_json
from permed_compute.queue.port import Job, wall_clock
from permed_compute.settings import Settings
from permed_compute.sites import check, profile, render
from permed_compute.sites import request as requests
from permed_compute.spec import JobSpec

log = logging.getLogger(__name__)

_PREFIX = "permed-"
_ARRAY = "-array"
_ASKED = "site.json"
_TOGETHER = 200
"""Elements of one Slurm array at most: sbatch inherits the lock of each, and few may open more than 1024 files."""
_LEAVING_S = 20.0
"""An allocation has so long to leave by itself after its attempt has ended."""
_ENDLESS_CPU, _ENDLESS_MEMORY = 1 << 40, 1 << 50
_LOST = {
    "TIMEOUT": "time-limit", "DEADLINE": "time-limit", "OUT_OF_MEMORY": "over-memory", "NODE_FAIL": "node-lost",
    "BOOT_FAIL": "node-lost", "CANCELLED": "cancelled-in-slurm", "REVOKED": "cancelled-in-slurm",
    "PREEMPTED": "evicted",
}  # fmt: skip


def ticket_file(paths: AttemptPaths) -> Path:
    """`{job, at, site}`: written before sbatch is called, with `job` empty, and again with its answer."""
    return paths.root / "slurm.json"


def lock_file(paths: AttemptPaths) -> Path:
    """Held while the attempt is being sent, by whoever sends it and by its sbatch."""
    return paths.root / "slurm.lock"


def array_file(paths: AttemptPaths) -> Path:
    """Of attempts that went out as one Slurm array: the folder of each, a line each, beside the first of them."""
    return paths.root / "slurm-array.txt"


def claim_file(paths: AttemptPaths) -> Path:
    """Which Slurm job has this attempt: the first that starts, and no other ever."""
    return paths.root / "slurm-claim.json"


def warning_s(time_limit: int) -> int:
    """How long before the limit Slurm is to warn: two minutes, or a quarter of a short limit.

    Slurm looks at limits twice a minute, and warns up to a minute early: half would leave a short limit no time.
    """
    return min(120, time_limit // 4)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user says about the site beside the job; kept with the job, for whoever sends it, now or later."""

    choice: requests.Choice
    stage_in: tuple[tuple[str, str], ...] = ()
    stage_out: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Asked:
        """As the settings have it. Raises `SettingsError`."""
        choice = requests.Choice(
            settings.site_account, settings.site_partition, settings.site_qos, settings.site_image,
            tuple(settings.site_options.split()),
        )  # fmt: skip
        return cls(choice, _pairs(settings.site_stage_in), _pairs(settings.site_stage_out))

    @classmethod
    def read(cls, job: JobPaths, settings: Settings) -> Asked:
        """As it was said when the job was submitted; as the settings have it where nothing was kept."""
        row = read_json(job.root / _ASKED)
        if row is None:
            return cls.of(settings)
        choice = requests.Choice(**{**row["choice"], "options": tuple(row["choice"]["options"])})
        return cls(choice, *(tuple((a, b) for a, b in row[name]) for name in ("stage_in", "stage_out")))

    def write(self, job: JobPaths) -> None:
        job.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(job.root / _ASKED, asdict(self))


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    rows = [word.split(":") for word in text.split()]
    if any(len(row) != 2 or not all(path.startswith("/") for path in row) for row in rows):
        raise SettingsError(f"{text!r} is not FROM:TO with absolute paths.", remedy="--stage-in /nird/in:/cluster/in")
    return tuple((row[0], row[1]) for row in rows)


class SlurmExecutor:
    """See `execution.port.Executor` and `execution.delegated.Delegated`."""

    name = "slurm"

    def __init__(self, settings: Settings, home: HomePaths, slurm: Slurm | None = None) -> None:
        if not settings.site:
            raise EngineError("The executor is slurm, and no site is named.", remedy="--site NAME: `permed site list`.")
        self.site = profile.load(settings.site)
        if self.site.scheduler.kind != "slurm":
            raise EngineError(
                f"{self.site.name} is not run by Slurm ({self.site.scheduler.kind}).", remedy="`permed site list`."
            )
        self._settings, self._home = settings, home
        self.slurm = slurm or Slurm()
        self._cancelled: set[str] = set()
        self._expected: Mapping[str, Sequence[Attempt]] = {}
        self._arrays: dict[str, list[str]] = {}
        """Of each Slurm array, by its name, the attempts' names."""

    # ------------------------------------------------------------------------------------- the port

    def nodes(self) -> tuple[Node, ...]:
        """The site as one node without end: Slurm places. Its GPUs are those of the profile, by flavor."""
        kinds = [kind for facts in self.site.partitions.values() for kind in facts.gpu_nodes]
        flavors = [(kind.flavor, kind.gpu_memory) for kind in kinds for _ in range(max(1, kind.count) * kind.gpus)]
        gpus = tuple(Gpu(flavor, place, memory) for place, (flavor, memory) in enumerate(flavors))
        return (Node(self.site.name, _ENDLESS_CPU, _ENDLESS_MEMORY, gpus),)

    def launch(self, attempt: Attempt) -> None:
        if attempt.paths.exit.exists():
            return
        with ExitStack() as stack:
            handle = stack.enter_context(_alone(attempt))
            ticket = read_json(ticket_file(attempt.paths))
            if ticket is not None and (ticket["job"] or self._heard(attempt)):
                return
            self.slurm.jobs()  # whoever cannot be asked is not sent anything either
            others = self._siblings(attempt, stack)
            if not (others and self._send_together([(attempt, handle), *others])):
                self._send(attempt, handle)

    def liveness(self, attempt: Attempt) -> Liveness:
        ticket = read_json(ticket_file(attempt.paths))
        if ticket is None:
            return Liveness.GONE
        if is_locked(lock_file(attempt.paths)):
            return Liveness.UNKNOWN
        try:
            found = self._of(attempt)
        except EngineError as error:
            log.info("%s: %s", attempt.name, error.message)
            return Liveness.UNKNOWN
        if any(job.live for job in found):
            return Liveness.ALIVE
        os.listdir(attempt.paths.root)  # noqa: PTH208 - has a network file system look for the exit record anew
        return Liveness.GONE

    def end(self, attempt: Attempt) -> bool:
        if read_json(ticket_file(attempt.paths)) is None:
            return True
        if is_locked(lock_file(attempt.paths)):
            return False
        try:
            return self._end([job for job in self._of(attempt) if job.live], attempt.paths)
        except EngineError as error:
            log.info("end of %s not confirmed: %s", attempt.name, error.message)
            return False

    def sweep(self, keep: Iterable[Attempt]) -> list[str]:
        kept = {attempt.name for attempt in keep}
        try:
            jobs = [(self._whose(job), job) for job in self.slurm.jobs() if job.live]
            gone = [(name, job) for name, job in jobs if name not in kept and self._is_ours(name)]
            for _, job in gone:
                self.slurm.cancel(job.number)
        except EngineError as error:
            log.warning("not swept: %s", error.message)
            return []
        return sorted({name for name, _ in gone})

    def facts(self) -> Mapping[str, Any]:
        return {"engine": self.name, "version": self.slurm.version(), "site": self.site.name}

    def close(self) -> None:
        """Nothing: what is in Slurm is Slurm's until it has ended."""

    # ------------------------------------------------------------------------------------- delegated

    def expect(self, arrays: Mapping[str, Sequence[Attempt]]) -> None:
        self._expected = arrays

    def how_lost(self, attempt: Attempt) -> str:
        number = (read_json(ticket_file(attempt.paths)) or {}).get("job", "")
        try:
            ended = [job for job in self._of(attempt) if not job.live and job.number == (number or job.number)]
        except EngineError:
            ended = []
        state = ended[-1].state if ended else self.slurm.recorded(number) if number else ""
        if not state and "_" in number and not claim_file(attempt.paths).exists():
            return "cancelled-in-slurm"  # an array's element that never began: slurmctld forgets those at once
        return _LOST.get(state, "attempt-lost")

    def says(self, attempt: Attempt) -> Word | None:
        ticket = read_json(ticket_file(attempt.paths))
        number = ticket["job"] if ticket is not None else ""
        try:
            found = [job for job in self._of(attempt) if job.live]
        except EngineAwayError as error:
            if number:
                told = f"{error.message} It is job {number} there, and goes on without that."
                return Word("slurm-away", told, "Nothing: it is asked again by the next `permed` command.")
            return Word(
                "slurm-away", f"{error.message} The job is safe in this queue, and not sent yet.",
                "Nothing: the next `permed` command sends it once Slurm is back; `permed controller` waits for that.",
            )  # fmt: skip
        if not found:
            sent = f"It was sent to Slurm as job {number}, which has ended." if number else "It is not sent yet."
            return Word("slurm-sent" if number else "slurm-unsent", sent, "`permed status` looks again.")
        job = found[0]
        if job.state == "RUNNING":
            starting = not records.last_sign(attempt.paths.root)
            return Word("slurm-starting", f"{_standing(job)}; its Ray is starting.") if starting else None
        if job.state == "STAGE_OUT" and job.reason.startswith("burst_buffer/"):
            return Word(
                "slurm-stage-out-failed", f"It has ended, with its results in this home; the site's scheduler could not"
                f" copy its files out ({job.reason}), and keeps job {job.number} until somebody ends that.",
                f"Copy them by hand; then: scontrol requeue {job.number} && scancel {job.number}",
            )  # fmt: skip
        if job.state != "PENDING":
            return Word("slurm-" + job.state.lower().replace("_", "-"), f"{_standing(job)}.")
        why, change = in_words(job.reason)
        when = f" Slurm expects to start it {_clock(job.starts)}." if job.starts else ""
        return Word("slurm-pending", f"{_standing(job)} ({job.reason}): {why}.{when}", change)

    def allocations(self) -> list[tuple[str, SlurmJob]]:
        """(job id, what Slurm says) of this home's allocations, those that run first. Raises `EngineError`."""
        jobs = [(self._whose(job), job) for job in self.slurm.jobs() if job.live]
        ours = [(name.removeprefix(_PREFIX).rpartition("-")[0], job) for name, job in jobs if self._is_ours(name)]
        return sorted(ours, key=lambda row: (row[1].state != "RUNNING", _order(row[1])))

    # ------------------------------------------------------------------------------------- sending

    def queued(self, jobs: Iterable[Job]) -> None:
        """Keep with new jobs what was said about the site."""
        asked = Asked.of(self._settings)
        for job in jobs:
            asked.write(self._home.job(job.id))

    def request(self, spec: JobSpec, asked: Asked | None = None) -> requests.Request:
        """The allocation that a job, or an array's each element, asks for. asked: default, as the settings have it."""
        return requests.of(spec, self.site, (asked or Asked.of(self._settings)).choice)

    def require(self, spec: JobSpec) -> None:
        """Raises `SiteRefusalError` with every rule of the site that the job breaks."""
        check.require(self.request(spec))

    def script(self, attempt: Attempt, count: int = 1) -> str:
        """The file that sbatch is given, for that many attempts of which this is the first.

        Raises `PermedError` where the site cannot be asked for that.
        """
        paths, asked = attempt.paths, Asked.read(attempt.paths.job, self._settings)
        request = self.request(attempt.spec, asked)
        command = [self._settings.site_python or sys.executable, "-P", "-m", "permed_compute.execution.allocation"]
        many = count > 1
        return render.sbatch(
            request, [*command, *(["--of", str(array_file(paths))] if many else [str(paths.root)])],
            job_name=attempt.name + _ARRAY * many, array=f"0-{count - 1}" if many else "",
            output=paths.root / ("slurm-array-%a.out" if many else "slurm.out"),
            signal_s=warning_s(attempt.spec.time_limit), stage_in=asked.stage_in, stage_out=asked.stage_out,
        )  # fmt: skip

    def _send(self, attempt: Attempt, handle: int) -> None:
        try:
            number = self._submit([attempt], [handle])
        except EngineAwayError:
            raise
        except PermedError as error:
            raise EngineError(error.message, remedy=error.remedy) from None
        _note(attempt, self.site.name, number)

    def _send_together(self, each: Sequence[tuple[Attempt, int]]) -> bool:
        """As one Slurm array. False where Slurm takes none, or none so large: then one by one, and it says why."""
        attempts = [attempt for attempt, _ in each]
        try:
            number = self._submit(attempts, [handle for _, handle in each])
        except EngineAwayError:
            raise
        except PermedError as error:
            log.info("not as an array: %s", error.message)
            self._expected = {}
            return False
        for index, attempt in enumerate(attempts):
            _note(attempt, self.site.name, f"{number}_{index}")
        return True

    def _submit(self, attempts: Sequence[Attempt], handles: Sequence[int]) -> str:
        """Slurm's number. Where it is away, perhaps it was heard: the tickets stay, and say that it was tried."""
        first = attempts[0]
        script = first.paths.root / "slurm.sh"
        try:
            script.write_text(self.script(first, len(attempts)), encoding="utf-8")
            if len(attempts) > 1:
                with replacing(array_file(first.paths)) as new:
                    new.write_text("".join(f"{attempt.paths.root}\n" for attempt in attempts), encoding="utf-8")
                self._arrays.pop(first.name + _ARRAY, None)
            for attempt in attempts:
                _note(attempt, self.site.name, "")
            return self.slurm.submit(script, pass_fds=handles)
        except EngineAwayError:
            raise
        except PermedError:
            for attempt in attempts:
                ticket_file(attempt.paths).unlink(missing_ok=True)
            raise

    def _siblings(self, attempt: Attempt, stack: ExitStack) -> list[tuple[Attempt, int]]:
        """Elements of the same array that nobody has sent or given up, each with its lock."""
        array = next((found for found in self._expected.values() if attempt.name in {one.name for one in found}), ())
        taken: list[tuple[Attempt, int]] = []
        for other in array:
            if len(taken) == _TOGETHER - 1:
                break
            if other.name == attempt.name or other.paths.exit.exists() or fenced_off(other.paths):
                continue
            if ticket_file(other.paths).exists():
                continue
            with suppress(EngineAwayError):  # somebody else is just sending it
                taken.append((other, stack.enter_context(_alone(other))))
        return taken

    def _heard(self, attempt: Attempt) -> bool:
        """Whether Slurm has the attempt although nobody has noted its answer; more than one are one too many."""
        found = self._of(attempt)
        if not found:
            return claim_file(attempt.paths).exists()
        first, *others = sorted(found, key=lambda job: (not job.live, _order(job)))
        for job in others:
            if job.live:
                self.slurm.cancel(job.number)
        ticket = read_json(ticket_file(attempt.paths)) or {}
        write_json(ticket_file(attempt.paths), {**ticket, "job": first.number})
        return True

    # ------------------------------------------------------------------------------------- looking

    def _of(self, attempt: Attempt) -> list[SlurmJob]:
        return [job for job in self.slurm.jobs() if self._whose(job) == attempt.name]

    def _whose(self, job: SlurmJob) -> str:
        """The attempt that it is for, by its name and, in an array, its place there."""
        if not (job.name.startswith(_PREFIX) and job.name.endswith(_ARRAY)):
            return job.name
        place = job.number.partition("_")[2]
        attempts = self._array(job.name)
        return attempts[int(place)] if place.isdigit() and int(place) < len(attempts) else ""

    def _array(self, name: str) -> list[str]:
        if name not in self._arrays:
            paths = self._paths_of(name.removesuffix(_ARRAY))
            lines = array_file(paths).read_text().splitlines() if paths and array_file(paths).exists() else []
            folders = [AttemptPaths(Path(line)) for line in lines]
            self._arrays[name] = [f"{_PREFIX}{folder.job.job_id}-{folder.number:04d}" for folder in folders]
        return self._arrays[name]

    def _paths_of(self, name: str) -> AttemptPaths | None:
        job_id, _, number = name.removeprefix(_PREFIX).rpartition("-")
        known = name.startswith(_PREFIX) and job_id and number.isdigit()
        return self._home.job(job_id).attempt(int(number)) if known else None

    def _end(self, live: list[SlurmJob], paths: AttemptPaths) -> bool:
        for job in live:
            if job.number in self._cancelled or job.state in ("COMPLETING", "STAGE_OUT") or _leaves(paths):
                continue
            self.slurm.cancel(job.number)
            self._cancelled.add(job.number)
        return not live

    def _is_ours(self, name: str) -> bool:
        paths = self._paths_of(name)
        return paths is not None and paths.launch.exists()


def _note(attempt: Attempt, site: str, number: str) -> None:
    write_json(ticket_file(attempt.paths), {"at": wall_clock(), "site": site, "job": number})


@contextmanager
def _alone(attempt: Attempt) -> Iterator[int]:
    """The attempt's lock; `EngineAwayError` while somebody else's sbatch is under way."""
    handle = os.open(lock_file(attempt.paths), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EngineAwayError("Another process is just sending it to Slurm.") from None
    else:
        yield handle
    finally:
        os.close(handle)


def _leaves(paths: AttemptPaths) -> bool:
    """Whether the attempt has ended only just now, so that its allocation is about to go by itself."""
    try:
        return time.time() - paths.exit.stat().st_mtime < _LEAVING_S
    except FileNotFoundError:
        return False


def _order(job: SlurmJob) -> int:
    return int(job.number.split("_")[0]) if job.number.split("_")[0].isdigit() else 0


def _standing(job: SlurmJob) -> str:
    return f"Slurm has it as job {job.number} in {job.partition}, {job.state.replace('_', ' ')}"


def _clock(at: int) -> str:
    """`on Sun 22 Nov at 05:30`, in this machine's time."""
    return time.strftime("on %a %d %b at %H:%M", time.localtime(at / 1000))
