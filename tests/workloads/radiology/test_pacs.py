"""An archive: a real Orthanc for what must work, small servers that misbehave for what must not break us."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydicom import dcmread

from permed_compute.errors import (
    NotFoundError,
    PermedError,
    PermissionDeniedError,
    SettingsError,
    SpecError,
    WorkloadError,
)
from permed_compute.spec import Purpose
from permed_compute.workloads.radiology import outputs, read, sample
from permed_compute.workloads.radiology.archives import ArchiveRefusedError, Dimse, Entry, Web, read_archives
from permed_compute.workloads.radiology.pacs import Archive, ArchiveError

from .made import load, sha256, write
from .orthanc import PASSWORD, USER, Orthanc
from .test_outputs import ALGORITHM, blob

pytestmark = pytest.mark.orthanc


@pytest.fixture(scope="module")
def pushed(orthanc, tmp_path_factory) -> Path:
    """Two studies of the sample head, brought there by C-STORE."""
    folder = tmp_path_factory.mktemp("pushed")
    sample.write_sample(folder, studies=2, seed=77, edge=24)
    Archive(read_archives(orthanc.archives())["pacs"])._c_store(sorted(folder.rglob("*.dcm")))
    return folder


def archive(orthanc: Orthanc, name: str = "pacs") -> Archive:
    return Archive(read_archives(orthanc.archives())[name])


def uids(folder: Path) -> tuple[str, str, str]:
    ds = dcmread(next(folder.rglob("*.dcm")), stop_before_pixels=True)
    return str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID), str(ds.AccessionNumber)


def test_found_by_accession_or_uid_and_fetched_pixel_by_pixel(orthanc, pushed, tmp_path):
    study, series, accession = uids(pushed / "study-001")
    pacs = archive(orthanc)
    (by_accession,) = pacs.find(accession=accession)
    assert by_accession.uid == study and pacs.find(study=study) == [by_accession]
    assert pacs.find(study=study, accession="OTHER") == [] == pacs.find(accession=accession.lower())
    listed = pacs.instances(study)
    assert {item.modality for item in listed} == {"MR"} and {item.series for item in listed} == {series}
    assert pacs.fetch(study, [series], tmp_path / "got") == len(listed)
    one, two = (
        read.assemble(read.scan(read.find(folder), sha256).series[0])
        for folder in (pushed / "study-001", tmp_path / "got")
    )
    assert np.array_equal(one.array, two.array) and np.array_equal(one.affine_lps, two.affine_lps)
    assert study not in repr(by_accession) and study not in repr(listed)


@pytest.mark.parametrize("pattern", ["*", "SAMPLE00?0", "A\\B"])
def test_a_pattern_never_becomes_a_query(orthanc, pattern):
    with pytest.raises(WorkloadError, match="pattern"):
        archive(orthanc).find(accession=pattern)


@pytest.mark.parametrize("by", ["stow", "c-store"])
def test_a_result_is_found_in_its_study_and_never_twice(orthanc, tmp_path, by):
    sample.write_sample(tmp_path / "in", seed=5 if by == "stow" else 6, edge=24)
    pacs = archive(orthanc)
    pacs._c_store(sorted((tmp_path / "in").rglob("*.dcm")))
    volume = load(tmp_path / "in")
    mask = blob(volume)
    outputs.write_seg(mask, volume, tmp_path / "s.dcm", ALGORITHM, Purpose.RESEARCH)
    first = pacs.send([tmp_path / "s.dcm"], Purpose.RESEARCH, by)
    again = pacs.send([tmp_path / "s.dcm"], Purpose.RESEARCH, by)
    assert (first.sent, first.already, again.sent, again.already) == (1, 0, 0, 1)
    study = str(volume.header.StudyInstanceUID)
    (seg,) = [item for item in pacs.instances(study) if item.modality == "SEG"]
    pacs.fetch(study, [seg.series], tmp_path / "back")
    back = dcmread(tmp_path / "back" / "000000.dcm")
    assert np.array_equal(back.pixel_array, dcmread(tmp_path / "s.dcm").pixel_array)
    assert back.AccessionNumber == volume.header.AccessionNumber and back.PatientID == volume.header.PatientID
    assert sum(row["MainDicomTags"]["SOPInstanceUID"] == seg.sop for row in orthanc.instances(study)) == 1


def test_research_never_reaches_a_clinical_archive(orthanc, tmp_path):
    write(tmp_path / "in", series="clinical")
    volume = load(tmp_path / "in")
    clinic = archive(orthanc, "clinic")
    outputs.write_seg(blob(volume), volume, tmp_path / "s.dcm", ALGORITHM, Purpose.RESEARCH)
    for claimed in (Purpose.RESEARCH, Purpose.QUALITY, Purpose.CARE):  # the last one lies; the file does not
        with pytest.raises(PermissionDeniedError, match="clinical"):
            clinic.send([tmp_path / "s.dcm"], claimed, "stow")
    assert orthanc.instances(str(volume.header.StudyInstanceUID)) == []
    outputs.write_seg(blob(volume), volume, tmp_path / "c.dcm", ALGORITHM, Purpose.CARE)
    assert clinic.send([tmp_path / "c.dcm"], Purpose.CARE, "stow").sent == 1


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("name", "act", "kind", "words"),
    [
        ("locked", lambda a: a.find(accession="A1"), ArchiveRefusedError, "credentials"),
        ("no-such-service", lambda a: a.find(accession="A1"), ArchiveRefusedError, "404"),
        ("stranger", lambda a: a.echo(), ArchiveRefusedError, "refuses the association"),
        ("stranger", lambda a: a.find(accession="A1"), ArchiveRefusedError, "no dicomweb"),
    ],
)
def test_what_orthanc_refuses(orthanc, name, act, kind, words):
    with pytest.raises(kind, match=words) as caught:
        act(archive(orthanc, name))
    said = repr(caught.value) + str(caught.value.as_dict())
    assert PASSWORD not in said and USER not in said and "A1" not in said and "127.0.0.1" not in said


def test_the_known_title_is_answered(orthanc):
    archive(orthanc).echo()


Answer = Callable[[BaseHTTPRequestHandler], None]


def answering(status: int, body: bytes = b"", kind: str = "text/plain", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.fixture
def served() -> Iterator[Callable[[Answer], str]]:
    servers = []

    def serve(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, *words: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/dicom-web"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (answering(500, b"Patient 01019012345 not found"), ArchiveError, "500"),
        (answering(503), ArchiveError, "503"),
        (answering(200, b"<html>maintenance</html>", "text/html"), ArchiveError, "not DICOMweb"),
        (answering(200, b'{"half": ', "application/dicom+json"), ArchiveError, "not DICOMweb"),
        (answering(302, Location="http://127.0.0.1:1/elsewhere"), ArchiveRefusedError, "elsewhere"),
        (lambda handler: time.sleep(3), ArchiveError, "within 1 s"),
    ],
    ids=["500", "503", "html", "half", "redirect", "hangs"],
)
def test_an_archive_that_misbehaves_is_told_in_our_words(served, answer, kind, words):
    there = Archive(Entry("odd", False, 1 if "within" in words else 60, Web(served(answer)), None))
    with pytest.raises(kind, match=words) as caught:
        there.find(accession="ACC-4711")
    said = repr(caught.value) + str(caught.value)
    assert "ACC-4711" not in said and "01019012345" not in said and "127.0.0.1" not in said
    assert caught.value.code == ("archive" if kind is ArchiveError else "workload")


def test_nobody_there():
    with pytest.raises(ArchiveError, match="cannot be reached"):
        Archive(Entry("gone", False, 2, Web("http://127.0.0.1:9/dicom-web"), None)).find(accession="A")
    with pytest.raises(ArchiveError, match="cannot be reached"):
        Archive(Entry("gone", False, 2, None, Dimse("127.0.0.1", 9, "THERE", "HERE"))).echo()


def test_a_dicom_peer_that_accepts_and_says_nothing():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(ArchiveError, match="does not answer"):
            Archive(Entry("mute", False, 1, None, Dimse("127.0.0.1", silent.getsockname()[1], "THERE", "HERE"))).echo()
        assert time.monotonic() - begun < 20


# ------------------------------------------------------------------------------------------------ the archives file


GOOD = {
    "clinical": True,
    "dicomweb": {"url": "https://pacs.example.org/dicom-web", "user": "permed", "password_env": "PACS_PASSWORD"},
    "dicom": {"host": "pacs.example.org", "port": 2762, "called": "PACS", "calling": "PERMED", "tls": {"ca": "ca.pem"}},
}


def written(folder: Path, **entry: object) -> Path:
    row = {key: value for key, value in {**GOOD, **entry}.items() if value is not None}
    (folder / "archives.yaml").write_text(yaml.safe_dump({"archives": {"pacs": row}}))
    return folder / "archives.yaml"


def test_a_good_file(tmp_path):
    entry = read_archives(written(tmp_path))["pacs"]
    assert entry.clinical and entry.timeout == 30 and entry.web.user == "permed" and entry.dimse.port == 2762
    assert entry.dimse.tls.ca == str(tmp_path / "ca.pem")
    assert entry.way() == "stow" and entry.way("c-store") == "c-store"
    assert read_archives(written(tmp_path, dicomweb=None))["pacs"].way() == "c-store"
    with pytest.raises(SettingsError, match="stow"):
        read_archives(written(tmp_path, dicomweb=None))["pacs"].way("stow")


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ({"clinical": None}, "pacs.clinical"),
        ({"dicomweb": {**GOOD["dicomweb"], "password": "hunter2"}}, "pacs.dicomweb.password"),
        ({"dicomweb": {**GOOD["dicomweb"], "url": "https://permed:hunter2@pacs.example.org/"}}, "pacs.dicomweb.url"),
        ({"dicomweb": {**GOOD["dicomweb"], "url": "http://pacs.example.org/"}}, "pacs.dicomweb.url"),
        ({"dicomweb": {**GOOD["dicomweb"], "url": "ftp://hunter2"}}, "pacs.dicomweb.url"),
        ({"dicom": {**GOOD["dicom"], "called": "SEVENTEEN LETTERS"}}, "pacs.dicom.called"),
        ({"dicom": {**GOOD["dicom"], "port": 0}}, "pacs.dicom.port"),
        ({"dicom": {**GOOD["dicom"], "tls": {"certificate": "x"}}}, "pacs.dicom.tls.ca"),
        ({"timeout": "soon"}, "pacs.timeout"),
        ({"dicomweb": None, "dicom": None}, "pacs"),
        ({"clincal": True}, "pacs.clincal"),
    ],
)
def test_a_bad_file_is_refused_without_quoting_it(tmp_path, entry, where):
    with pytest.raises(SpecError) as caught:
        read_archives(written(tmp_path, **entry))
    assert where in [problem.where for problem in caught.value.problems]
    assert "hunter2" not in str(caught.value)


def test_no_file_and_no_yaml(tmp_path):
    with pytest.raises(NotFoundError):
        read_archives(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("archives: [\n")
    with pytest.raises(SpecError, match="YAML"):
        read_archives(tmp_path / "bad.yaml")


def test_secrets_come_from_private_places_only(tmp_path, monkeypatch):
    monkeypatch.delenv("PACS_PASSWORD", raising=False)
    web = Web("https://pacs.example.org/dicom-web", "permed", password_file=str(tmp_path / "p"))

    def said(entry: Web) -> str:
        with pytest.raises(PermedError) as caught:
            _ = Archive(Entry("pacs", False, 5, entry, None))._web
        return str(caught.value)

    assert "cannot be read" in said(web)
    (tmp_path / "p").write_text("hunter2")
    (tmp_path / "p").chmod(0o644)
    assert "Others may read" in said(web) and "hunter2" not in said(web)
    assert "not set" in said(Web(web.url, "permed", password_env="PACS_PASSWORD"))
    (tmp_path / "p").chmod(0o600)
    client = Archive(Entry("pacs", False, 5, web, None))._web
    assert client._session.auth == ("permed", "hunter2") and not client._session.trust_env
