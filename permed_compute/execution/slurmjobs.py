"""Slurm's own commands: sbatch, squeue, sacct, scancel, scontrol. What they say, as rows; when they do not answer.

Nothing here knows of attempts. A command that cannot reach slurmctld raises `EngineAwayError`: nothing was refused, and
nothing is known. For a few seconds after that nobody is asked again, since each question waits for its own time-out.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from permed_compute.errors import EngineError
from permed_compute.execution.delegated import EngineAwayError

_ASK_S = 8.0
_SEND_S = 60.0
"""sbatch tries again by itself while slurmctld is busy; ended too early, nobody would know whether it was heard."""
_AWAY_S = 5.0
_FRESH_S = 1.0
_AWAY = re.compile(
    r"unable to contact slurm controller|socket timed out|connection refused|connect failure|zero bytes were|"
    r"communication (shutdown|connection) failure|backup controller|unable to establish (controller|configuration)|"
    r"resource temporarily unavailable|protocol authentication error|slurm temporarily unable",
    re.IGNORECASE,
)
"""Words of commands that have not been heard. What is not among them is slurmctld's own answer: a refusal."""

LIVE = frozenset({
    "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD",
})  # fmt: skip
"""States in which processes of the job run, or may still start. Every other state is an end."""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """One line of squeue. `number` is the job's id; `starts`: when it is expected to start (ms), 0 unknown."""

    number: str
    name: str
    state: str
    reason: str
    starts: int
    partition: str

    @property
    def live(self) -> bool:
        return self.state in LIVE


