"""What `permed doctor` looks at, one function per thing. Nothing here opens the queue or starts an engine."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permed_compute.errors import NotFoundError, PermedError
from permed_compute.paths import HomePaths, is_locked

if TYPE_CHECKING:
    from permed_compute.execution.raylocal import LocalRay
    from permed_compute.settings import Settings

_SOCKET_BYTES = 107  # sun_path of Linux, less the closing zero
_FREE_BYTES = 2 * 2**30
_FREE_INODES = 50_000
_SKEW_S = 5.0
_SHARE_OF_HOME = 0.5
"""What is left of a home directory's files belongs to its user."""
_PACKAGES = ("torch", "monai", "pydicom", "highdicom", "nibabel", "deepbet")


@dataclass(frozen=True, slots=True)
class Check:
    """One look. level: ok, note (a fact), warn, bad, mended. `mend` repairs it, where that is safe."""

    name: str
    level: str
    sentence: str
    remedy: str = ""
    mend: Callable[[], None] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "level": self.level, "sentence": self.sentence, "remedy": self.remedy,
                "can_mend": self.mend is not None}  # fmt: skip


def all_checks(settings: Settings) -> Iterator[Check]:
    home = settings.paths
    yield home_folder(home)
    yield file_system(settings)
    yield from space(home)
    yield socket_path(home)
    yield controller(home)
    yield clock(home)
    yield anchor(settings)
    yield from leftovers(home)
    yield from engines(settings)
    ray = ray_session(settings)
    if ray is not None:
        yield ray
    yield tracking(settings)
    yield gpus()
    yield packages()
    yield installation(settings)
    yield real_parts()


def mended(check: Check) -> Check:
    """The check after mending, where it can be."""
    if check.mend is None or check.level not in ("warn", "bad"):
        return check
    try:
        check.mend()
    except OSError as error:
        return replace(check, sentence=f"{check.sentence} Mending failed: {error.strerror}.")
    return replace(check, level="mended", sentence=f"mended: {check.sentence}", mend=None)


# ------------------------------------------------------------------------------------------- the home


def home_folder(home: HomePaths) -> Check:
    if not home.root.exists():
        return Check(
            "home", "note", f"{home.root} does not exist yet; the first job makes it.", mend=lambda: _make(home)
        )
    info = home.root.stat()
    if info.st_uid != os.getuid():
        return Check(
            "home", "bad", f"{home.root} belongs to another user.", "Choose another with --home or PERMED_HOME."
        )
    if not os.access(home.root, os.W_OK):
        return Check("home", "bad", f"{home.root} cannot be written.", "Choose another with --home or PERMED_HOME.")
    if stat.S_IMODE(info.st_mode) & 0o077:
        return Check("home", "bad", f"{home.root} is open to other users.", "chmod 700", lambda: home.root.chmod(0o700))
    return Check("home", "ok", f"{home.root}, private to this user")


def _make(home: HomePaths) -> None:
    home.create()


def file_system(settings: Settings) -> Check:
    from permed_compute.queue.mounts import NETWORK, filesystem

    point, kind = filesystem(settings.paths.root)
    if settings.queue_url:
        return Check("file system", "ok", f"{kind or 'unknown'}; the queue is in its own database")
    if kind in NETWORK:
        sentence = f"{settings.paths.root} lies on {kind} (at {point}): SQLite's write-ahead log breaks there."
        return Check("file system", "bad", sentence, "Set PERMED_HOME to a local disk, or queue_url to PostgreSQL.")
    return Check("file system", "ok", f"{kind or 'unknown'}, good for SQLite")


