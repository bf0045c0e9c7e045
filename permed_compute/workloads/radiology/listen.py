"""A C-STORE provider: takes images from senders that are on its list and closes a study when its content is whole.

C-STORE never says how much is to come. A study is closed when nothing has come for the quiet time **and** every image
series of it is a volume without holes; with holes it waits on, up to its patience, and is then closed and said to be
incomplete. A pause in the middle of a slow transfer therefore closes nothing, and a lost slice delays without blocking.

    FOLDER/incoming/study-DIGEST/…    arriving; found again after a restart
    FOLDER/studies/study-DIGEST/…     closed, with study.json; what comes later makes study-DIGEST-2
"""

from __future__ import annotations

import hashlib
import io
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from permed_compute.errors import EngineError, RefusedInput, SettingsError
from permed_compute.paths import replacing, write_json
from permed_compute.workloads.radiology import geometry, read
from permed_compute.workloads.radiology.archives import Tls, is_loopback, is_title
from permed_compute.workloads.radiology.pacs import hush, no_delay

STUDY = "study.json"
_STORED, _DUPLICATE, _OUT_OF_RESOURCES, _NOT_UNDERSTOOD = 0x0000, 0x0111, 0xA700, 0xC000
_LEAST_FREE = 1 << 30
"""Bytes that stay free on the disk: a sender is told "out of resources" before the disk is full."""
_HOLES = frozenset({"MISSING_SLICES", "UNEVEN_GAPS", "INCOMPLETE_SUSPECTED", "SINGLE_SLICE"})
_IDLE_S = 60


@dataclass(frozen=True, slots=True)
class Closed:
    """A study that is there: its folder, how many images and series, and whether they are whole (codes of the holes).

    late: some of the study had been closed before; this folder holds what came afterwards.
    """

    folder: Path
    instances: int
    series: int
    whole: bool
    holes: tuple[str, ...]
    late: bool


@dataclass(slots=True)
class _Open:
    """A study that arrives."""

    arrived: float
    instances: int = 0
    looked: int = -1
    holes: tuple[str, ...] = ()