class Slurm:
    """Thread-safe. `user`: whose jobs; default: this process's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: tuple[float, tuple[SlurmJob, ...]] | None = None
        self._away_until = 0.0
        self._away_said = ""

    def submit(self, script: Path, pass_fds: Sequence[int] = ()) -> str:
        """Hand over a script; the job's id. Raises `EngineError` with Slurm's words where it refuses."""
        said = self._ask("sbatch", "--parsable", str(script), timeout_s=_SEND_S, pass_fds=pass_fds)
        self.forget()
        return said.strip().splitlines()[-1].split(";")[0]

    def jobs(self) -> tuple[SlurmJob, ...]:
        """Every job of this user that slurmctld still has, ended ones included; at most a second old."""
        with self._lock:
            if self._seen is not None and time.monotonic() - self._seen[0] < _FRESH_S:
                return self._seen[1]
        lines = self._ask("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r|%S|%P|%j")
        jobs = tuple(_job(line) for line in lines.splitlines() if line.count("|") >= 5)
        with self._lock:
            self._seen = (time.monotonic(), jobs)
        return jobs

    def forget(self) -> None:
        """The next question about jobs is asked anew."""
        with self._lock:
            self._seen = None

    def recorded(self, number: str) -> str:
        """How the job ended, by the accounting; '' where there is none, or where it does not know."""
        try:
            said = self._ask("sacct", "--jobs", number, "--allocations", "--noheader", "--parsable2", "--format=State")
        except EngineError:
            return ""
        lines = said.split("\n")
        return lines[0].split(" ")[0].strip() if lines else ""  # `CANCELLED by 1000`

    def cancel(self, number: str) -> None:
        """SIGTERM, KillWait, SIGKILL; or out of the queue at once where it waits. What has ended is no error."""
        self._ask("scancel", number)
        self.forget()

    def requeue(self, number: str) -> None:
        """Stop the job and put it back into Slurm's queue under the same id. Raises `EngineError` where it may not."""
        self._ask("scontrol", "requeue", number)
        self.forget()

    def shown(self, number: str) -> Mapping[str, str]:
        """`scontrol show job`, by key: `TRES`, `JobState`, `Reason` …"""
        words = self._ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def address(self, node: str) -> str:
        """Where a node is reached, by its entry in Slurm; '' where that does not say."""
        words = self._ask("scontrol", "--oneliner", "show", "node", node).split()
        return next((word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")), "")

    def version(self) -> str:
        """Of the commands on this machine, without asking slurmctld; '' where there are none."""
        try:
            return subprocess.run(
                ["squeue", "--version"], capture_output=True, text=True, check=False, timeout=_ASK_S
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    def _ask(self, *command: str, timeout_s: float = _ASK_S, pass_fds: Sequence[int] = ()) -> str:
        with self._lock:
            if time.monotonic() < self._away_until:
                raise EngineAwayError(self._away_said, remedy=_PATIENCE)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL,
                env=_environment(), pass_fds=tuple(pass_fds),
            )  # fmt: skip
        except FileNotFoundError:
            raise EngineAwayError(
                f"{command[0]} is not on this machine.", remedy="Work where Slurm's commands are: on a login node."
            ) from None
        except subprocess.TimeoutExpired:
            raise self._away(f"Slurm did not answer {command[0]} within {timeout_s:g} s.") from None
        if done.returncode == 0:
            return done.stdout
        words = " ".join((done.stderr.strip() or done.stdout.strip()).split())[-400:]
        if _AWAY.search(words):
            raise self._away(f"Slurm's controller does not answer ({words}).")
        raise EngineError(f"Slurm refuses {command[0]}: {words or f'exit {done.returncode}'}.")

    def _away(self, said: str) -> EngineAwayError:
        with self._lock:
            self._away_until, self._away_said = time.monotonic() + _AWAY_S, said
        return EngineAwayError(said, remedy=_PATIENCE)


_PATIENCE = "Nothing: it is asked again."


def _environment() -> dict[str, str]:
    """Ours, but that a user's `SQUEUE_FORMAT` or `SBATCH_…` changes nothing of what is asked, and dates are ISO."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_", "SBATCH_"))}
    return ours | {"SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}


def _job(line: str) -> SlurmJob:
    number, state, reason, starts, partition, name = line.split("|", 5)
    return SlurmJob(number.strip(), name, state, reason, _moment(starts), partition)


def _moment(text: str) -> int:
    """`2026-11-22T05:30:00`, in this machine's time, as ms since 1970 UTC; 0 for N/A."""
    try:
        return int(datetime.fromisoformat(text).astimezone().timestamp() * 1000)
    except ValueError:
        return 0


# --------------------------------------------------------------------------------------------- reasons

_REASONS: tuple[tuple[str, str, str], ...] = (
    ("Priority", "jobs of higher priority come first", "Nothing: its turn comes."),
    ("Resources", "it is next, and waits for nodes to free up", "Nothing: it starts when they do; or ask for less."),
    ("AssocGrpBillingMinutes", "the account's billing hours of this period are used or reserved",
     "It starts when reserved hours are refunded or with a new grant; `permed site cost` says what it takes."),
    ("AssocGrp", "the account has reached one of its limits", "It starts when a job of the account ends."),
    ("AssocMax", "you have reached a limit of the account", "It starts when one of your jobs ends."),
    ("QOSMax", "you have reached a limit of this quality of service", "It starts when one of your jobs ends."),
    ("QOSGrp", "this quality of service is full", "It starts when another job of it ends."),
    ("QOS", "this quality of service does not allow it", "Name another one, or ask for less."),
    ("PartitionTimeLimit", "its time limit is longer than the partition's", "Shorten time_limit, and resubmit it."),
    ("PartitionNodeLimit", "it asks for more nodes than the partition gives", "Ask for less, and resubmit it."),
    ("PartitionDown", "the partition is down", "It starts when the site brings it up."),
    ("PartitionInactive", "the partition takes no jobs now", "It starts when the site opens it."),
    ("BadConstraints", "no node can ever satisfy what it asks for", "`permed site check JOB` says what a node has."),
    ("ReqNodeNotAvail", "nodes that it needs are down, drained or reserved (maintenance?)",
     "It starts when they are back; a shorter time_limit may end before a maintenance."),
    ("Reservation", "it waits for its reservation", "It starts when that begins."),
    ("NodeDown", "a node that it needs is down", "It starts when that is back."),
    ("BeginTime", "Slurm lets a requeued job rest for a moment", "Nothing: it goes on from its checkpoint."),
    ("burst_buffer/", "the site's scheduler could not copy its files in, and holds it",
     "Mend what it says; then `permed cancel`, and submit it anew."),
    ("BurstBufferStageIn", "its files are being copied to the cluster", "It starts when they are there."),
    ("BurstBuffer", "the burst buffer has no room for its files yet", "It starts when there is room."),
    ("Dependency", "it waits for another job in Slurm", "It starts when that has ended."),
    ("DependencyNeverSatisfied", "the Slurm job that it depends on has failed", "`permed cancel`, and submit it anew."),
    ("JobHeldAdmin", "the site's operators hold it", "Ask them (`scontrol show job`)."),
    ("JobHeldUser", "it is held in Slurm", "scontrol release, by whoever held it."),
    ("launch failed requeued held", "a node could not start it, and Slurm holds it", "scontrol release."),
    ("Licenses", "it waits for a licence", "It starts when one is free."),
    ("Cleaning", "Slurm still cleans up after its last run", "Nothing: it starts after that."),
    ("None", "Slurm has not looked at it yet", "Nothing: it looks every few seconds."),
)  # fmt: skip
"""Slurm's reason, or how it begins → why, and what would have to change. Exact names come before beginnings."""


def in_words(reason: str) -> tuple[str, str]:
    """(why, what would have to change) of a pending job's reason; Slurm's own word where we have none."""
    plain = reason.strip("()").split(",")[0].strip()
    exact = [row for row in _REASONS if row[0] == plain]
    begun = [row for row in _REASONS if plain.startswith(row[0])]
    if not (exact or begun):
        return f"Slurm says {plain}", "`man squeue`, JOB REASON CODES, says what that is."
    _, why, change = (exact or begun)[0]
    return why, change
