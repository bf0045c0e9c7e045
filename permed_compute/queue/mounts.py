"""Which file system a path lies on. SQLite's WAL shares memory between processes: on a network it corrupts."""

from __future__ import annotations

import re
from pathlib import Path

from permed_compute.errors import QueueError

NETWORK = frozenset({
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs",
    "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "wekafs",
    "fuse.beegfs", "fuse.ceph", "fuse.ceph-fuse", "fuse.cvmfs", "fuse.davfs2", "fuse.gcsfuse", "fuse.glusterfs",
    "fuse.goofys", "fuse.juicefs", "fuse.mfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs",
})  # fmt: skip
"""File system types, as /proc/self/mountinfo calls them, that several machines may share."""


def filesystem(path: Path, mountinfo: str | None = None) -> tuple[str, str]:
    """(mount point, type) of the mount that holds `path`, which need not exist; ("", "") where nobody can say."""
    if mountinfo is None:
        try:
            mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return "", ""
    path = path.resolve()
    best = ("", "")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")[0]
        if len(fields) < 5:
            continue
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
        # Of two mounts on one point the later hides the earlier.
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best


def refuse_network(path: Path, mountinfo: str | None = None) -> None:
    """Raise `QueueError` where `path` lies on a file system that machines share."""
    point, kind = filesystem(path, mountinfo)
    if kind in NETWORK:
        raise QueueError(
            f"{path} lies on {kind} (mounted at {point}), where SQLite's write-ahead log can be corrupted.",
            remedy="Set PERMED_HOME to a local disk, or queue_url to a PostgreSQL database.",
        )
