"""What every channel must do, held against a folder, a real OpenSSH server, and TSD's protocol with the real client."""

from __future__ import annotations

import logging
import os
import random
import stat
import time

import pytest

from permed_compute.errors import DamagedError, NoRoomError, PermissionDeniedError, TransferError
from permed_compute.transfer import receipts, sets
from permed_compute.transfer.bundle import Bundle, arrived

from .sides import NAME, FarFolder, FarSftp, FarTsd, same


def quiet(done: int, total: int) -> None: ...


def send(far, bundle, **named):
    with far.out() as channel:
        return sets.send(channel, bundle, progress=named.pop("progress", quiet), **named)


def receive(far, tmp_path, **named):
    with far.back() as channel:
        return sets.receive(
            arrived(channel), tmp_path / "to", verify=lambda text, signature: "", receipts=tmp_path / "receipts",
            progress=named.pop("progress", quiet), **named,
        )  # fmt: skip


def modes(root):
    return {stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_file()}


def test_a_set_arrives_as_it_was_and_no_more_readable(far, bundle, source, tmp_path):
    before = os.umask(0)
    try:
        names = send(far, bundle)
        (volume,) = far.landed()
        assert [volume.name] == names
        if not isinstance(far, FarTsd):  # there it is the server's doing
            assert stat.S_IMODE(volume.stat().st_mode) == 0o600
        receipt = receive(far, tmp_path)
    finally:
        os.umask(before)
    assert same(source, tmp_path / "to") and receipt.files == 6 and receipt.bytes == bundle.layout.manifest.size
    assert modes(tmp_path / "to") == {0o600} and stat.S_IMODE((tmp_path / "to").stat().st_mode) == 0o700
    assert receipts.receipt(tmp_path / "receipts", receipt.reference) == receipt


