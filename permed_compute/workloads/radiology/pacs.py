"""An archive on the network: found by QIDO-RS, fetched by WADO-RS, answered by STOW-RS or C-STORE.

Neither secrets nor addresses and UIDs reach an error, a log or a job. The libraries' own words quote URLs, so what they
raise is told anew here.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from permed_compute.errors import PermedError, WorkloadError
from permed_compute.spec import Purpose
from permed_compute.workloads.radiology.archives import ArchiveRefusedError, Entry, SendBy, Tls, secret

UID = re.compile(r"[0-9]+(\.[0-9]+)*")
LONGEST_UID = 64
_LARGEST_STOW = 256 << 20
"""Bytes in one STOW request; more go in several."""


class ArchiveError(PermedError):
    """The archive did not answer, or not as it should: unreachable, hanging, 5xx, association broken. Worth a retry."""

    code = "archive"


@dataclass(frozen=True, slots=True)
class Instance:
    """One object of a study, as QIDO lists it."""

    series: str = field(repr=False)
    sop: str = field(repr=False)
    modality: str = ""


@dataclass(frozen=True, slots=True)
class Study:
    """One study, as QIDO finds it."""

    uid: str = field(repr=False)
    accession: str = field(default="", repr=False)
    patient: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of the files: sent now, and those that the archive held already."""

    sent: int
    already: int


