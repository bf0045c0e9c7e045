"""What a workload may use of the machine: the one implementation of `workloads.port.Context`."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from permed_compute.errors import Finding, StaleError, WorkloadError
from permed_compute.paths import AttemptPaths, HomePaths, replacing
from permed_compute.spec import JobSpec
from permed_compute.storage import checkpoints
from permed_compute.storage.digests import DigestCache

Emit = Callable[..., None]
_STOP_LOOK_S = 0.2


@dataclass(slots=True)
class WorkerContext:
    """See `workloads.port.Context` for what each member promises.

    `emit(kind, **values)` takes metrics, findings and stages: straight to the attempt's records for a driver or a
    rank, into a list that travels with the result for a part. `agree` is the collective of a gang (identity alone).
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
    agree: Callable[[bool], bool] = bool
    barrier: Callable[[], None] = lambda: None
    get: Callable[..., Any] | None = None
    _stop: bool = False
    _looked: float = field(default=0.0)

    def for_part(self, key: str, out: Path, emit: Emit) -> WorkerContext:
        """The same worker, seen by one part: its own seed, output folder and records."""
        seed = int.from_bytes(hashlib.sha256(f"{self.spec.seed}:{key}".encode()).digest()[:7], "big")
        return replace(self, seed=seed, out=out, emit=emit)

    def digest(self, path: Path) -> str:
        return self.digests.digest(path)

    def pseudonym(self, identifier: str) -> str:
        return "p-" + hmac.new(self.salt, identifier.encode(), hashlib.sha256).hexdigest()[:20] if identifier else ""

    def input(self, name: str = "input") -> Path:
        found = [ref.path for ref in self.spec.inputs if ref.name == name]
        if not found:
            names = ", ".join(sorted({ref.name for ref in self.spec.inputs})) or "none"
            raise WorkloadError(f"The job has no input {name!r}.", remedy=f"Its inputs are: {names}.")
        return Path(found[0])

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        self.emit("metric", name=name, value=float(value), step=step or 0)

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

    def checkpoint(self, save: Callable[[Path], None]) -> None:
        folder = checkpoints.save(
            self.paths.job.state, rank=self.rank, world=self.world, write=save, barrier=self.barrier,
            fence=lambda: check_fence(self.paths),
        )  # fmt: skip
        if self.rank == 0:
            self.emit("checkpoint", name=folder.name)

    def restore(self) -> Path | None:
        return checkpoints.newest(self.paths.job.state)

    def should_stop(self) -> bool:
        now = time.monotonic()
        if not self._stop and now - self._looked > _STOP_LOOK_S:
            self._looked = now
            self._stop = self.paths.stop.exists()
        # All ranks must answer alike, or one would checkpoint while another goes on and waits for it.
        return self.agree(self._stop)

    def dask_get(self, *args: Any, **kwargs: Any) -> Any:
        if self.get is not None:
            return self.get(*args, **kwargs)
        import dask.threaded

        return dask.threaded.get(*args, **{"num_workers": self.threads, **kwargs})


def check_fence(paths: AttemptPaths) -> None:
    """Raise `StaleError` where a newer attempt than this one may write (invariant 9)."""
    try:
        newest = int(paths.job.fence.read_text())
    except FileNotFoundError:
        newest = paths.number
    if newest != paths.number:
        raise StaleError(f"Attempt {paths.number} of job {paths.job.job_id} has been superseded by {newest}.")


def raise_fence(paths: AttemptPaths) -> None:
    """From now on only this attempt of the job may write."""
    with replacing(paths.job.fence) as new:
        new.write_text(str(paths.number))


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
