"""From a declared destination to a channel: the one place that knows which kinds there are."""

from __future__ import annotations

from pathlib import Path

from permed_compute.transfer.destinations import Destination, FolderDestination, SftpDestination
from permed_compute.transfer.folder import Folder
from permed_compute.transfer.port import Channel


def channel(entry: Destination, spool: Path) -> Channel:
    """The channel of that destination, not opened yet. `spool`: a private folder, for channels that send files."""
    if isinstance(entry, FolderDestination):
        return Folder(Path(entry.path))
    if isinstance(entry, SftpDestination):
        from permed_compute.transfer.sftp import Sftp

        return Sftp(entry)
    from permed_compute.transfer.tsd import Tsd

    return Tsd(entry, spool)