class Archive:
    """One archive, spoken to. Every method raises `ArchiveError` or `ArchiveRefusedError`, naming the entry."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        hush()

    # --------------------------------------------------------------------------------- finding and fetching

    def find(self, *, study: str = "", accession: str = "") -> list[Study]:
        """Studies of that UID and accession number; both must match where both are given."""
        wanted = {"StudyInstanceUID": study, "AccessionNumber": accession}
        filters = {name: value for name, value in wanted.items() if value}
        if any(mark in value for value in filters.values() for mark in "*?\\") or not filters:
            raise WorkloadError("A study is asked for by UID or accession number, never by a pattern.")
        with self._answering():
            rows = self._web.search_for_studies(
                search_filters=filters, fields=["StudyInstanceUID", "AccessionNumber", "PatientID"]
            )
            found = [
                Study(_text(row, "0020000D"), _text(row, "00080050"), _text(row, "00100020")) for row in rows
            ]  # fmt: skip
        # Some servers match more loosely than they were asked to: upper and lower case, parts of a number.
        return [
            row for row in found if (not study or row.uid == study) and (not accession or row.accession == accession)
        ]

    def instances(self, study: str) -> tuple[Instance, ...]:
        """Everything that the study holds now, in one order."""
        self._check_uid(study)
        with self._answering():
            rows = self._web.search_for_instances(
                study_instance_uid=study, fields=["SeriesInstanceUID", "SOPInstanceUID", "Modality"], get_remaining=True
            )
            found = {
                Instance(_text(row, "0020000E"), _text(row, "00080018"), _text(row, "00080060")) for row in rows
            }  # fmt: skip
        return tuple(sorted(found, key=lambda item: (item.series, item.sop)))

    def fetch(self, study: str, series: Sequence[str], folder: Path) -> int:
        """Write the instances of those series to `folder` as they are stored; how many. Names are numbers."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        count = 0
        for uid in (study, *series):
            self._check_uid(uid)
        for uid in series:
            with self._answering():
                for ds in self._web.iter_series(study, uid, media_types=(("application/dicom", "*"),)):
                    if ds.get("StudyInstanceUID") != study or ds.get("SeriesInstanceUID") != uid:
                        raise ArchiveError(f"Archive {self.entry.name} sent an image of another study or series.")
                    # Not synced: what is fetched is scratch, and is fetched again after a crash.
                    ds.save_as(folder / f"{count:06d}.dcm", enforce_file_format=True)
                    count += 1
        return count

    def _check_uid(self, uid: str) -> None:
        if not UID.fullmatch(uid) or len(uid) > LONGEST_UID:
            raise WorkloadError("A study or series UID is not a DICOM UID.")

    # --------------------------------------------------------------------------------- sending back

    def send(self, files: Sequence[Path], purpose: Purpose, by: SendBy) -> Sent:
        """Bring those DICOM files there, each at most once: what the archive holds already is not sent again.

        Raises `PermissionDeniedError` before anything is sent where purpose or a file's own mark forbids it.
        """
        from pydicom import dcmread

        self.entry.accept(purpose)
        headers = [dcmread(path, stop_before_pixels=True) for path in files]
        if self.entry.clinical and any(is_research(header) for header in headers):
            self.entry.accept(Purpose.RESEARCH)
        held: set[str] = set()
        if self.entry.web is not None:
            for study in {str(header.StudyInstanceUID) for header in headers}:
                held |= {item.sop for item in self.instances(study)}
        fresh = [path for path, header in zip(files, headers, strict=True) if str(header.SOPInstanceUID) not in held]
        if fresh:
            (self._stow if by == "stow" else self._c_store)(fresh)
            self._confirm([header for header in headers if str(header.SOPInstanceUID) not in held])
        return Sent(len(fresh), len(files) - len(fresh))

    def _confirm(self, headers: Sequence[Any]) -> None:
        """Look whether what was sent is found in its study; an archive without QIDO is taken at its word."""
        if self.entry.web is None:
            return
        for study in {str(header.StudyInstanceUID) for header in headers}:
            there = {(item.series, item.sop) for item in self.instances(study)}
            sent = {
                (str(h.SeriesInstanceUID), str(h.SOPInstanceUID)) for h in headers if str(h.StudyInstanceUID) == study
            }
            if not sent <= there:
                raise ArchiveError(
                    f"Archive {self.entry.name} took {len(sent - there)} result(s) that it does not find in the study."
                )

    def _stow(self, files: Sequence[Path]) -> None:
        from pydicom import dcmread

        for batch in _batches(files):
            with self._answering():
                answer = self._web.store_instances([dcmread(path) for path in batch])
                failed = len(answer.get("FailedSOPSequence") or ()) if answer is not None else 0
                stored = len(answer.get("ReferencedSOPSequence") or ()) if answer is not None else 0
                if failed or stored < len(batch):
                    raise ArchiveError(
                        f"Archive {self.entry.name} stored {stored} of {len(batch)} result(s) and refused {failed}."
                    )

    @cached_property
    def _web(self) -> Any:
        import requests
        from dicomweb_client import DICOMwebClient

        web = self.entry.web
        if web is None:
            raise ArchiveRefusedError(
                f"Archive {self.entry.name} has no dicomweb, so nothing is found or fetched there."
            )
        session = requests.Session()
        session.trust_env = False  # neither a proxy nor a .netrc of whoever runs this
        session.max_redirects = 0
        session.verify = web.ca or True
        if web.token_file or web.token_env:
            session.auth = _Bearer(secret(web.token_file, web.token_env, self.entry.name))
        elif web.user:
            session.auth = (web.user, secret(web.password_file, web.password_env, self.entry.name))
        client = DICOMwebClient(web.url, session=session, timeout=(min(10, self.entry.timeout), self.entry.timeout))
        client.set_http_retry_params(retry=False)  # whoever runs us decides how often
        return client

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Tell the library's errors anew, without URL, header or body."""
        import requests

        name = self.entry.name
        try:
            yield
        except PermedError:
            raise
        except requests.exceptions.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise ArchiveRefusedError(
                    f"Archive {name} does not accept our credentials ({status}).",
                    remedy="Check user, password_file or token_file in the archives file.",
                ) from None
            if status in (400, 404, 405, 406, 413, 415):
                raise ArchiveRefusedError(f"Archive {name} does not do what it was asked ({status}).") from None
            raise ArchiveError(f"Archive {name} answered with an error ({status}).") from None
        except requests.exceptions.Timeout:
            raise ArchiveError(
                f"Archive {name} did not answer within {self.entry.timeout} s.", remedy="Raise `timeout`, or ask again."
            ) from None
        except requests.exceptions.SSLError:
            raise ArchiveRefusedError(
                f"Archive {name} is not who it should be: TLS failed.", remedy="Check `ca`."
            ) from None
        except requests.exceptions.TooManyRedirects:
            raise ArchiveRefusedError(f"Archive {name} sends us elsewhere; we do not follow.") from None
        except (requests.exceptions.ConnectionError, requests.exceptions.InvalidURL) as error:
            raise ArchiveError(f"Archive {name} cannot be reached ({type(error).__name__}).") from None
        except Exception as error:  # noqa: BLE001 - whatever a library makes of an answer that is not DICOMweb
            raise ArchiveError(
                f"Archive {name} gave an answer that is not DICOMweb ({type(error).__name__})."
            ) from None

    # --------------------------------------------------------------------------------- C-STORE

    def _c_store(self, files: Sequence[Path]) -> None:
        from pydicom import dcmread
        from pydicom.filereader import read_file_meta_info

        metas = [read_file_meta_info(path) for path in files]
        pairs = sorted({(str(m.MediaStorageSOPClassUID), str(m.TransferSyntaxUID)) for m in metas})
        with self._associated(pairs) as association:
            for path in files:
                self._check_stored(association.send_c_store(dcmread(path)))

    def _check_stored(self, answer: Any) -> None:
        name = self.entry.name
        if "Status" not in answer:
            raise ArchiveError(f"Archive {name} broke off or did not answer within {self.entry.timeout} s.")
        status = int(answer.Status)
        if status in (0x0000, 0xB000, 0xB006, 0xB007):
            return
        if 0xA700 <= status <= 0xA7FF:
            raise ArchiveError(f"Archive {name} is out of resources (status {status:04X}H).")
        raise ArchiveRefusedError(f"Archive {name} did not store a result (status {status:04X}H).")

    def echo(self) -> None:
        """C-ECHO: are we known there?"""
        with self._associated([("1.2.840.10008.1.1", "1.2.840.10008.1.2")]) as association:
            if "Status" not in association.send_c_echo():
                raise ArchiveError(f"Archive {self.entry.name} did not answer an echo.")

    @contextmanager
    def _associated(self, contexts: Sequence[tuple[str, str]]) -> Iterator[Any]:
        from pynetdicom import AE, evt

        dimse, name = self.entry.dimse, self.entry.name
        if dimse is None:
            raise ArchiveRefusedError(f"Archive {name} has no `dicom` entry.")
        ae = AE(ae_title=dimse.calling)
        ae.connection_timeout = min(10, self.entry.timeout)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = self.entry.timeout
        for sop_class, syntax in contexts:
            ae.add_requested_context(sop_class, syntax)
        association = ae.associate(
            dimse.host, dimse.port, ae_title=dimse.called, evt_handlers=[(evt.EVT_CONN_OPEN, no_delay)],
            tls_args=(client_tls(dimse.tls), dimse.host) if dimse.tls else None,
        )  # fmt: skip
        try:
            if association.is_rejected:
                raise ArchiveRefusedError(
                    f"Archive {name} refuses the association.", remedy="It must know our AE title: `calling`, `called`."
                )
            if not association.is_established:
                raise ArchiveError(f"Archive {name} cannot be reached by DICOM, or does not answer.")
            if len(association.accepted_contexts) < len(contexts):
                missing = len(contexts) - len(association.accepted_contexts)
                raise ArchiveRefusedError(f"Archive {name} does not take {missing} kind(s) of what is sent.")
            yield association
        finally:
            if association.is_established:
                association.release()
            elif association.is_alive():
                association.abort()