def space(home: HomePaths) -> Iterator[Check]:
    place = _existing(home.root)
    info = os.statvfs(place)
    free, inodes = info.f_bavail * info.f_frsize, info.f_favail
    level = "ok" if free > _FREE_BYTES else "warn"
    yield Check(
        "space", level, f"{free / 2**30:.1f} GiB free where the home is", "permed gc --dry-run shows what can go."
    )
    if info.f_files:  # file systems without a fixed number of inodes say 0
        level = "ok" if inodes > _FREE_INODES else "warn"
        yield Check("inodes", level, f"{inodes} files can still be made", "permed gc --dry-run shows what can go.")


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def socket_path(home: HomePaths) -> Check:
    length = len(os.fsencode(home.socket))
    if length > _SOCKET_BYTES:
        return Check("socket", "bad", f"{home.socket} has {length} bytes; the system takes {_SOCKET_BYTES}.",
                     "Set TMPDIR to a shorter folder.")  # fmt: skip
    return Check("socket", "ok", f"{home.socket}: {length} of {_SOCKET_BYTES} bytes")


def controller(home: HomePaths) -> Check:
    """A socket that nobody answers is left over from a crash, unless somebody holds the lock."""
    from permed_compute.queue.server import connect

    try:
        connect(home.socket).close()
    except NotFoundError:
        if not home.socket.exists():
            return Check("controller", "ok", "none runs; `permed run` brings its own")
        if is_locked(home.lock):
            return Check("controller", "warn", "one holds this home and does not answer", f"See {home.log}.")
        return Check("controller", "warn", "its socket is left over from a crash", "It is safe to remove.",
                     lambda: home.socket.unlink(missing_ok=True))  # fmt: skip
    except PermedError as error:
        return Check("controller", "bad", error.message, error.remedy)
    return Check("controller", "ok", "one runs and answers")


def clock(home: HomePaths) -> Check:
    """The file system's clock against ours: leases and heartbeats compare the two."""
    with tempfile.NamedTemporaryFile(
        dir=_existing(home.root) if os.access(_existing(home.root), os.W_OK) else None
    ) as file:
        file.write(b"x")
        file.flush()
        skew = Path(file.name).stat().st_mtime - time.time()
    if abs(skew) > _SKEW_S:
        return Check("clock", "bad", f"the file system's clock differs by {skew:+.0f} s from this machine's.",
                     "Synchronise both (NTP): leases and heartbeats compare them.")  # fmt: skip
    return Check("clock", "ok", "the file system's and this machine's agree")


def anchor(settings: Settings) -> Check:
    from permed_compute.queue.events import Anchor

    place = Path(settings.anchor)
    if place.resolve().is_relative_to(settings.paths.root.resolve()):
        return Check("audit anchor", "bad", f"{place} lies inside the home: who can change the log can change it too.",
                     "Set PERMED_ANCHOR to a folder outside, best on another disk.")  # fmt: skip
    own = Anchor.of(place, settings.paths.root)
    if own.key_file.exists() and stat.S_IMODE(own.key_file.stat().st_mode) & 0o077:
        return Check("audit anchor", "bad", "other users can read its key.", "chmod 600",
                     lambda: own.key_file.chmod(0o600))  # fmt: skip
    return Check("audit anchor", "ok", str(own.folder))


def leftovers(home: HomePaths) -> Iterator[Check]:
    from permed_compute.cli.gc import half_written

    halves = [item.path for item in half_written(home)]
    if halves:
        yield Check(
            "ledger", "warn", f"{len(halves)} parts were left half-written by a crash", "They are never read.",
            lambda: _remove(halves),
        )  # fmt: skip
    else:
        yield Check("ledger", "ok", "nothing half-written")
    scratch = [path for path in home.jobs.glob("*/attempts/*/scratch") if (path.parent / "exit.json").exists()]
    if scratch:
        yield Check(
            "attempts", "warn", f"{len(scratch)} ended attempts left scratch files", "They are never read.",
            lambda: _remove(scratch),
        )  # fmt: skip


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def ray_session(settings: Settings) -> Check | None:
    """A local Ray whose head died and left processes, sockets and a session folder behind."""
    from permed_compute.execution.device import local_node
    from permed_compute.execution.raylocal import LocalRay

    local = LocalRay(settings.paths.runtime, local_node(settings))
    session = local.find()
    left = local.processes()
    if session is not None:
        return Check("ray session", "ok", f"one lives at {session.address}, {len(left)} processes")
    if not left and not (settings.paths.runtime / "session").exists():
        return None
    return Check(
        "ray session", "warn", f"a dead one has left {len(left)} processes and its folder", "No job needs them.",
        lambda: _stop(local),
    )  # fmt: skip