def test_nothing_tells_whose_files_they_are(far, bundle, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    send(far, bundle)
    far.landed()
    receive(far, tmp_path)
    seen = caplog.text + "".join(capfd.readouterr()) + " ".join(str(path.relative_to(tmp_path)) for path in far.left())
    if isinstance(far, FarTsd):
        seen += " ".join(far.server.requests)
        assert "permed-" in seen
    assert NAME not in seen and "a.dcm" not in seen and "xxxx" not in seen


def test_a_cut_at_a_random_byte_is_gone_on_from(far, bundle, source, tmp_path):
    chance = random.Random(11)
    for cut in sorted(chance.randrange(bundle.layout.size) for _ in range(3)):
        with pytest.raises(TransferError):
            _cut_out(far, bundle, cut)
        assert not [path for path in far.left() if path.name.endswith(".tar") and "spool" not in path.parts]
    asked = []
    send(far, bundle, progress=lambda done, total: asked.append(done))
    far.landed()
    for _ in range(3):
        with pytest.raises((TransferError, Cut)):
            receive(far, tmp_path, progress=_after(chance.randrange(bundle.layout.manifest.size)))
        assert not (tmp_path / "to").exists()
    receive(far, tmp_path)
    assert same(source, tmp_path / "to")


class Cut(Exception):
    pass


def _after(count, act=None):
    def progress(done, total):
        if done >= count:
            if act is None:
                raise Cut
            act()

    return progress


def _cut_out(far, bundle, cut):
    """The line is cut once `cut` bytes are there: by a killed ssh, by the server, by a source that cannot be read."""
    if isinstance(far, FarTsd):
        held = sum(path.stat().st_size for path in far.server.root.glob("p11/.resumables/*/data"))
        far.server.taken, far.server.cut_after = 0, cut - held
        send(far, bundle)
        return
    with far.out() as channel:
        if isinstance(far, FarSftp):
            sets.send(channel, bundle, progress=_after(cut, channel._process.kill))
        else:
            try:
                sets.send(channel, bundle, progress=_after(cut))
            except Cut:
                raise TransferError("cut") from None


def test_going_on_does_not_begin_anew(far, bundle, monkeypatch):
    with pytest.raises(TransferError):
        _cut_out(far, bundle, bundle.layout.size * 2 // 3)
    if isinstance(far, FarTsd):
        far.server.taken, far.server.cut_after = 0, None
        send(far, bundle)
        assert far.server.taken < bundle.layout.size * 2 // 3
        return
    (part,) = far.left()
    for _ in range(1200):  # what was under way when the line was cut reaches the disk when the server comes to it
        if part.stat().st_size:
            break
        time.sleep(0.05)
    held, inode = part.stat().st_size, part.stat().st_ino
    begun = []
    read = Bundle.read
    monkeypatch.setattr(Bundle, "read", lambda self, start, stop: begun.append(start) or read(self, start, stop))
    send(far, bundle)
    (volume,) = far.landed()
    assert volume.stat().st_ino == inode
    # A folder compares what lies there; a one-way account cannot, and begins where it ends (the server may have written
    # meanwhile what was under way).
    assert begun[0] >= held > 0 if isinstance(far, FarSftp) else begun == [0]


def test_what_is_there_is_not_sent_again(far, bundle):
    names = send(far, bundle, largest=1_000_000)
    assert len(names) == 4
    if isinstance(far, FarTsd):
        far.server.taken = 0
        send(far, bundle, largest=1_000_000)
        assert far.server.taken == 0
    else:
        inodes = [path.stat().st_ino for path in far.landed()]
        send(far, bundle, largest=1_000_000)
        assert [path.stat().st_ino for path in far.landed()] == inodes


def test_volumes_arrive_as_one_set(far, bundle, source, tmp_path):
    send(far, bundle, largest=1_000_000)
    assert len(far.landed()) == 4
    receive(far, tmp_path)
    assert same(source, tmp_path / "to")


@pytest.mark.parametrize("seed", range(2))
def test_a_flipped_byte_is_detected_and_nothing_gets_its_name(far, bundle, source, tmp_path, seed):
    send(far, bundle)
    (volume,) = far.landed()
    content = bytearray(volume.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed
    volume.write_bytes(content)
    with pytest.raises(DamagedError) as told:
        receive(far, tmp_path)
    assert not (tmp_path / "to").exists() and ".dcm" not in str(told.value) and told.value.remedy
    volume.unlink()
    send(far, bundle, anew=True)
    far.landed()
    receive(far, tmp_path)  # goes on with what was right
    assert same(source, tmp_path / "to")


def test_a_byte_that_flips_in_what_was_received_before_a_cut_is_mended(far, bundle, source, tmp_path):
    send(far, bundle)
    far.landed()
    with pytest.raises(Cut):
        receive(far, tmp_path, progress=_after(2_500_000))
    (staging,) = tmp_path.glob(".to.*.receiving")
    for path in [path for path in staging.rglob("*") if path.is_file() and path.stat().st_size]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    receive(far, tmp_path)
    assert same(source, tmp_path / "to")


def test_a_full_disk_there_is_said_and_leaves_nothing(far, bundle, source):
    far.fill()
    try:
        with pytest.raises(NoRoomError) as told:
            send(far, bundle)
        assert told.value.remedy and not far.left()
        with pytest.raises(NoRoomError):
            send(far, bundle, largest=900_000) if isinstance(far, FarTsd) else send(far, bundle)
        assert not far.left()
    finally:
        far.room()
    send(far, bundle)


def test_a_full_disk_here_is_said_and_leaves_nothing(far, bundle, tmp_path):
    send(far, bundle)
    far.landed()
    here = FarFolder(tmp_path)
    here.fill()
    try:
        with pytest.raises(NoRoomError):
            receive(far, tmp_path)
    finally:
        here.room()
    assert not list(tmp_path.glob(".to*")) and not (tmp_path / "to").exists() and not (tmp_path / "receipts").exists()


def test_no_room_is_noticed_before_anything_is_written(far, bundle, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    send(far, bundle)
    far.landed()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(NoRoomError, match="Nothing was written"):
        receive(far, tmp_path)
    assert not list(tmp_path.glob(".to*"))


@pytest.mark.parametrize("far", ["sftp"], indirect=True)
def test_the_one_way_channel_goes_one_way(far, bundle):
    send(far, bundle)
    with far.out() as channel:
        for act in (channel.sizes, lambda: next(channel.read("permed-x.tar", 0))):
            with pytest.raises(PermissionDeniedError, match="goes one way"):
                act()
    with far.back() as channel:
        for act in (lambda: channel.put(bundle.volumes()[0], quiet), lambda: channel.forget("permed-x.tar")):
            with pytest.raises(PermissionDeniedError, match="goes one way"):
                act()


@pytest.mark.parametrize("far", ["tsd"], indirect=True)
def test_a_token_that_does_not_count_is_said(far, bundle, monkeypatch):
    from permed_compute.testing import tsd

    for token, words in ((tsd.token("p12"), "token"), (tsd.token(expires_in=-1), "token"), ("", "missing")):
        monkeypatch.setenv("TSD_TOKEN", token)
        with pytest.raises(PermissionDeniedError, match=words):
            send(far, bundle)


@pytest.mark.parametrize("far", ["tsd"], indirect=True)
def test_a_beginning_that_is_not_this_file_is_not_gone_on_from(far, bundle, source, tmp_path):
    with pytest.raises(TransferError):
        _cut_out(far, bundle, 1_000_000)
    (data,) = far.server.root.glob("p11/.resumables/*/data")
    (about,) = far.server.root.glob("p11/.resumables/*/about.json")
    about.write_text(about.read_text().replace('"]]', 'x"]]'))
    assert data.stat().st_size
    send(far, bundle)
    far.landed()
    receive(far, tmp_path)
    assert same(source, tmp_path / "to")


@pytest.mark.parametrize("far", ["sftp"], indirect=True)
def test_a_host_that_is_not_known_or_does_not_let_in_is_said(far, bundle, tmp_path):
    config = far.server.config.read_text()
    for change, kind, words in (
        (("UserKnownHostsFile ", "UserKnownHostsFile /dev/null "), PermissionDeniedError, "host's key"),
        (("IdentityFile ", "IdentityFile /dev/null "), PermissionDeniedError, "login"),
        ((f"Port {far.server.port}", "Port 1"), TransferError, "Nobody answers"),
    ):
        other = tmp_path / "config"
        lines = [line.split(change[0])[0] + change[1] if change[0] in line else line for line in config.split("\n")]
        other.write_text("\n".join(lines))
        entry = far.out()._entry.model_copy(update={"config": str(other)})
        from permed_compute.transfer.sftp import Sftp

        with pytest.raises(kind, match=words), Sftp(entry):
            pass
