"""A Slurm of our own on this machine: munged, slurmctld, a slurmd per node; on request slurmdbd on a MariaDB.

    with SlurmCluster() as slurm, slurm.inside():
        subprocess.run(["sbatch", "--wrap", "hostname"])

Everything listens on loopback, stands in one temporary folder, and is ended with it. Nodes may be declared larger than
the machine (`config_overrides`): what they bill and refuse is real Slurm's word, what runs on them shares this machine.
Partitions: `main` (default), and `optimist`, which gives way to it: SIGTERM, `grace_s`, SIGKILL, requeued.
Needs Debian's `slurm-wlm` and `munge`; `accounting` also `slurmdbd` and `mariadb-server`.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from permed_compute.errors import EngineError, NotFoundError
from permed_compute.testing.ports import free_port

_START_S = 60.0
_PR_SET_PDEATHSIG = 1
_STAGING = """
local function copy(script, way)
  for line in io.lines(script) do
    local from, to = line:match("^#STAGE%s+" .. way .. "%s+(%S+)%s+(%S+)%s*$")
    if from then
      local ok, _, code = os.execute("mkdir -p '" .. to .. "' && cp -a '" .. from .. "/.' '" .. to .. "'")
      if not (ok == true or ok == 0) then return slurm.ERROR, "cannot copy " .. from end
    end
  end
  return slurm.SUCCESS, ""
end
function slurm_bb_data_in(id, script) return copy(script, "IN") end
function slurm_bb_data_out(id, script) return copy(script, "OUT") end
function slurm_bb_pools() return slurm.SUCCESS, "" end
function slurm_bb_get_status() return slurm.SUCCESS, "" end
for _, name in ipairs({"job_process", "job_teardown", "setup", "test_data_in", "real_size", "paths", "pre_run",
                       "post_run", "test_data_out"}) do
  _G["slurm_bb_" .. name] = function() return slurm.SUCCESS, "" end
