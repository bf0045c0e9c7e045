"""Signatures by the real ssh-keygen: who signed, and what no signature may cover."""

from __future__ import annotations

import subprocess

import pytest

from permed_compute.errors import DamagedError, NotFoundError, PermissionDeniedError, TransferError
from permed_compute.transfer.signing import sign, verify

from .sides import key, signers

TEXT = b'{"files":[]}\n'


@pytest.fixture
def known(tmp_path):
    return signers(tmp_path / "allowed", data_manager=key(tmp_path, "mine"))


def test_a_signature_names_its_signer_and_is_the_same_each_time(known, tmp_path):
    signature = sign(TEXT, tmp_path / "mine")
    assert verify(TEXT, signature, known) == "data_manager"
    assert sign(TEXT, tmp_path / "mine") == signature


def test_another_text_a_stranger_and_another_purpose_are_refused(known, tmp_path):
    with pytest.raises(DamagedError, match="not over this manifest"):
        verify(TEXT + b" ", sign(TEXT, tmp_path / "mine"), known)
    with pytest.raises(DamagedError):
        verify(TEXT, b"no signature", known)
    with pytest.raises(PermissionDeniedError, match="nobody on your list"):
        verify(TEXT, sign(TEXT, key(tmp_path, "strangers")), known)
    mail = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-f", tmp_path / "mine", "-n", "file"], input=TEXT, capture_output=True, check=True
    )
    with pytest.raises(DamagedError):
        verify(TEXT, mail.stdout, known)


def test_what_is_missing_is_said(known, tmp_path):
    with pytest.raises(NotFoundError, match="no key"):
        sign(TEXT, tmp_path / "none")
    with pytest.raises(NotFoundError, match="no list"):
        verify(TEXT, b"", tmp_path / "none")
    (tmp_path / "text").write_text("no key")
    with pytest.raises(TransferError, match="could not sign"):
        sign(TEXT, tmp_path / "text")


def test_a_key_that_signs_differently_each_time_is_refused(tmp_path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", tmp_path / "other"], check=True, timeout=30)
    with pytest.raises(TransferError, match="not an Ed25519 key"):
        sign(TEXT, tmp_path / "other")
