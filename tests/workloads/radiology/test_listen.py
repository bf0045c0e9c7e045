"""The C-STORE provider: who is let in, what is kept, and when a study is closed."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread

from permed_compute.errors import EngineError, SettingsError
from permed_compute.workloads.radiology import sample
from permed_compute.workloads.radiology.archives import ArchiveRefusedError, Dimse, Entry, Tls
from permed_compute.workloads.radiology.listen import Listener, holes_in
from permed_compute.workloads.radiology.pacs import Archive, ArchiveError

from .made import plane, write


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def listener(tmp_path: Path, clock: Clock) -> Iterator[Listener]:
    listening = Listener(tmp_path / "in", "PERMED", ["SCANNER"], port=0, quiet=60, patience=900, clock=clock)
    yield listening
    listening.stop()


def sender(port: int, calling: str = "SCANNER", called: str = "PERMED", tls: Tls | None = None) -> Archive:
    return Archive(Entry("listener", False, 5, None, Dimse("127.0.0.1", port, called, calling, tls)))


def test_a_study_is_closed_after_the_quiet_time_and_as_it_was_sent(listener, clock, tmp_path):
    files = write(tmp_path / "sent")
    port = listener.start()
    sender(port)._c_store(files[:5])
    clock.now += 59
    assert listener.close_studies() == []
    sender(port)._c_store(files[5:])
    clock.now += 59  # the quiet time begins anew with each image
    assert listener.close_studies() == []
    clock.now += 1
    (closed,) = listener.close_studies()
    assert (closed.instances, closed.series, closed.whole, closed.late) == (8, 1, True, False)
    assert not list((listener.folder / "incoming").iterdir())
    got = {dcmread(path).SOPInstanceUID: dcmread(path).PixelData for path in closed.folder.glob("*.dcm")}
    assert got == {dcmread(path).SOPInstanceUID: dcmread(path).PixelData for path in files}
    record = json.loads((closed.folder / "study.json").read_text())
    assert record["instances"] == 8 and record["folder"] == closed.folder.name
    assert "P1" not in str(record) and plane(0).StudyInstanceUID not in closed.folder.name


def test_a_study_with_a_hole_waits_for_its_slice_and_then_for_its_patience(listener, clock, tmp_path):
    files = write(tmp_path / "sent")
    port = listener.start()
    sender(port)._c_store([*files[:4], *files[5:]])
    clock.now += 100
    assert listener.close_studies() == [] == listener.close_studies()
    sender(port)._c_store([files[4]])
    clock.now += 60
    (closed,) = listener.close_studies()
    assert closed.whole and closed.instances == 8


def test_patience_ends(listener, clock, tmp_path):
    files = write(tmp_path / "sent")
    port = listener.start()
    sender(port)._c_store(files[:3] + files[4:])
    clock.now += 899
    assert listener.close_studies() == []
    clock.now += 1
    (closed,) = listener.close_studies()
    assert not closed.whole and closed.holes == ("MISSING_SLICES",)
    sender(port)._c_store([files[3]])
    clock.now += 900
    (late,) = listener.close_studies()
    assert late.late and late.folder.name == f"{closed.folder.name}-2" and late.instances == 1


def test_two_studies_arrive_at_once_and_close_each_on_its_own(listener, clock, tmp_path):
    sample.write_sample(tmp_path / "sent", studies=2, edge=16)
    port = listener.start()
    one, two = (sorted((tmp_path / "sent" / f"study-00{n}").iterdir()) for n in (0, 1))
    senders = [threading.Thread(target=sender(port)._c_store, args=(files,)) for files in (one, two[:-4])]
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join()
    clock.now += 30
    sender(port)._c_store(two[-4:])
    clock.now += 30
    assert [closed.instances for closed in listener.close_studies()] == [len(one)]
    clock.now += 30
    assert [closed.instances for closed in listener.close_studies()] == [len(two)]


def test_the_same_image_twice_counts_once_and_another_under_its_uid_is_refused(listener, clock, tmp_path):
    files = write(tmp_path / "sent")
    port = listener.start()
    sender(port)._c_store(files)
    sender(port)._c_store(files[:2])
    other = dcmread(files[0])
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(tmp_path / "other")
    with pytest.raises(ArchiveRefusedError, match="0111H"):
        sender(port)._c_store([tmp_path / "other"])
    clock.now += 60
    assert listener.close_studies()[0].instances == 8


def test_what_arrived_before_a_crash_is_closed_after_it(listener, clock, tmp_path):
    files = write(tmp_path / "sent")
    sender(listener.start())._c_store(files[:6])
    listener.stop()
    (kept,) = (listener.folder / "incoming").iterdir()
    (kept / ".half.dcm.tmp").write_bytes(b"half")
    again = Listener(listener.folder, "PERMED", ["SCANNER"], port=0, quiet=60, clock=clock)
    sender(again.start())._c_store(files[6:])
    clock.now += 60
    (closed,) = again.close_studies()
    again.stop()
    assert closed.instances == 8 and closed.whole


@pytest.mark.parametrize(("calling", "called"), [("STRANGER", "PERMED"), ("SCANNER", "OTHER")])
def test_only_known_titles_are_let_in(listener, calling, called):
    with pytest.raises(ArchiveRefusedError, match="refuses the association"):
        sender(listener.start(), calling, called).echo()


def test_a_full_disk_is_told_to_the_sender(listener, tmp_path, monkeypatch):
    port = listener.start()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ArchiveError, match="out of resources"):
        sender(port)._c_store(write(tmp_path / "sent", count=1))
    assert not list((listener.folder / "incoming").iterdir())


def test_impossible_settings(tmp_path):
    with pytest.raises(SettingsError, match="AE titles that may send"):
        Listener(tmp_path, "PERMED", [], port=0).start()
    with pytest.raises(SettingsError, match="AE title"):
        Listener(tmp_path, "A\\B", ["X"], port=0).start()
    with pytest.raises(SettingsError, match="TLS"):
        Listener(tmp_path, "PERMED", ["X"], port=0, host="0.0.0.0").start()
    with pytest.raises(SettingsError, match="certificates"):
        Listener(tmp_path, "PERMED", ["X"], port=0, tls=Tls("none", "none", "none")).start()


def test_a_port_that_is_taken(listener, tmp_path):
    port = listener.start()
    with pytest.raises(EngineError, match="cannot be listened"):
        Listener(tmp_path / "b", "PERMED", ["X"], port=port).start()


def test_holes(tmp_path):
    write(tmp_path / "whole")
    write(tmp_path / "late-start", edit=lambda k, ds: ds if k > 1 else None)
    write(tmp_path / "hole", edit=lambda k, ds: ds if k != 3 else None)
    assert holes_in(tmp_path / "whole") == ()
    assert holes_in(tmp_path / "late-start") == ("INCOMPLETE_SUSPECTED",)
    assert holes_in(tmp_path / "hole") == ("MISSING_SLICES",)


# ------------------------------------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One authority; a certificate for each side; and a stranger's."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for authority in ("ca", "other-ca"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                "-subj", f"/CN={authority}", "-keyout", f"{authority}.key", "-out", f"{authority}.pem")  # fmt: skip
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other-ca")):
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key",
                "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", f"{name}.pem")  # fmt: skip
    return folder


def side(folder: Path, name: str, authority: str = "ca") -> Tls:
    return Tls(str(folder / f"{authority}.pem"), str(folder / f"{name}.pem"), str(folder / f"{name}.key"))


def test_tls_on_both_sides(listener, clock, tmp_path, certificates):
    listener.tls = side(certificates, "server")
    port = listener.start()
    sender(port, tls=side(certificates, "client")).echo()
    sender(port, tls=side(certificates, "client"))._c_store(write(tmp_path / "sent"))
    clock.now += 60
    assert listener.close_studies()[0].instances == 8
    for wrong in (side(certificates, "stranger"), side(certificates, "client", "other-ca"), None):
        with pytest.raises(ArchiveError):
            sender(port, tls=wrong).echo()