@dataclass(slots=True)
class Listener:
    """Serve with `start`, call `close_studies` every second or so, end with `stop`. Times in seconds."""

    folder: Path
    title: str
    senders: Sequence[str]
    port: int = 11112
    host: str = "127.0.0.1"
    quiet: float = 60
    patience: float = 900
    tls: Tls | None = None
    clock: Callable[[], float] = time.monotonic
    _open: dict[str, _Open] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: Any = None

    def start(self) -> int:
        """Begin to listen; the port. Raises `SettingsError` and `EngineError` (the port is taken)."""
        from pynetdicom import AE, AllStoragePresentationContexts, evt
        from pynetdicom._globals import ALL_TRANSFER_SYNTAXES

        hush()
        self._check()
        for name in ("incoming", "studies"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        now = self.clock()
        for folder in (self.folder / "incoming").iterdir():
            self._open[folder.name] = _Open(now, len(list(folder.glob("*.dcm"))))
        ae = AE(ae_title=self.title)
        ae.require_calling_aet = list(self.senders)
        ae.require_called_aet = True
        ae.network_timeout = ae.acse_timeout = ae.dimse_timeout = _IDLE_S
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
        ae.add_supported_context("1.2.840.10008.1.1")
        handlers: Any = [(evt.EVT_C_STORE, self._take), (evt.EVT_CONN_OPEN, no_delay)]
        try:
            self._server = ae.start_server(
                (self.host, self.port), block=False, evt_handlers=handlers,
                ssl_context=server_tls(self.tls) if self.tls else None,
            )  # fmt: skip
        except OSError:
            raise EngineError(
                f"Port {self.port} cannot be listened on.", remedy="Choose another with --port."
            ) from None
        port: int = self._server.server_address[1]
        return port

    def stop(self) -> None:
        """No more associations; what has arrived stays and is found by the next start."""
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _check(self) -> None:
        if not is_title(self.title):
            raise SettingsError("The AE title must be 1 to 16 characters, without backslash.")
        if not self.senders or not all(is_title(title) for title in self.senders):
            raise SettingsError("Name the AE titles that may send; nobody else is let in.", remedy="--from TITLE")
        if not is_loopback(self.host) and self.tls is None:
            raise SettingsError(
                "Without TLS we listen on this machine only.", remedy="Give ca, certificate and key, or use a tunnel."
            )

    # ------------------------------------------------------------------------------------- arriving

    def _take(self, event: Any) -> int:
        """Store one instance; the status of PS3.4 B.2.3. Runs in the association's thread."""
        try:
            if shutil.disk_usage(self.folder).free < _LEAST_FREE:
                return _OUT_OF_RESOURCES
            encoded = bytes(event.encoded_dataset())
            header: Any = read.read_dataset(io.BytesIO(encoded), ["StudyInstanceUID", "SOPInstanceUID"])
            study, sop = str(header.StudyInstanceUID), str(header.SOPInstanceUID)
            if not study or sop != event.request.AffectedSOPInstanceUID:
                return _NOT_UNDERSTOOD
        except OSError:
            return _OUT_OF_RESOURCES
        except Exception:  # noqa: BLE001 - a data set that cannot be read; the sender is told, the others go on
            return _NOT_UNDERSTOOD
        return self._keep(f"study-{_digest(study)}", f"{_digest(sop)}.dcm", encoded)

    def _keep(self, study: str, name: str, encoded: bytes) -> int:
        # Under the lock: a study must not be closed while one of its images is being written.
        with self._lock:
            path = self.folder / "incoming" / study / name
            if path.exists():
                return _STORED if path.read_bytes() == encoded else _DUPLICATE
            try:
                with replacing(path) as new:
                    new.write_bytes(encoded)
            except OSError:
                return _OUT_OF_RESOURCES
            arriving = self._open.setdefault(study, _Open(self.clock()))
            arriving.arrived = self.clock()
            arriving.instances += 1
        return _STORED

    # ------------------------------------------------------------------------------------- closing

    def close_studies(self) -> list[Closed]:
        """Close those whose time has come; what was closed."""
        now = self.clock()
        with self._lock:
            quiet = [name for name, state in self._open.items() if now - state.arrived >= self.quiet]
        return [closed for name in sorted(quiet) if (closed := self._close(name)) is not None]

    def _close(self, name: str) -> Closed | None:
        state = self._open[name]
        counted = state.instances
        if state.looked != counted:  # looking reads every header: once per pause is enough
            state.holes, state.looked = holes_in(self.folder / "incoming" / name), counted
        if state.holes and self.clock() - state.arrived < self.patience:
            return None
        with self._lock:
            if state.instances != counted:
                return None
            folder = self.folder / "incoming" / name
            target, late = self._target(name)
            inventory = read.scan(read.find(folder), _sha256)
            closed = Closed(target, counted, len(inventory.series), not state.holes, state.holes, late)
            write_json(folder / STUDY, asdict(closed) | {"folder": target.name})
            folder.rename(target)
            del self._open[name]
        return closed

    def _target(self, name: str) -> tuple[Path, bool]:
        folder, number = self.folder / "studies", 1
        while (target := folder / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return target, number > 1


def holes_in(folder: Path) -> tuple[str, ...]:
    """Codes of what seems to be missing in the image series below `folder`; () where all are whole."""
    found: set[str] = set()
    for series in read.scan([s for s in read.find(folder) if not s.endswith(STUDY)], _sha256).series:
        if not series.is_volume or series.is_localiser:
            continue
        try:
            slices, _ = geometry.without_localisers(series.slices, series.digest)
            geometry.check_uniform(slices, series.digest)
            slices = geometry.ordered(slices)
            twice = {index for group in geometry.same_place(slices) for index in group[1:]}
            once = [item for index, item in enumerate(slices) if index not in twice]
            found.update(finding.code for finding in geometry.regular(once, series.digest).findings)
        except RefusedInput as error:
            found.add(error.finding.code)
    return tuple(sorted(found & _HOLES))


def server_tls(tls: Tls) -> ssl.SSLContext:
    """A context that asks every sender for a certificate that `tls.ca` signed. Raises `SettingsError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    with suppress(OSError):
        context.load_verify_locations(tls.ca)
        context.load_cert_chain(tls.certificate, tls.key or None)
        return context
    raise SettingsError("The TLS certificates cannot be read.", remedy="Check ca, certificate and key.")


def _digest(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
