"""The bundle's stream: the same from any byte on, what standard tools open, and nothing that a sender smuggled in."""

from __future__ import annotations

import hashlib
import json
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from permed_compute.errors import DamagedError, NotFoundError, TransferError
from permed_compute.spec import DataClass
from permed_compute.transfer.bundle import Bundle, Layout, arrived
from permed_compute.transfer.folder import Folder
from permed_compute.transfer.manifest import Manifest, Row

from .sides import bundled


def whole(bundle: Bundle) -> bytes:
    return b"".join(bundle.read(0, bundle.layout.size))


def test_it_is_a_bag_in_a_tar_that_standard_tools_open(source, bundle, tmp_path):
    (tmp_path / "set.tar").write_bytes(whole(bundle))
    subprocess.run(["tar", "xf", "set.tar"], cwd=tmp_path, check=True, timeout=30)
    bag = tmp_path / f"permed-{bundle.layout.manifest.reference[:16]}"
    assert (bag / "bagit.txt").read_text().startswith("BagIt-Version: 1.0")
    listed = (bag / "manifest-sha256.txt").read_text().replace("%25", "%")  # RFC 8493 writes % as %25
    (bag / "manifest-sha256.txt").write_text(listed)
    subprocess.run(["sha256sum", "-c", "--quiet", "manifest-sha256.txt"], cwd=bag, check=True, timeout=30)
    assert (bag / "data" / "b" / "æøå 100%.dcm").read_bytes() == (source / "b" / "æøå 100%.dcm").read_bytes()


def test_its_bytes_are_the_same_wherever_they_are_made():
    """A golden digest: senders and receivers of different versions make the same headers, or none of it works."""
    digest = hashlib.sha256(b"abc").hexdigest()
    rows = (Row("a", 3, digest), Row("b/" + "y" * 250, 3, digest), Row("å" * 120, 3, digest))
    layout = Layout(Manifest(rows, DataClass.RED), b"signature")
    between = layout.front + b"".join(layout.header(row) for row in rows)
    assert hashlib.sha256(between).hexdigest() == "aeeb8d5da75af1c9f8c2f2d66b2b8ca3168758b77b00f3af6586b5adf94c8a8a"


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6), cut=st.data())
def test_it_begins_again_at_any_byte_and_is_cut_anywhere(sizes, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for number, size in enumerate(sizes):
        (folder / f"{number:02d}").write_bytes(bytes([number]) * size)
    bundle = bundled(folder, tmp_path_factory.mktemp("digests"))
    everything, total = whole(bundle), bundle.layout.size
    assert len(everything) == total
    start, stop = sorted(cut.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    assert b"".join(bundle.read(start, stop)) == everything[start:stop]
    volumes = bundle.volumes(cut.draw(st.integers(max(1, total // 50), total)))
    assert b"".join(piece for volume in volumes for piece in volume.read(0)) == everything
    assert sum(volume.size for volume in volumes) == total


def test_a_source_that_changes_is_not_sent_as_what_it_was(source, bundle):
    (source / "a.dcm").write_bytes(b"y" + (source / "a.dcm").read_bytes()[1:])
    with pytest.raises(TransferError, match="changed while it was sent") as told:
        whole(bundle)
    assert "a.dcm" not in str(told.value)
    (source / "a.dcm").unlink()
    with pytest.raises(TransferError, match="changed while it was sent"):
        whole(bundle)


def test_links_and_unsafe_names_do_not_travel(source, tmp_path):
    (source / "b" / "link").symlink_to("/etc/passwd")
    with pytest.raises(TransferError, match="1 links or devices"):
        bundled(source, tmp_path)
    (source / "b" / "link").unlink()
    (source / "new\nline").write_text("")
    with pytest.raises(TransferError, match="1 of 7 names cannot travel") as told:
        bundled(source, tmp_path)
    assert "line" not in told.value.message.replace("new line", "")


@pytest.mark.parametrize(
    "names",
    [
        ["../evil"], ["/etc/cron.d/evil"], ["a/../../evil"], ["a//b"], ["./a"], [""], ["a\\..\\b"], ["a\nb"], ["a\0b"],
        ["a", "a"], ["b", "a"], ["a", "a/b"], ["x" * 256], ["\u202egnp.exe"],
    ],
)  # fmt: skip
def test_a_manifest_with_such_names_is_refused(names):
    text = Manifest(tuple(Row(name, 0, hashlib.sha256().hexdigest()) for name in names), DataClass.RED).text
    with pytest.raises(DamagedError, match="manifest is refused"):
        Manifest.read(text)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "permed-transfer/2"}, {"files": []}, {"files": [["a", -1, "0" * 64]]}, {"data_class": "purple"},
        {"files": [["a", 0, "x" * 64]]}, {"files": [["a", True, "0" * 64]]}, {"more": 1}, {"files": "abc"},
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_exactly_one_is_refused(change, bundle):
    body = json.loads(bundle.layout.manifest.text) | change
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    with pytest.raises(DamagedError):
        Manifest.read(text)
    with pytest.raises(DamagedError):
        Manifest.read(bundle.layout.manifest.text + b" ")


def test_what_is_missing_is_said(bundle, tmp_path):
    with pytest.raises(NotFoundError, match="No set is there yet"):
        arrived(Folder(tmp_path))
    volumes = bundle.volumes(bundle.layout.size // 3)
    for volume in volumes:
        (tmp_path / volume.name).write_bytes(b"".join(volume.read(0)))
    assert arrived(Folder(tmp_path)).size == bundle.layout.size
    (tmp_path / volumes[2].name).unlink()
    with pytest.raises(NotFoundError, match=f"Volume 3 of {len(volumes)}"):
        arrived(Folder(tmp_path))
    (tmp_path / ("permed-" + "0" * 16 + ".tar")).write_bytes(b"")
    with pytest.raises(NotFoundError, match="2 sets fit"):
        arrived(Folder(tmp_path))


def test_more_volumes_than_names_have_room_for_are_refused(bundle):
    with pytest.raises(TransferError, match="9999"):
        bundle.volumes(100)
