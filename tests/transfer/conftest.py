"""A set to send, and three far sides: a folder, a real OpenSSH server, and a loopback server that speaks TSD's API."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.errors import NotFoundError
from permed_compute.testing import sshd, tsd
from permed_compute.transfer.bundle import Bundle

from .sides import NAME, Far, FarFolder, FarSftp, FarTsd, bundled


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of many sizes, an empty one, odd names; about 3 MB."""
    folder = tmp_path / NAME
    chance = random.Random(7)
    sizes = {
        "a.dcm": 700_001,
        "b/c.dcm": 0,
        "b/d e.dcm": 512,
        "b/æøå 100%.dcm": 1_300_007,
        "z": 1,
        "x" * 200: 1_000_000,
    }
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(chance.randbytes(size))
    return folder


@pytest.fixture
def bundle(source: Path, tmp_path: Path) -> Bundle:
    return bundled(source, tmp_path)


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[sshd.Sshd, Path]]:
    """A real sshd, and the file that says how large (KiB) its SFTP server may write files."""
    folder = tmp_path_factory.mktemp("sshd")
    limit = folder / "limit"
    limit.write_text("unlimited")
    program = next(
        (p for p in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server") if Path(p).exists()), ""
    )
    wrapper = folder / "sftp"
    wrapper.write_text(f"#!/bin/bash\ntrap '' XFSZ\nulimit -f $(cat {limit})\nexec {program} -u 000\n")
    wrapper.chmod(0o755)
    try:
        with sshd.server(folder / "server", sftp=str(wrapper)) as running:
            yield running, limit
    except NotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["folder", "sftp", "tsd"])
def far(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    """Each far side in turn; filled ones are emptied afterwards."""
    where = tmp_path / "far"
    where.mkdir()
    if request.param == "tsd":
        pytest.importorskip("tsdapiclient", reason="tsd-api-client is not installed")
        from tsdapiclient.tools import HOSTS

        from permed_compute.transfer import tsd as channel

        with tsd.server(where) as server:
            monkeypatch.setitem(HOSTS, "dev", f"localhost:{server.port}")
            monkeypatch.setattr(channel, "_PART", 300_000)
            monkeypatch.setenv("TSD_TOKEN", tsd.token())
            yield FarTsd(server, tmp_path / "spool")
        return
    made: Far = FarFolder(where)
    if request.param == "sftp":
        pytest.importorskip("paramiko", reason="paramiko is not installed")
        made = FarSftp(where, *request.getfixturevalue("ssh_server"))
    yield made
    made.room()
