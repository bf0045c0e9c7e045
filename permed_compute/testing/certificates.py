"""Certificates for tests of TLS: an authority, and one certificate per machine, as a site would have them."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DAYS = 2


class Authority:
    """Signs certificates that prove a machine's addresses, to servers and as a client. Files below `folder`, mode 0600.

    Needs `cryptography`.
    """

    def __init__(self, folder: Path) -> None:
        from cryptography import x509

        self._folder = folder
        self._key = _new_key()
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "permed-compute tests")])
        made = _begun(self._name, self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.file = self._written("authority.crt", _signed(made, self._key))

    def issue(self, name: str, addresses: Sequence[str]) -> tuple[Path, Path]:
        """(certificate, key) for a machine that has these IP addresses."""
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = _new_key()
        names = [x509.IPAddress(ipaddress.ip_address(each)) for each in addresses]
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        made = (
            _begun(subject, self._name, key)
            .add_extension(x509.SubjectAlternativeName([*names, x509.DNSName("localhost")]), critical=False)
            .add_extension(usage, critical=False)
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return self._written(f"{name}.crt", _signed(made, self._key)), self._written(f"{name}.key", private)

    def ray(self, name: str, addresses: Sequence[str]) -> dict[str, str]:
        """The variables that make Ray speak TLS as this machine, and refuse whoever has no certificate of ours."""
        certificate, key = self.issue(name, addresses)
        return {
            "RAY_USE_TLS": "1", "RAY_TLS_CA_CERT": str(self.file), "RAY_TLS_SERVER_CERT": str(certificate),
            "RAY_TLS_SERVER_KEY": str(key),
        }  # fmt: skip

    def _written(self, name: str, data: bytes) -> Path:
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_bytes(data)
        return path


def _new_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _begun(subject: Any, issuer: Any, key: Any) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _signed(made: Any, key: Any) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    signed: bytes = made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    return signed
