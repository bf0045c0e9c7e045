"""A home on another machine, reached by the user's own ssh: no service there, only its `permed` (`cli/far.py`).

Files go as a set through SFTP into that home and are known there by reference, so that what it has is not sent again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permed_compute import errors
from permed_compute.errors import PermedError, SettingsError, TransferError
from permed_compute.spec import DataClass
from permed_compute.storage.digests import DigestCache
from permed_compute.transfer import sets, ssh
from permed_compute.transfer.bundle import Bundle, Layout, arrived
from permed_compute.transfer.destinations import Direction, SftpDestination
from permed_compute.transfer.port import Progress
from permed_compute.transfer.receipts import Receipt
from permed_compute.transfer.sftp import Sftp

_PATIENCE_S = 3600
"""A far `permed` that unpacks a large set takes its time; a dead line is noticed by ssh."""
_KINDS: dict[str, type[PermedError]] = {
    kind.code: kind
    for kind in (
        errors.NotFoundError, errors.StateError, errors.PermissionDeniedError, errors.QueueError, errors.SettingsError,
        errors.WorkloadError, errors.TransferError, errors.NoRoomError, errors.DamagedError,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Remote:
    """`ssh:HOST` or `ssh:HOST:PROGRAM`, where the far `permed` is not on the PATH that ssh gives."""

    host: str
    digests: DigestCache = field(repr=False)
    program: str = "permed"
    options: tuple[str, ...] = ()
    """Global options for the far program, such as `--site saga`."""

    @classmethod
    def of(cls, text: str, options: Sequence[str], digests: DigestCache) -> Remote:
        kind, _, rest = text.partition(":")
        host, _, program = rest.partition(":")
        if kind != "ssh" or not host or host.startswith("-"):
            raise SettingsError(f"--via {text} is no way to another machine.", remedy="Write --via ssh:HOST")
        return cls(host, digests, program or "permed", tuple(options))

    def forward(self, words: Sequence[str]) -> int:
        """Run `permed WORDS` there, its output ours. Returns its exit code. Raises `TransferError` where ssh failed."""
        code = subprocess.run(self._command([*self.options, *words]), stdin=subprocess.DEVNULL).returncode
        if code == 255:  # ssh's own
            raise ssh.reason("", code)
        return code

    def ask(self, *words: str, say: Any = None) -> Any:
        """The answer of a `permed far` command there. Raises what it raised, and `TransferError` where ssh failed."""
        command = self._command([*self.options, "--json", "far", *words])
        text = json.dumps(say) if say is not None else ""
        try:
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise TransferError("The other side does not answer.", remedy="Run it again: it goes on.") from None
        if done.returncode == 0:
            return json.loads(done.stdout)
        raise self._failed(done)

    def carry(self, paths: Sequence[Path], data_class: DataClass, progress: Progress) -> list[str]:
        """Bring files and folders there, but for what is there. Returns their paths there."""
        quiet: Progress = lambda done, total: None  # noqa: E731
        manifests = [sets.manifest_of(path, data_class, self.digests.digest, quiet) for path in paths]
        self.digests.save()
        references = [manifest.reference for manifest in manifests]
        landed = self.ask("land", *references)
        missing = {
            m.reference: (p, m) for p, m in zip(paths, manifests, strict=True) if not landed["folders"][m.reference]
        }
        if missing:
            with Sftp(self._sftp(landed["incoming"], "send")) as channel:
                for path, manifest in missing.values():
                    sets.send(channel, Bundle(path, Layout(manifest, b"")), progress=progress)
            landed = self.ask("land", *references)
        folders = [landed["folders"][reference] for reference in references]
        if not all(folders):
            raise TransferError("The other side does not find what was sent to it.", remedy="Run it again.")
        return [f if path.is_dir() else f"{f}/{path.name}" for f, path in zip(folders, paths, strict=True)]

    def fetch(self, job: str, to: Path, receipts: Path, progress: Progress) -> Receipt:
        """Bring a job's results here, into the new folder `to`."""
        packed = self.ask("pack", job)
        with Sftp(self._sftp(packed["outgoing"], "receive")) as channel:
            found = arrived(channel, packed["reference"])
            receipt = sets.receive(found, to, verify=lambda text, sig: "", receipts=receipts, progress=progress)
        self.ask("drop", packed["reference"])
        return receipt

    def _sftp(self, folder: str, direction: Direction) -> SftpDestination:
        return SftpDestination(
            kind="sftp", direction=direction, host=self.host, folder=folder, max_data_class=DataClass.BLACK
        )

    def _command(self, words: Sequence[str]) -> list[str]:
        return ssh.command(self.host, words=[shlex.join([self.program, *words])])

    def _failed(self, done: subprocess.CompletedProcess[str]) -> PermedError:
        for line in reversed(done.stderr.splitlines()):
            try:
                row = json.loads(line)
                kind = _KINDS.get(row["code"], errors.EngineError)
                return kind(f"There: {row['message']}", remedy=row["remedy"])
            except (ValueError, KeyError, TypeError):
                continue
        if done.returncode in (126, 127):
            return TransferError(
                "There is no `permed` on the other side's PATH.", remedy="Name it: --via ssh:HOST:/path/to/permed"
            )
        return ssh.reason(done.stderr, done.returncode)
