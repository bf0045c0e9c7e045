"""Signatures of manifests: OpenSSH's own (`ssh-keygen -Y`), so that no key of ours and no code of ours is trusted.

Passphrases and agents work as the user's `ssh` has them. Who may have signed is a file of the receiver, OpenSSH's
allowed_signers: `NAME namespaces="permed-transfer" ssh-ed25519 AAAA…`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from base64 import b64decode
from pathlib import Path

from permed_compute.errors import DamagedError, NotFoundError, PermissionDeniedError, TransferError

NAMESPACE = "permed-transfer"
_PATIENCE_S = 120
_ED25519 = b"\x00\x00\x00\x0bssh-ed25519"


def sign(text: bytes, key: Path) -> bytes:
    """The signature (SSHSIG, armoured) over `text` by a private key, or by the agent's key to a public one."""
    if not key.is_file():
        raise NotFoundError("There is no key to sign with.", remedy="Make one: ssh-keygen -t ed25519 -f KEY")
    done = _ssh_keygen(["sign", "-f", str(key), "-n", NAMESPACE], text)
    if done.returncode or not done.stdout:
        raise TransferError(
            "ssh-keygen could not sign with this key.",
            remedy="Is it an OpenSSH private key of mode 0600, and its passphrase right?",
        )
    if _ED25519 not in b64decode(b"".join(done.stdout.splitlines()[1:-1]))[:64]:
        raise TransferError(
            "This key is not an Ed25519 key.",
            remedy="Make one: ssh-keygen -t ed25519 -f KEY. Others sign differently each time, so that a transfer that"
            " was cut could not be gone on from.",
        )
    return done.stdout


def verify(text: bytes, signature: bytes, signers: Path) -> str:
    """The name under which the signer stands in `signers`. Raises `DamagedError` where the signature is not over this
    text, `PermissionDeniedError` where nobody on the list made it."""
    if not signers.is_file():
        raise NotFoundError(
            "There is no list of those whose signatures count.",
            remedy=f'Give --signers FILE with a line: NAME namespaces="{NAMESPACE}" ssh-ed25519 AAAA…',
        )
    with tempfile.TemporaryDirectory(prefix="permed-") as folder:
        file = Path(folder) / "signature"
        file.write_bytes(signature)
        common = ["-s", str(file), "-f", str(signers), "-n", NAMESPACE]
        if _ssh_keygen(["check-novalidate", *common[:2], *common[4:]], text).returncode:
            raise DamagedError(
                "The signature is not over this manifest: one of them was changed.",
                remedy="Nothing was unpacked. Ask who sent it to send it again.",
            )
        found = (
            _ssh_keygen(["find-principals", *common[:4]], b"").stdout.decode(errors="replace").split("\n")[0].strip()
        )
        if not found or _ssh_keygen(["verify", *common, "-I", found], text).returncode:
            raise PermissionDeniedError(
                "The bundle is signed by nobody on your list of signers.",
                remedy="Nothing was unpacked. Have the sender's public key confirmed by another way, then add it.",
            )
    return found


def _ssh_keygen(arguments: list[str], text: bytes) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise TransferError("ssh-keygen is not on PATH.", remedy="Install OpenSSH's client (8.2 or newer).")
    try:
        return subprocess.run([program, "-Y", *arguments], input=text, capture_output=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise TransferError(
            "ssh-keygen waits for something that nobody gives it.", remedy="Unlock the key: ssh-add KEY"
        ) from None
