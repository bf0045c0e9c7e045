"""Receiving: what is looked at before anything is written, and what a second call finds."""

from __future__ import annotations

import os
import threading

import pytest

from permed_compute.errors import DamagedError, PermissionDeniedError, StateError
from permed_compute.transfer import receipts, sets, signing
from permed_compute.transfer.bundle import arrived
from permed_compute.transfer.folder import Folder

from .sides import bundled, key, same, signers


def quiet(done: int, total: int) -> None: ...


@pytest.fixture
def gate(tmp_path):
    folder = tmp_path / "gate"
    folder.mkdir()
    return Folder(folder)


def receive(gate, tmp_path, to="to", verify=lambda text, signature: "", progress=quiet):
    return sets.receive(
        arrived(gate), tmp_path / to, verify=verify, receipts=tmp_path / "receipts", progress=progress
    )  # fmt: skip


def test_nothing_is_written_before_the_signature_is_verified(gate, source, tmp_path):
    mine, allowed = key(tmp_path / "keys"), tmp_path / "allowed"
    manifest = bundled(source, tmp_path).layout.manifest
    bundle = bundled(source, tmp_path, signing.sign(manifest.text, mine))
    sets.send(gate, bundle, progress=quiet)
    signers(allowed, somebody=key(tmp_path / "keys", "other"))

    def verify(text, signature):
        assert not list(tmp_path.glob(".to*"))
        return signing.verify(text, signature, allowed)

    with pytest.raises(PermissionDeniedError, match="nobody on your list"):
        receive(gate, tmp_path, verify=verify)
    assert not list(tmp_path.glob(".to*")) and not (tmp_path / "to").exists()
    signers(allowed, somebody=key(tmp_path / "keys", "another"), sender=mine)
    assert receive(gate, tmp_path, verify=verify).signer == "sender"
    assert same(source, tmp_path / "to")


def test_what_two_keys_signed_is_never_mixed(gate, source, tmp_path):
    text = bundled(source, tmp_path).layout.manifest.text
    for name in ("one", "two"):
        signature = signing.sign(text, key(tmp_path / "keys", name))
        sets.send(gate, bundled(source, tmp_path, signature), progress=quiet)
    names = sorted(path.name for path in gate.path.iterdir())
    assert len(names) == 2
    receipt = sets.receive(
        arrived(gate, names[1].removeprefix("permed-").removesuffix(".tar")), tmp_path / "to",
        verify=lambda text, signature: "", receipts=tmp_path / "receipts", progress=quiet,
    )  # fmt: skip
    assert receipt.reference.startswith(names[1].split("-")[1])


def test_a_set_under_another_sets_name_is_refused(gate, bundle, tmp_path):
    sets.send(gate, bundle, progress=quiet)
    (volume,) = gate.path.iterdir()
    volume.rename(gate.path / f"permed-{'0' * 16}.tar")
    with pytest.raises(DamagedError):
        receive(gate, tmp_path)


def test_what_is_cut_off_or_too_long_is_refused(gate, bundle, tmp_path):
    sets.send(gate, bundle, progress=quiet)
    (volume,) = gate.path.iterdir()
    size = volume.stat().st_size
    for end in (0, 100, 600, size - 1, size + 512):
        os.truncate(volume, end)
        with pytest.raises(DamagedError):
            receive(gate, tmp_path)
        sets.send(gate, bundle, anew=True, progress=quiet)
    assert not (tmp_path / "to").exists()


def test_received_again_is_received_once(gate, bundle, source, tmp_path):
    sets.send(gate, bundle, progress=quiet)
    first = receive(gate, tmp_path)
    mark = (tmp_path / "to").stat().st_ino
    assert receive(gate, tmp_path) == first and (tmp_path / "to").stat().st_ino == mark
    receive(gate, tmp_path, to="second")
    assert same(source, tmp_path / "second")
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "mine").write_text("mine")
    with pytest.raises(StateError, match="holds something else"):
        receive(gate, tmp_path, to="third")
    assert (tmp_path / "third" / "mine").read_text() == "mine"


def test_a_receipt_counts_for_as_long_as_its_folder_is_there(gate, bundle, tmp_path):
    sets.send(gate, bundle, progress=quiet)
    receipt = receive(gate, tmp_path)
    assert receipts.receipt(tmp_path / "receipts", receipt.reference) == receipt
    (tmp_path / "to").rename(tmp_path / "moved")
    assert receipts.receipt(tmp_path / "receipts", receipt.reference) is None
    assert receipts.receipt(tmp_path / "receipts", "0" * 64) is None


def test_two_at_once_do_not_write_into_one_another(gate, bundle, source, tmp_path):
    sets.send(gate, bundle, progress=quiet)
    inside, go_on, refused = threading.Event(), threading.Event(), []

    def slow(done, total):
        inside.set()
        go_on.wait(30)

    first = threading.Thread(target=receive, args=(gate, tmp_path), kwargs={"progress": slow})
    first.start()
    assert inside.wait(30)
    try:
        receive(gate, tmp_path)
    except StateError as error:
        refused.append(error)
    go_on.set()
    first.join(60)
    assert refused and same(source, tmp_path / "to")


def test_a_byte_that_flipped_in_what_a_cut_left_there_is_sent_again(gate, bundle, source, tmp_path):
    class Cut(Exception):
        pass

    def cut(done, total):
        if done > 2_000_000:
            raise Cut

    with pytest.raises(Cut):
        sets.send(gate, bundle, progress=cut)
    (part,) = gate.path.iterdir()
    content = bytearray(part.read_bytes())
    content[1_500_000] ^= 1
    part.write_bytes(content)
    sets.send(gate, bundle, progress=quiet)
    receive(gate, tmp_path)
    assert same(source, tmp_path / "to")
