"""Code that nobody has vouched for, in a process that cannot write outside one folder nor reach any network.

    python -I -m permed_compute.workloads.radiology.sealed FOLDER READABLE… -- MODULE ARGUMENT…

The process seals itself while it still has one thread, before anything heavy is imported, then runs `MODULE.main`:

* Landlock (Linux ≥ 6.2): files are written below FOLDER only, and read there, below READABLE and where Python, its
  packages and the system's libraries lie. Not in home folders, not in /tmp, not in other processes' /proc.
* seccomp: no socket of any family, no io_uring (which could make one), no signal to another process, no tracing, no
  System V or POSIX queues and shared memory by key, no change of owner, mode, times or attributes of any file (Landlock
  does not cover those), no mounts, namespaces, keys, BPF or kernel modules.
* no_new_privs, no core files, no files above 64 GiB, an environment without the caller's variables.

Then it tries both: a socket and a file next to FOLDER must be refused, or it ends. Where the kernel lacks a piece, or
the processor is not an x86-64 (the numbers of system calls differ, and only those are tested), it ends too: nothing
runs half sealed. What it does not hold: time and memory (the caller's limits do), reading what is world-readable below
/usr, and side channels.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import socket
import struct
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from permed_compute.errors import EngineError

MARK = "PERMED_SEALED"
"""In the environment of a sealed process."""
UNSEALED = 97
"""Exit status: the process could not seal itself; nothing was run."""

_LEAST_LANDLOCK = 3  # truncation
_LARGEST_FILE = 64 << 30

# linux/landlock.h
_EXECUTE, _WRITE, _READ, _READ_DIR, _REFER, _TRUNCATE, _IOCTL = (
    1 << 0,
    1 << 1,
    1 << 2,
    1 << 3,
    1 << 13,
    1 << 14,
    1 << 15,
)
_REMOVE_DIR, _REMOVE, _MAKE_DIR, _MAKE_FILE, _MAKE_LINK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_LOOK = _EXECUTE | _READ | _READ_DIR
_CHANGE = _WRITE | _TRUNCATE | _REMOVE_DIR | _REMOVE | _MAKE_DIR | _MAKE_FILE | _MAKE_LINK | _REFER
_OF_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

_SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd",
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/version", "/proc/sys", "/proc/filesystems",
    "/proc/driver/nvidia", "/sys/devices", "/sys/fs/cgroup", "/sys/bus/pci", "/dev/zero", "/dev/urandom", "/dev/random",
)  # fmt: skip
_DEVICES = ("/dev/null", *(str(path) for path in Path("/dev").glob("nvidia*")))

# linux/audit.h, asm/unistd_64.h
_X86_64 = 0xC000003E
_DENIED = {
    "socket": 41, "connect": 42, "bind": 49, "io_uring_setup": 425, "ptrace": 101, "process_vm_readv": 310,
    "process_vm_writev": 311, "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424, "pidfd_getfd": 438, "shmget": 29, "shmat": 30, "semget": 64,
    "semop": 65, "msgget": 68, "msgsnd": 69, "mq_open": 240, "chmod": 90, "fchmod": 91, "fchmodat": 268,
    "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "setxattr": 188, "lsetxattr": 189,
    "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "setxattrat": 463,
    "removexattrat": 466, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280, "mount": 165,
    "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "mount_setattr": 442, "open_by_handle_at": 304, "add_key": 248,
    "request_key": 249, "keyctl": 250, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "init_module": 175,
    "finit_module": 313, "kexec_load": 246, "kexec_file_load": 320,
}  # fmt: skip


class UnsealedError(OSError):
    """The process cannot be sealed here."""


def seal(folder: Path, readable: Iterable[Path]) -> None:
    """Seal this process and all that it starts, for good. Raises `UnsealedError`."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnsealedError("sealing is tested on Linux on x86-64 only")
    if len(os.listdir("/proc/self/task")) != 1:  # noqa: PTH208 - names are enough
        raise UnsealedError("other threads run already and would stay unsealed")
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_FSIZE, _LARGEST_FILE)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise UnsealedError("no_new_privs is refused")
    _landlock(libc, folder, [*readable, *map(Path, _SYSTEM), *_python()])
    _seccomp(libc)
    _prove(folder)


