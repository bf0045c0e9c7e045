"""The destinations file: all that is wrong at once with its line, no secret in it, and what may go where."""

from __future__ import annotations

import pytest

from permed_compute.errors import NotFoundError, PermissionDeniedError, SpecError
from permed_compute.spec import DataClass
from permed_compute.transfer.channels import channel
from permed_compute.transfer.destinations import permit, read_destinations

GOOD = """
destinations:
  kista: {kind: sftp, direction: send, host: kista.example.org, port: 2042, user: k, folder: up, max_data_class: red}
  back: {kind: sftp, direction: receive, host: kista.example.org, port: 2043, user: k, folder: up, max_data_class: red}
  tsd: {kind: tsd, project: p11, token_file: tsd.token, max_data_class: black}
  gate: {kind: folder, path: share, signed: true, volume: 2GiB, max_data_class: yellow}
"""


def read(tmp_path, text):
    (tmp_path / "destinations.yaml").write_text(text)
    return read_destinations(tmp_path / "destinations.yaml")


def test_each_kind_becomes_a_channel_and_files_start_at_the_files_folder(tmp_path):
    found = read(tmp_path, GOOD)
    assert found["gate"].path == str(tmp_path / "share") and found["gate"].volume == 2 << 30
    assert found["tsd"].token_file == str(tmp_path / "tsd.token")
    assert {type(channel(entry, tmp_path)).__name__ for entry in found.values()} == {"Sftp", "Tsd", "Folder"}


def test_what_may_go_where(tmp_path):
    found = read(tmp_path, GOOD)
    permit("kista", found["kista"], "send", DataClass.RED)
    with pytest.raises(PermissionDeniedError, match="kista goes one way"):
        permit("kista", found["kista"], "receive")
    with pytest.raises(PermissionDeniedError, match="gate takes data up to yellow; these are red"):
        permit("gate", found["gate"], "send", DataClass.RED)


def test_one_account_in_both_directions_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"back\.direction: is the other way than kista's"):
        read(tmp_path, GOOD.replace("2043", "2042"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{kind: sftp, host: h, max_data_class: red}", "x.direction"),
        ("{kind: sftp, direction: both, host: h, max_data_class: red}", "x.direction"),
        ("{kind: sftp, direction: send, host: '-oProxyCommand=evil', max_data_class: red}", "x.host"),
        ("{kind: sftp, direction: send, host: h, user: '-x', max_data_class: red}", "x.user"),
        ("{kind: tsd, project: p11, token: eyJsecret, max_data_class: red}", "x.token: holds a secret"),
        ("{kind: tsd, project: ../p11, max_data_class: red}", "x.project"),
        ("{kind: folder, path: a}", "x.max_data_class"),
        ("{kind: folder, path: a, max_data_class: red, volume: 2}", "x.volume"),
        ("{kind: folder, path: a, max_data_class: red, colour: blue}", "x.colour: is no key"),
        ("{kind: carrier-pigeon}", "'folder', 'sftp', 'tsd'"),
        ("[]", "x"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_never_quoted(tmp_path, entry, words):
    with pytest.raises(SpecError, match=words) as told:
        read(tmp_path, f"destinations:\n  x: {entry}\n")
    assert all(problem.line == 2 for problem in told.value.problems) and "eyJsecret" not in str(told.value)


def test_a_file_that_is_none(tmp_path):
    for text in ("destinations: []", "a: b", "", ": :"):
        with pytest.raises(SpecError):
            read(tmp_path, text)
    with pytest.raises(NotFoundError, match="no destinations file"):
        read_destinations(tmp_path / "none")
