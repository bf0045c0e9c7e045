"""`permed radiology …` as typed: what it answers, and with which exit code."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml
from pydicom import dcmread

from permed_compute.cli import main
from permed_compute.cli.exits import Exit
from permed_compute.testing.ports import free_port
from permed_compute.workloads.radiology.deidentify import require_clean

from .made import write
from .test_listen import sender


@pytest.fixture
def permed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PERMED_HOME", str(tmp_path / "home"))

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["radiology", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_deidentify_a_folder_and_again(permed, tmp_path):
    write(tmp_path / "in", count=3)
    shutil.copy(tmp_path / "in" / "IM000", tmp_path / "in" / "flagged")
    flagged = dcmread(tmp_path / "in" / "flagged")
    flagged.BurnedInAnnotation = "YES"
    flagged.save_as(tmp_path / "in" / "flagged")
    words = ("deidentify", tmp_path / "in", "--to", tmp_path / "out", "--key", tmp_path / "key", "--json")
    code, out, _ = permed(*words, "--new-key")
    said = json.loads(out)
    assert code == Exit.PARTIAL and said["written"] == 3
    assert [row["code"] for row in said["left_out"]] == ["BURNED_IN_ANNOTATION"]
    files = sorted((tmp_path / "out").rglob("*.dcm"))
    assert len(files) == 3
    for path in files:
        require_clean(dcmread(path))
    assert permed(*words)[0] == Exit.PARTIAL and sorted((tmp_path / "out").rglob("*.dcm")) == files
    code, _, err = permed(*words, "--new-key")
    assert code == Exit.REFUSED and "not overwritten" in err


@pytest.mark.orthanc
def test_check_says_which_archives_know_us(permed, orthanc, tmp_path):
    file = orthanc.archives()
    code, out, _ = permed("check", file, "--json")
    answers = {(row["archive"], row["by"]): row["answers"] for row in json.loads(out)}
    assert code == Exit.FAILED
    assert answers == {
        ("pacs", "dicomweb"): True, ("pacs", "dicom"): True, ("clinic", "dicomweb"): True, ("clinic", "dicom"): True,
        ("locked", "dicomweb"): False, ("no-such-service", "dicomweb"): False, ("stranger", "dicom"): False,
    }  # fmt: skip
    good = yaml.safe_load(file.read_text())["archives"]
    file.write_text(yaml.safe_dump({"archives": {"pacs": good["pacs"]}}))
    code, out, _ = permed("check", file)
    assert code == Exit.OK and out.count("✓") == 2 and "127.0.0.1" not in out


def test_listen_until_a_study_is_there(permed, tmp_path):
    port = free_port()
    files = write(tmp_path / "sent")

    def send() -> None:
        for _ in range(900):
            try:
                sender(port)._c_store(files)
                return
            except Exception:
                time.sleep(0.1)

    thread = threading.Thread(target=send)
    thread.start()
    code, out, _ = permed(
        "listen",
        "--to",
        tmp_path / "in",
        "--from",
        "SCANNER",
        "--port",
        port,
        "--quiet",
        "1s",
        "--studies",
        1,
        "--json",
    )
    thread.join()
    (closed,) = json.loads(out)
    assert code == Exit.OK and closed["instances"] == 8 and closed["whole"]
    assert len(list(Path(closed["folder"]).glob("*.dcm"))) == 8


def test_what_is_wrong_with_the_command(permed, tmp_path):
    code, _, err = permed("listen", "--to", tmp_path, "--from", "X", "--host", "0.0.0.0")
    assert code == Exit.USAGE and "TLS" in err
    assert permed("check", tmp_path / "none.yaml")[0] == Exit.NOT_FOUND