class _Bearer:
    """Sends a token. A function of its own, so that no repr of the session shows it."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def is_research(header: Any) -> bool:
    """Does the object itself say that it is not for care?"""
    return (
        str(header.get("ContentQualification") or "") in ("RESEARCH", "SERVICE")
        or str(header.get("SeriesDescription") or "").upper().startswith("RESEARCH")
        or "(research)" in str(header.get("ManufacturerModelName") or "")
    )


def client_tls(tls: Tls) -> ssl.SSLContext:
    """A context that knows the peer by `tls.ca` and shows our certificate. Raises `ArchiveRefusedError`."""
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=tls.ca)
        if tls.certificate:
            context.load_cert_chain(tls.certificate, tls.key or None)
    except (OSError, ssl.SSLError):
        raise ArchiveRefusedError(
            "The TLS certificates cannot be read.", remedy="Check ca, certificate, key."
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def no_delay(event: Any) -> None:
    """TCP_NODELAY on an association: without it C-STORE waits for delayed acknowledgements (pynetdicom#701)."""
    import socket

    opened = event.assoc.dul.socket.socket
    if opened is not None:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def hush() -> None:
    """The libraries log URLs and UIDs."""
    for name in ("dicomweb_client", "pynetdicom", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _batches(files: Sequence[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    size = 0
    for path in files:
        length = path.stat().st_size
        if batch and size + length > _LARGEST_STOW:
            yield batch
            batch, size = [], 0
        batch.append(path)
        size += length
    if batch:
        yield batch


def _text(row: Mapping[str, Any], tag: str) -> str:
    values = row.get(tag, {}).get("Value") or [""]
    return str(values[0] if values[0] is not None else "")