def _stop(local: LocalRay) -> None:
    if not local.stop():
        raise OSError(0, "some of its processes cannot be ended")


# ------------------------------------------------------------------------------------------- what it can use


def engines(settings: Settings) -> Iterator[Check]:
    version = _version("ray")
    if version:
        yield Check(
            "ray", "ok", f"{version}; {settings.ray_address or 'a local one is started on loopback when needed'}"
        )
    else:
        level = "bad" if settings.executor == "ray" else "note"
        yield Check("ray", level, "not installed", "pip install 'permed-compute[ray]', or --executor inprocess.")
    yield Check("inprocess", "ok", "always there: for debuggers, tests and machines without Ray")
    if shutil.which("sbatch"):
        to_it = settings.executor == "slurm"
        said = f"jobs go to it: site {settings.site}" if to_it else "found here; --site NAME submits to it"
        yield Check("slurm", "ok" if to_it else "note", said)


def tracking(settings: Settings) -> Check:
    from permed_compute.tracking.files import Spool

    waiting = len(Spool(settings.paths.spool).pending())
    behind = f"; {waiting} records wait to be sent" if waiting else ""
    if settings.tracking_uri == "none":
        return Check("tracking", "note", f"switched off{behind}")
    version = _version("mlflow")
    if not version:
        return Check("tracking", "warn", f"MLflow is not installed{behind}", "pip install 'permed-compute[tracking]'")
    return Check("tracking", "ok", f"MLflow {version}{behind}")


def gpus() -> Check:
    from permed_compute.execution.device import gpu_devices

    found = gpu_devices()
    if found:
        return Check("gpus", "ok", ", ".join(f"{gpu.flavor} ({gpu.memory / 1024:.0f} GiB)" for gpu in found))
    if Path("/dev/nvidiactl").exists() and not _version("nvidia-ml-py"):
        return Check("gpus", "warn", "there is a driver, but no binding to ask it", "pip install 'permed-compute[gpu]'")
    return Check("gpus", "note", "none; jobs that allow the CPU run on it")


def packages() -> Check:
    found = [f"{name} {version}" for name in _PACKAGES if (version := _version(name))]
    lacking = [name for name in _PACKAGES if not _version(name)]
    said = ", ".join(found) or "none"
    return Check("packages", "note", said + (f"; not installed: {', '.join(lacking)}" if lacking else ""))


def installation(settings: Settings) -> Check:
    """How many files (inodes: folders too) the installation is, against the site's quota of a home directory."""
    files = sum(len(folders) + len(names) for _, folders, names in os.walk(sys.prefix))
    said = f"{files} files and folders in {sys.prefix}"
    if settings.site:
        from permed_compute.sites.profile import load

        storage = load(settings.site).storage
        most = storage.home.files if storage is not None and storage.home is not None else None
        if most and files > most * _SHARE_OF_HOME:
            return Check(
                "installation", "warn", f"{said}; a home directory at {settings.site} takes {most}.",
                "Use an image or an overlay: cluster/containers/README.md.",
            )  # fmt: skip
    return Check("installation", "note", said)


def real_parts() -> Check:
    """Programs that tests and some sites use; none is needed to run jobs."""
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    found = {
        "postgres": str(servers[-1]) if servers else shutil.which("postgres"),
        "dciodvfy": shutil.which("dciodvfy"), "chromium": shutil.which("chromium"),
    }  # fmt: skip
    return Check(
        "real parts", "note", ", ".join(f"{name} {'found' if path else 'absent'}" for name, path in found.items())
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
