"""What the tests of transfers share: how a set is made and compared, and the far sides of the channels."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from permed_compute.spec import DataClass
from permed_compute.storage.digests import DigestCache
from permed_compute.testing import sshd, tsd
from permed_compute.transfer.bundle import Bundle, Layout
from permed_compute.transfer.folder import Folder
from permed_compute.transfer.manifest import Manifest
from permed_compute.transfer.port import Channel

NAME = "Nordmann_Kari_01019912345"
"""A folder name as they are: nothing of it may be seen outside the bundle."""


def bundled(source: Path, tmp_path: Path, signature: bytes = b"") -> Bundle:
    manifest = Manifest.of(source, DataClass.RED, DigestCache(tmp_path / "digests").digest)
    return Bundle(source, Layout(manifest, signature))


def same(one: Path, other: Path) -> bool:
    """The same files with the same bytes."""
    left, right = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (one, other)
    )
    return left == right and bool(left)


def key(folder: Path, name: str = "key") -> Path:
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / name], check=True, timeout=30
    )
    return folder / name


def signers(file: Path, **keys: Path) -> Path:
    """An allowed_signers file with those keys by name."""
    lines = [
        f'{name} namespaces="permed-transfer" {path.with_suffix(".pub").read_text()}' for name, path in keys.items()
    ]
    file.write_text("".join(lines))
    return file


# ------------------------------------------------------------------------------------------- far sides


class Far:
    """The other side of a channel: `out()` sends there, `back()` fetches from there, `place(name)` is where it lies."""

    def out(self) -> Channel:
        raise NotImplementedError

    def back(self) -> Channel:
        raise NotImplementedError

    def landed(self) -> list[Path]:
        """Whole volumes, ready to be fetched by `back`."""
        raise NotImplementedError

    def left(self) -> list[Path]:
        """Every file there, whole or not."""
        raise NotImplementedError

    def fill(self) -> None:
        """From now on it takes no more than 1 MB."""
        raise NotImplementedError

    def room(self) -> None:
        """It takes everything again."""


@dataclass
class FarFolder(Far):
    path: Path

    def out(self) -> Channel:
        return Folder(self.path)

    back = out

    def landed(self) -> list[Path]:
        return sorted(self.path.glob("permed-*.tar"))

    def left(self) -> list[Path]:
        return [path for path in self.path.rglob("*") if path.is_file()]

    def fill(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def room(self) -> None:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@dataclass
class FarSftp(FarFolder):
    server: sshd.Sshd
    limit: Path

    def _entry(self, direction: str) -> Channel:
        from permed_compute.transfer.destinations import SftpDestination
        from permed_compute.transfer.sftp import Sftp

        return Sftp(
            SftpDestination(
                kind="sftp", direction=direction, host="far", folder=str(self.path), config=str(self.server.config),
                max_data_class="red",
            )
        )  # fmt: skip

    def out(self) -> Channel:
        return self._entry("send")

    def back(self) -> Channel:
        return self._entry("receive")

    def fill(self) -> None:
        self.limit.write_text("1000")

    def room(self) -> None:
        self.limit.write_text("unlimited")


@dataclass
class FarTsd(Far):
    server: tsd.TsdServer
    spool: Path

    def out(self) -> Channel:
        from permed_compute.transfer.destinations import TsdDestination
        from permed_compute.transfer.tsd import Tsd

        entry = TsdDestination(kind="tsd", project="p11", env="dev", token_env="TSD_TOKEN", max_data_class="black")
        return Tsd(entry, self.spool)

    back = out

    def landed(self) -> list[Path]:
        for file in self.server.imported().glob("permed-*"):
            file.replace(self.server.export() / file.name)  # what TSD's export approval does
        return sorted(self.server.export().glob("permed-*.tar"))

    def left(self) -> list[Path]:
        return [path for root in (self.server.root, self.spool) for path in root.rglob("*") if path.is_file()]

    def fill(self) -> None:
        self.server.quota = 1_000_000

    def room(self) -> None:
        self.server.quota = 1 << 60