end
"""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
_WITH_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")


@dataclass(frozen=True, slots=True)
class SlurmNode:
    """What a node says of itself. memory in MiB."""

    name: str
    cpus: int = 2
    memory: int = 16_000
    gpus: int = 0


class SlurmCluster:
    """Raises `NotFoundError` where the machine lacks the programs.

    weights: `TRESBillingWeights` of both partitions. kill_wait_s: between SIGTERM and SIGKILL of what is cancelled or
    out of time. staging: `#STAGE IN FROM TO` and `#STAGE OUT FROM TO` in a job's script copy what is in a folder, by
    Slurm's own burst buffer plug-in and a Lua script of ours. lines: more of slurm.conf.
    """

    def __init__(
        self, nodes: Sequence[SlurmNode] = (SlurmNode("n1"),), *, accounting: bool = False, weights: str = "",
        kill_wait_s: int = 30, grace_s: int = 30, staging: bool = False, lines: Sequence[str] = (),
    ) -> None:  # fmt: skip
        missing = [name for name in _PROGRAMS + _WITH_ACCOUNTING * accounting if _program(name) is None]
        if missing:
            raise NotFoundError(
                f"{missing[0]} is not on this machine.",
                remedy="Debian: apt-get install slurm-wlm munge slurmdbd mariadb-server.",
            )
        self.nodes, self.accounting, self.staging = tuple(nodes), accounting, staging
        self._weights, self._kill_wait_s, self._grace_s, self._lines = weights, kill_wait_s, grace_s, tuple(lines)
        self.folder = Path()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands, and whoever calls them, need."""
        return {"SLURM_CONF": str(self.conf)}

    def __enter__(self) -> SlurmCluster:
        self.folder = Path(tempfile.mkdtemp(prefix="permed-slurm-"))
        self.folder.chmod(0o755)  # munged insists that everybody may reach its socket's folder
        try:
            self._start_munge()
            self._write_conf()
            if self.staging:
                self._write_staging()
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            for node in self.nodes:
                self._daemon(f"slurmd-{node.name}", "slurmd", "-D", "-N", node.name)
            self._until(self._all_idle, "every node is idle")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """With this Slurm's variables in this process's environment."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def site_file(self, partition: str = "main", factors: str = "{cpu: 1, memory_gib: 0.2577031}") -> Path:
        """A site's profile of this Slurm, for `--site`; `partition` is its default one."""
        kinds = ", ".join(
            f"{{count: 1, cpus: {node.cpus}, memory_gib: {node.memory / 1024}, gpus: {node.gpus}"
            + (", gpu: h100-80gb}" if node.gpus else "}")
            for node in self.nodes
        )
        rows = [
            "name: loopback", "operator: a Slurm on this machine",
            "sources: {ours: {page: what the test says, checked: 2026-11-22, verified: false}}",
            "scheduler: {kind: slurm, launcher: srun, memory_option: mem, required: [account, time], source: ours}",
            f"machine: {{arch: {platform.machine()}, source: ours}}", 'place: {country: "NO", eea: true, source: ours}',
            "data: {max_class: red, source: ours}", "egress: {kind: none, source: ours}",
            "billing: {unit: billing hour, floor: true, source: ours}",
            *(['staging: {directive: "#STAGE", source: ours}'] if self.staging else []), "partitions:",
            *(
                f"  {name}: {{default: {str(name == partition).lower()}, nodes: [{kinds}],"
                f" charge: {{factors: {factors}, source: ours}}, source: ours}}"
                for name in ("main", "optimist")
            ),
            "",
        ]  # fmt: skip
        file = self.folder / f"site-{partition}.yaml"
        file.write_text("\n".join(rows))
        return file

    def run(self, *command: str, timeout_s: float = 30.0) -> str:
        """What one of Slurm's commands prints. Raises `EngineError` where it fails."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
        if done.returncode:
            raise EngineError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def start_controller(self) -> None:
        """slurmctld, with the state that the last one left; until it answers."""
        self._daemon("slurmctld", "slurmctld", "-D")
        self._until(lambda: "UP" in self.run("scontrol", "ping"), "slurmctld answers")

    def stop_controller(self) -> None:
        """End slurmctld; what runs goes on without it."""
        self._end("slurmctld")

    def start_controller_unless_up(self) -> None:
        if "slurmctld" not in self._daemons:
            self.start_controller()

    def strangers(self) -> list[str]:
        """Command lines of processes that this Slurm's jobs have left behind them."""
        ours = {daemon.pid for daemon in self._daemons.values()}
        left = [Path(f"/proc/{pid}/cmdline") for pid in self._processes() if pid not in ours]
        lines = [line.read_bytes().replace(b"\0", b" ").decode(errors="replace") for line in left if line.exists()]
        return [line for line in lines if line and not line.startswith("slurm")]

    def close(self) -> None:
        """End all jobs, all daemons, and whatever they have left."""
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=os.environ | self.environment, check=False,
                           capture_output=True, timeout=20)  # fmt: skip
        for name in reversed(list(self._daemons)):
            self._end(name)
        deadline = time.monotonic() + 10
        while (left := self._processes()) and time.monotonic() < deadline:
            for pid in left:
                _kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------- daemons

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._daemon(
            "munged", "munged", "--foreground", f"--socket={self._munge}", f"--key-file={key}",
            *(f"--{what}-file={folder / what}" for what in ("pid", "log", "seed")),
        )  # fmt: skip
        self._until(self._munge.exists, "munged has its socket")

    @property
    def _munge(self) -> Path:
        return self.folder / "munge" / "socket"

    def _start_accounting(self) -> None:
        data, port, password = self.folder / "mariadb", free_port(), secrets.token_hex(16)
        data.mkdir(mode=0o700)
        me = getpass.getuser()
        self._once("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={me}", "--skip-test-db",
                   "--auth-root-authentication-method=normal")  # fmt: skip
        begin = self.folder / "begin.sql"
        begin.touch(mode=0o600)
        begin.write_text(
            f"CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{password}';\nGRANT ALL ON *.* TO slurm@'127.0.0.1';\n"
        )
        self._daemon(
            "mariadbd", "mariadbd", "--no-defaults", f"--datadir={data}", f"--user={me}", f"--port={port}",
            "--bind-address=127.0.0.1", f"--socket={self.folder / 'mariadb.sock'}", f"--init-file={begin}",
            "--skip-name-resolve",
        )  # fmt: skip
        self._until(lambda: _answers(port), "MariaDB answers")
        conf = self.folder / "slurmdbd.conf"
        conf.touch(mode=0o600)
        conf.write_text("\n".join([
            "AuthType=auth/munge", f"AuthInfo=socket={self._munge}", "DbdHost=localhost", "DbdAddr=127.0.0.1",
            f"DbdPort={self._dbd_port}", "StorageType=accounting_storage/mysql", "StorageHost=127.0.0.1",
            f"StoragePort={port}", "StorageUser=slurm", f"StoragePass={password}", "StorageLoc=slurm_acct",
            f"SlurmUser={me}", f"LogFile={self.folder / 'slurmdbd.log'}", f"PidFile={self.folder / 'slurmdbd.pid'}", "",
        ]))  # fmt: skip
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._until(lambda: _answers(self._dbd_port), "slurmdbd answers")

    def _write_conf(self) -> None:
        me, host = getpass.getuser(), socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (self.folder / name).mkdir(mode=0o755)
        self._dbd_port = free_port()
        billing = f" TRESBillingWeights={self._weights}" if self._weights else ""
        rows = [
            "ClusterName=permed", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={free_port()}",
            "AuthType=auth/munge", "CredType=cred/munge", f"AuthInfo=socket={self._munge},cred_expire=5",
            "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny", f"SlurmUser={me}", f"SlurmdUser={me}",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "MpiDefault=none", "GresTypes=gpu",
            "SchedulerType=sched/backfill", "SchedulerParameters=bf_interval=1,sched_min_interval=100000",
            "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core_Memory", "SlurmdParameters=config_overrides",
            "PriorityType=priority/multifactor", "PriorityFlags=MAX_TRES", "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE", "JobRequeue=1", "MessageTimeout=3", "ReturnToService=2",
            f"KillWait={self._kill_wait_s}",
            "JobAcctGatherType=jobacct_gather/none", f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmdSpoolDir={self.folder / 'spool'}/%n", f"SlurmctldPidFile={self.folder / 'slurmctld.pid'}",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid", f"SlurmctldLogFile={self.folder / 'slurmctld.log'}",
            f"SlurmdLogFile={self.folder}/slurmd-%n.log", *self._lines,
        ]  # fmt: skip
        if self.staging:
            rows.append("BurstBufferType=burst_buffer/lua")
        if self.accounting:
            rows += ["AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageHost=127.0.0.1",
                     f"AccountingStoragePort={self._dbd_port}", f"AccountingStoragePass={self._munge}"]  # fmt: skip
        rows += [
            f"NodeName={node.name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={node.cpus}"
            f" RealMemory={node.memory}" + (f" Gres=gpu:{node.gpus}" if node.gpus else "") + " State=UNKNOWN"
            for node in self.nodes
        ]
        rows += [
            f"PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF{billing}",
            f"PartitionName=optimist Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={self._grace_s}{billing}",
            "",
        ]
        self.conf.write_text("\n".join(rows))
        # slurmd counts a GPU only where it has a file; that nobody opens it is no matter where none is fenced off.
        for number in range(max(node.gpus for node in self.nodes)):
            (self.folder / f"gpu{number}").touch()
        gpus = [
            f"NodeName={node.name} Name=gpu File={self.folder}/gpu[0-{node.gpus - 1}]"
            for node in self.nodes
            if node.gpus
        ]
        (self.folder / "gres.conf").write_text("\n".join([*gpus, ""]))

    def _write_staging(self) -> None:
        (self.folder / "burst_buffer.conf").write_text("Directive=STAGE\n")
        (self.folder / "burst_buffer.lua").write_text(_STAGING)

    def _daemon(self, name: str, program: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [_program(program) or program, *words], env=os.environ | self.environment, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _once(self, program: str, *words: str) -> None:
        done = subprocess.run([_program(program) or program, *words], cwd=self.folder, capture_output=True, text=True,
                              check=False, timeout=_START_S)  # fmt: skip
        if done.returncode:
            raise EngineError(f"{program}: {done.stderr.strip()[-500:]}")

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _until(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                if true():
                    return
            except (EngineError, subprocess.TimeoutExpired):
                pass  # not yet
            dead = next((name for name, daemon in self._daemons.items() if daemon.poll() is not None), "")
            if dead or time.monotonic() > deadline:
                raise EngineError(f"Waited in vain until {what}{f'; {dead} has ended' if dead else ''}: {self.words()}")
            time.sleep(0.05)

    def _all_idle(self) -> bool:
        return self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split() == [
            "idle" for _ in self.nodes
        ]

    def words(self) -> str:
        """The last lines of every daemon's log, for a failure's message."""
        logs = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log"), *self.folder.glob("munge/log")])
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in logs if log.stat().st_size)

    def _processes(self) -> list[int]:
        """Whoever has this Slurm's configuration in its environment, but this process."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


def possible(*, accounting: bool = False) -> bool:
    """Whether this machine has the programs."""
    return all(_program(name) for name in _PROGRAMS + _WITH_ACCOUNTING * accounting)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_SBIN))


def _end_with_parent() -> None:
    """Between fork and exec: a test that is killed leaves no Slurm behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _answers(port: int) -> bool:
    with socket.socket() as made:
        made.settimeout(1.0)
        return made.connect_ex(("127.0.0.1", port)) == 0
