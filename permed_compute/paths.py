"""Every file that permed_compute reads or writes, named in one place.

PERMED_HOME (mode 0700) holds everything durable. What must be short (Unix sockets: 107 bytes; Ray's session folder)
stands in a private folder below the system's temporary directory, named by a digest of the home.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class HomePaths:
    """Files of one PERMED_HOME."""

    root: Path

    def create(self) -> HomePaths:
        """Make the folders, private to this user."""
        for folder in (self.root, self.jobs, self.ledger, self.cache, self.spool, self.runtime):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root.chmod(0o700)
        return self

    @property
    def database(self) -> Path:
        return self.root / "queue.db"

    @property
    def settings(self) -> Path:
        return self.root / "settings.yaml"

    @property
    def salt(self) -> Path:
        """32 random bytes (hex) that pseudonyms are keyed with; never leaves this home."""
        return self.root / "pseudonym.key"

    @property
    def lock(self) -> Path:
        """flock: whoever holds it is this home's one controller."""
        return self.root / "controller.lock"

    @property
    def log(self) -> Path:
        return self.root / "controller.log"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def models(self) -> Path:
        """Evidence and cards of validated models, one file each by digest."""
        return self.root / "models"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def transfers(self) -> Path:
        """A receipt for each set of files that `permed receive` put in place, by its reference."""
        return self.root / "transfers"

    @property
    def incoming(self) -> Path:
        """Volumes that somebody's `permed --via` sends here."""
        return self.root / "incoming"

    @property
    def received(self) -> Path:
        """Sets that came so, each in a folder named by its reference."""
        return self.root / "received"

    @property
    def outgoing(self) -> Path:
        """Results that somebody's `permed --via` fetches, and the volume that TSD's client is sending."""
        return self.root / "outgoing"

    @property
    def submissions(self) -> Path:
        """One small record per submission through `permed --via`, so that each is queued once."""
        return self.root / "submissions"

    @property
    def destinations(self) -> Path:
        """Where `permed send` may send and `permed receive` fetch, by name; holds no secret."""
        return self.root / "destinations.yaml"

    @property
    def signers(self) -> Path:
        """Whose signatures `permed receive` accepts: OpenSSH's allowed_signers."""
        return self.root / "allowed_signers"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"

    @property
    def runtime(self) -> Path:
        """Short private folder for sockets and Ray's session: `<tmp>/permed-<uid>-<digest of the home>`."""
        digest = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"permed-{os.getuid()}-{digest}"

    @property
    def socket(self) -> Path:
        return self.runtime / "controller.sock"

    def job(self, job_id: str) -> JobPaths:
        return JobPaths(self.jobs / job_id)


@dataclass(frozen=True, slots=True)
class JobPaths:
    """Files of one job."""

    root: Path

    @property
    def job_id(self) -> str:
        return self.root.name

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def state(self) -> Path:
        """Rounds of a map job and checkpoints of a gang: what the next attempt continues from."""
        return self.root / "state"

    @property
    def fence(self) -> Path:
        """The number of the attempt that may write; an older attempt that still runs finds a higher one and stops."""
        return self.root / "fence"

    def attempt(self, number: int) -> AttemptPaths:
        return AttemptPaths(self.root / "attempts" / f"{number:04d}")


@dataclass(frozen=True, slots=True)
class AttemptPaths:
    """Files of one attempt. Only its own processes write here, and the controller its launch and stop requests."""

    root: Path

    @property
    def number(self) -> int:
        return int(self.root.name)

    @property
    def job(self) -> JobPaths:
        return JobPaths(self.root.parent.parent)

    @property
    def launch(self) -> Path:
        """What the controller asks for (`execution.port.Attempt` as JSON), written before launching."""
        return self.root / "launch.json"

    @property
    def stop(self) -> Path:
        """Present = please checkpoint and stop; `{"reason": …}`."""
        return self.root / "stop.json"

    @property
    def exit(self) -> Path:
        """Written last, by rename: the attempt's own word on how it ended."""
        return self.root / "exit.json"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def records(self, writer: str = "driver") -> Path:
        """Append-only JSON lines of one writer; the controller folds all of an attempt's."""
        return self.root / f"records-{writer}.jsonl"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file that becomes `path` when the block ends well: written elsewhere, synced, renamed. Mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented, key-sorted JSON, published by rename."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any | None:
    """The parsed file, or None where it does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def is_locked(file: Path) -> bool:
    """True while somebody holds the file's flock. A file that is not there is held by nobody."""
    try:
        handle = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
