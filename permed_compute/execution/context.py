"""What a workload may use of the machine: the one implementation of `workloads.port.Context`."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from permed_compute.errors import Finding, StaleError, WorkloadError
from permed_compute.paths import AttemptPaths, HomePaths, replacing
from permed_compute.spec import JobSpec
from permed_compute.storage import checkpoints
from permed_compute.storage.checkpoints import Keep
from permed_compute.storage.digests import DigestCache

Emit = Callable[..., None]
_STOP_LOOK_S = 0.2
_PROGRESS_S = 2.0


@dataclass(slots=True)
class WorkerContext:
    """See `workloads.port.Context` for what each member promises.

    `emit(kind, **values)` takes metrics, findings and stages: straight to the attempt's records for a driver or a
    rank, into a list that travels with the result for a part. `collective` is a gang's `agree` (identity alone).
    """

    spec: JobSpec
    home: HomePaths
    paths: AttemptPaths
    emit: Emit
    digests: DigestCache
    salt: bytes
    device: str = "cpu"
    rank: int = 0
    world: int = 1
    seed: int = 0
    threads: int = 1
    scratch: Path = Path()
    out: Path = Path()
    missed: Mapping[str, str] = field(default_factory=dict)
    collective: Callable[[bool], bool] = bool
    terminated: Callable[[], bool] = bool
    """Whether this very process was asked to go (SIGTERM)."""
    known: tuple[str, ...] = ()
    """Names of the checkpoints that were there when the attempt began, newest first: every rank has the same ones."""
    get: Callable[..., Any] | None = None
    _stop: bool = False
    _looked: float = field(default=0.0)
    _told: float = -1e9
    _saved: int = 0
    _saving: Future[Path] | None = None

    def for_part(self, key: str, out: Path, emit: Emit) -> WorkerContext:
        """The same worker, seen by one part: its own seed, output folder and records."""
        seed = int.from_bytes(hashlib.sha256(f"{self.spec.seed}:{key}".encode()).digest()[:7], "big")
        return replace(self, seed=seed, out=out, emit=emit)

    def digest(self, path: Path) -> str:
        return self.digests.digest(path)

    def pseudonym(self, identifier: str) -> str:
        return pseudonym_of(self.salt, identifier)

    def input(self, name: str = "input") -> Path:
        found = [ref.path for ref in self.spec.inputs if ref.name == name]
        if not found:
            names = ", ".join(sorted({ref.name for ref in self.spec.inputs})) or "none"
            raise WorkloadError(f"The job has no input {name!r}.", remedy=f"Its inputs are: {names}.")
        return Path(found[0])

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        self.emit("metric", name=name, value=float(value), step=step or 0)

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.rank == 0 and (now - self._told > _PROGRESS_S or done >= total):
            self._told = now
            self.emit("progress", done=done, total=total)

    def log_artifact(self, path: Path, name: str = "") -> None:
        target = self.out / (name or path.name)
        if path.resolve() != target.resolve():
            with replacing(target) as new:
                shutil.copyfile(path, new)

    def log(self, sentence: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {sentence}\n".encode()
        handle = os.open(self.paths.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, line)  # one write of a short line to an O_APPEND file does not mix with others
        finally:
            os.close(handle)

    def finding(self, finding: Finding) -> None:
        self.emit("finding", **finding.as_dict())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.emit("stage", name=name, seconds=time.perf_counter() - start)

    def checkpoint(self, save: Callable[[Path], None], *, keep: Keep | None = None, beside: bool = False) -> None:
        self.settle()
        self._saved += 1
        number = self._saved + (checkpoints.number_of(self.known[0]) if self.known else 0)
        part = checkpoints.Part(self.paths.job.state, number, self.paths.number, self.rank, self.world)
        self._saving = _begun(lambda: self._save(part, save, keep), beside=beside)
        if not beside:
            self.settle()

    def _save(self, part: checkpoints.Part, save: Callable[[Path], None], keep: Keep | None) -> Path:
        began = time.perf_counter()
        folder = checkpoints.save(part, save, fence=lambda: check_fence(self.paths), keep=keep)
        if self.rank == 0:
            self.emit("checkpoint", name=folder.name, seconds=round(time.perf_counter() - began, 4))
        return folder

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; raises what its writing raised."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self) -> Path | None:
        for name in self.known:
            folder = self.paths.job.state / name
            if not self.collective(not checkpoints.whole(folder, (self.rank, self.world))):
                return folder
            if self.rank == 0:
                self.log(f"{name} is not what was written; the one before it is taken")
                self.emit("damaged", name=name)
        return None

    def agree(self, mine: bool) -> bool:
        return self.collective(mine)

    def should_stop(self) -> bool:
        now = time.monotonic()
        if not self._stop and now - self._looked > _STOP_LOOK_S:
            self._looked = now
            self._stop = self.paths.stop.exists() or self.terminated()
        # All ranks must answer alike, or one would checkpoint while another goes on and waits for it.
        return self.collective(self._stop)

    def dask_get(self, *args: Any, **kwargs: Any) -> Any:
        if self.get is not None:
            return self.get(*args, **kwargs)
        import dask.threaded

        return dask.threaded.get(*args, **{"num_workers": self.threads, **kwargs})


def _begun(work: Callable[[], Path], *, beside: bool) -> Future[Path]:
    """`work` in a thread of its own, or done here before this returns."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    if beside:
        threading.Thread(target=run, name="permed-checkpoint").start()
    else:
        run()
    return future


def check_fence(paths: AttemptPaths) -> None:
    """Raise `StaleError` where this attempt may not write any more (invariant 9)."""
    if fenced_off(paths):
        raise StaleError(f"Attempt {paths.number} of job {paths.job.job_id} has been given up, or superseded.")


def fenced_off(paths: AttemptPaths) -> bool:
    """Whether the attempt has been given up: only a newer one may write, or start."""
    return _fence(paths) > paths.number


def _fence(paths: AttemptPaths) -> int:
    try:
        return int(paths.job.fence.read_text())
    except FileNotFoundError:
        return 0


def raise_fence(paths: AttemptPaths) -> None:
    """From now on only this attempt of the job may write. Never lowered: a controller that stood still for so long
    that another one took over must not let an older attempt write again."""
    if _fence(paths) >= paths.number:
        return
    with replacing(paths.job.fence) as new:
        new.write_text(str(paths.number))


def pseudonym_of(salt: bytes, identifier: str) -> str:
    """`Context.pseudonym` under that key (`pseudonym_key`)."""
    return "p-" + hmac.new(salt, identifier.encode(), hashlib.sha256).hexdigest()[:20] if identifier else ""


def pseudonym_key(home: HomePaths) -> bytes:
    """The home's key for pseudonyms; made at first use, once, whoever comes first."""
    try:
        return bytes.fromhex(home.salt.read_text())
    except FileNotFoundError:
        home.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = home.salt.with_name(f".{home.salt.name}.{secrets.token_hex(4)}")
        temporary.touch(mode=0o600)
        temporary.write_text(secrets.token_hex(32))
        try:
            os.link(temporary, home.salt)  # fails where another process was first: then its key is the key
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        return bytes.fromhex(home.salt.read_text())
