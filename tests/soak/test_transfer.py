"""1 GB through every channel, sender and receiver killed at random bytes: `make soak`, and the figures to quote."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from permed_compute.errors import NotFoundError
from permed_compute.testing import sshd, tsd

pytestmark = pytest.mark.soak
SIZE = 1_000_000_000
KILLS = 3


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    chance = random.Random(3)
    for number in range(20):
        (folder / f"{number:02d}.bin").write_bytes(chance.randbytes(SIZE // 20))
    return folder


@pytest.mark.parametrize("kind", ["folder", "sftp", "tsd"])
def test_a_gigabyte_arrives_however_often_it_is_cut(kind, scans, tmp_path, capsys):
    far, back, to = tmp_path / "far", tmp_path / "back", tmp_path / "to"
    far.mkdir()
    back.symlink_to(far)  # one SFTP account goes one way: two names for the same place
    about = {
        "folder": "kind: folder, path: {}",
        "sftp": "kind: sftp, host: far, folder: {}, config: sshd/ssh_config",
        "tsd": "kind: tsd, project: p11, env: dev, token_env: TSD_TOKEN",
    }[kind]
    (tmp_path / "d.yaml").write_text(
        f"destinations:\n  out: {{{about.format(far)}, direction: send, max_data_class: red}}\n"
        f"  in: {{{about.format(back)}, direction: receive, max_data_class: red}}\n"
    )
    environment = os.environ | {"PERMED_HOME": str(tmp_path / "home"), "TSD_TOKEN": tsd.token()}
    more = ["--destinations", tmp_path / "d.yaml", "--json"]
    with _server(kind, far, tmp_path):
        sent = _until_done(
            ["send", scans, "out", *more], environment, lambda: _bytes(far, tmp_path / "home" / "outgoing")
        )
        if kind == "tsd":
            (far / "p11" / "p11-member-group").rename(far / "p11" / "export")  # the export is approved
        received = _until_done(
            ["receive", "in", "--to", to, "--unsigned", *more], environment, lambda: _bytes(*tmp_path.glob(".to.*"))
        )
    for file in scans.iterdir():
        subprocess.run(["cmp", file, to / file.name], check=True, timeout=60)
    assert not list(tmp_path.glob(".to.*")) and not list(far.glob(".*"))
    with capsys.disabled():
        print(f"\n1 GB by {kind}: send {sent}; receive {received}")


def _server(kind, far, tmp_path):
    if kind == "tsd":
        pytest.importorskip("tsdapiclient", reason="tsd-api-client is not installed")
        return tsd.server(far, port=3003)
    try:
        return sshd.server(tmp_path / "sshd") if kind == "sftp" else nullcontext()
    except NotFoundError as error:
        pytest.skip(str(error))


def _until_done(words, environment, arrived):
    """Run it, kill -9 it at random amounts of arrived bytes, run it to its end. Returns the MB there at each kill, and
    the last run's seconds."""
    chance, cuts = random.Random(5), []
    program = [Path(sys.executable).with_name("permed"), *words]
    for part in sorted(chance.random() for _ in range(KILLS)):
        process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and arrived() < part * SIZE:
            time.sleep(0.01)
        process.kill()
        process.wait()
        cuts.append(arrived() // 1_000_000)
    began = time.monotonic()
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 20
    return f"killed at {cuts} MB, then {time.monotonic() - began:.1f} s"


def _bytes(*folders):
    """What lies below the folders; files come and go meanwhile."""
    total = 0
    for place, _, names in (found for folder in folders for found in os.walk(folder)):
        for name in names:
            try:
                total += Path(place, name).stat().st_size
            except FileNotFoundError:
                continue
    return total