def _limit(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))


def _python() -> list[Path]:
    """Where Python and its packages lie."""
    here = Path(__file__).resolve().parents[2]
    return [here, *(Path(place).resolve() for place in (sys.prefix, sys.base_prefix, *sys.path) if place)]


def _landlock(libc: ctypes.CDLL, folder: Path, readable: Iterable[Path]) -> None:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < _LEAST_LANDLOCK:
        raise UnsealedError(f"the kernel has Landlock version {max(version, 0)}, {_LEAST_LANDLOCK} is needed")
    files = (1 << (16 if version >= 5 else 15)) - 1
    tcp = 0b11 if version >= 4 else 0
    scopes = 0b11 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("QQQ", files, tcp, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        raise UnsealedError(f"Landlock refuses its rules ({os.strerror(ctypes.get_errno())})")
    rules = [(path, _LOOK) for path in readable] + [(Path(path), _READ | _WRITE | _IOCTL) for path in _DEVICES]
    for path, access in [*rules, (folder, _LOOK | _CHANGE)]:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what is not there needs no permission
        if not path.is_dir():
            access &= _OF_FILES
        rule = struct.pack("=Qi", access & files, opened)
        refused = libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
        os.close(opened)
        if refused:
            raise UnsealedError(f"Landlock refuses a rule ({os.strerror(ctypes.get_errno())})")
    if libc.syscall(_RESTRICT_SELF, ruleset, 0):
        raise UnsealedError(f"Landlock does not hold ({os.strerror(ctypes.get_errno())})")
    os.close(ruleset)


def _seccomp(libc: ctypes.CDLL) -> None:
    """Refuse the calls of `_DENIED` with EPERM; end the process on another architecture's calls."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    refuse, allow, kill = 0x00050000 | errno.EPERM, 0x7FFF0000, 0x80000000
    lines = [(load, 0, 0, 4), (equal, 1, 0, _X86_64), (give, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # x32: other numbers for the same calls
    for number in _DENIED.values():
        lines += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    lines.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    if libc.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise UnsealedError(f"seccomp is refused ({os.strerror(ctypes.get_errno())})")


def _prove(folder: Path) -> None:
    beside = folder.parent / f".beside-{os.getpid()}"
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        raise UnsealedError("a socket can still be opened")
    except PermissionError:
        pass
    try:
        beside.touch()
    except PermissionError:
        return
    beside.unlink()
    raise UnsealedError("a file outside the folder can still be written")


def environment(folder: Path, threads: int) -> dict[str, str]:
    """Variables for a sealed process: nothing of the caller's, which may hold tokens."""
    kept = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH") if name in os.environ}
    threading = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    places = {name: str(folder) for name in ("HOME", "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")}
    marks = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", MARK: "1"}
    return {**marks, **kept, **threading, **places}


def cannot(log: Path) -> EngineError:
    """What to say of a process that ended with `UNSEALED`. log: what it wrote to stderr."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    reason = next((line for line in lines if line.startswith("not sealed: ")), "not sealed")
    return EngineError(
        f"This machine cannot seal code that nobody vouches for ({reason.removeprefix('not sealed: ')}).",
        remedy="Run where Linux is 6.2 or later on x86-64, or let an operator allow the bundle's digest.",
    )


def main(arguments: list[str]) -> int:
    parting = arguments.index("--")
    folder, *readable = (Path(each) for each in arguments[:parting])
    module, *rest = arguments[parting + 1 :]
    try:
        seal(folder, readable)
    except OSError as reason:
        sys.stderr.write(f"not sealed: {reason}\n")
        return UNSEALED
    return int(import_module(module).main(rest) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
