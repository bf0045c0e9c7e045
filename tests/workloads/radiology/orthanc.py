"""A real Orthanc on loopback with a password and a list of AE titles: started once per session, ended by its id."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from permed_compute.testing.ports import free_port

USER, PASSWORD = "permed", "Correct-Horse-7"
PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"


@dataclass(frozen=True)
class Orthanc:
    """Where it listens, and its own REST interface for looking from the outside."""

    folder: Path
    http: int
    dicom: int

    def ask(self, path: str, body: Any = None, method: str = "") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", method=method or None)
        request.add_header("Authorization", "Basic " + b64encode(f"{USER}:{PASSWORD}".encode()).decode())
        if body is not None:
            request.data = json.dumps(body).encode()
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def instances(self, study: str) -> list[dict[str, Any]]:
        """Every instance of that study: its tags as names."""
        query = {"Level": "Instance", "Expand": True, "Query": {"StudyInstanceUID": study}}
        return self.ask("/tools/find", query)

    def forget(self) -> None:
        for study in self.ask("/studies"):
            self.ask(f"/studies/{study}", method="DELETE")

    def archives(self, **more: Any) -> Path:
        """An archives file with this server under several names; `more` are further entries."""
        import yaml

        secret = self.folder / "password"
        secret.write_text(PASSWORD + "\n")
        secret.chmod(0o600)
        web = {"url": f"http://127.0.0.1:{self.http}/dicom-web", "user": USER, "password_file": "password"}
        dicom = {"host": "127.0.0.1", "port": self.dicom, "called": "ORTHANC", "calling": "PERMED"}
        entries = {
            "pacs": {"clinical": False, "dicomweb": web, "dicom": dicom, "timeout": "20s"},
            "clinic": {"clinical": True, "dicomweb": web, "dicom": dicom},
            "stranger": {"clinical": False, "dicom": dicom | {"calling": "STRANGER"}},
            "no-such-service": {"clinical": False, "dicomweb": web | {"url": f"http://127.0.0.1:{self.http}/nowhere"}},
        }
        wrong = self.folder / "wrong-password"
        wrong.write_text("Wrong-Horse-8")
        wrong.chmod(0o600)
        entries["locked"] = {"clinical": False, "dicomweb": web | {"password_file": "wrong-password"}}
        path = self.folder / f"archives-{len(list(self.folder.glob('archives-*')))}.yaml"
        path.write_text(yaml.safe_dump({"archives": entries | more}))
        return path


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Orthanc]:
    """Start it, or skip with the reason."""
    program = shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or not Path(PLUGIN).exists():
        pytest.skip("Orthanc with DICOMweb is not on this machine; `make real-parts` brings it")
    server = Orthanc(folder, free_port(), free_port())
    settings = {
        "HttpPort": server.http, "DicomPort": server.dicom, "DicomAet": "ORTHANC", "DicomCheckCalledAet": True,
        "RemoteAccessAllowed": False, "AuthenticationEnabled": True, "RegisteredUsers": {USER: PASSWORD},
        "DicomAlwaysAllowStore": False, "DicomAlwaysAllowEcho": False, "DicomCheckModalityHost": True,
        "DicomModalities": {"permed": ["PERMED", "127.0.0.1", 104]}, "UnknownSopClassAccepted": True,
        "OverwriteInstances": False, "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
        "Plugins": [PLUGIN], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}, "ConcurrentJobs": 1,
        "StableAge": 1, "SyncStorageArea": False,
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log.txt").open("wb") as log:
        # Debian's DCMTK leaves Nagle's algorithm on: ten images a second instead of a hundred.
        environment = os.environ | {"TCP_NODELAY": "1"}
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log, env=environment)
    try:
        _await(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _await(server: Orthanc, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            server.ask("/system")
            return
        time.sleep(0.05)
    raise AssertionError("Orthanc does not start: " + (server.folder / "log.txt").read_text()[-500:])
