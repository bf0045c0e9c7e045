"""What runs on a worker: a `Member` loads the workload's model once, keeps it, and works parts off; or trains one rank.

Executors differ only in where members live: threads of this process, or Ray actors. Everything that crosses between
driver and member is plain JSON-able rows, so that no executor's pickling decides what a workload may return.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from permed_compute.errors import (
    EngineError,
    Finding,
    PermedError,
    RefusedInput,
    StaleError,
    StoppedError,
    WorkloadError,
)
from permed_compute.execution import gang
from permed_compute.execution.context import WorkerContext, check_fence, pseudonym_key
from permed_compute.execution.port import Attempt
from permed_compute.execution.records import Records
from permed_compute.offline import silenced
from permed_compute.paths import AttemptPaths, HomePaths
from permed_compute.queue.port import wall_clock
from permed_compute.states import PartState
from permed_compute.storage.digests import DigestCache
from permed_compute.storage.ledger import Ledger
from permed_compute.workloads import registry
from permed_compute.workloads.port import Gang, Map, Part, Result, as_json

Row = dict[str, Any]


class WorkerLost(PermedError):  # noqa: N818 - what happened, in the words of `permed why`
    """A member's process is gone, or was ended for what it did; `code` says which (`failure.REASONS`)."""

    code = "worker-lost"

    def __init__(self, message: str, *, code: str = "worker-lost", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class Crew(Protocol):
    """The members of one attempt, by slot 0 … size-1, wherever they live."""

    size: int

    def start(self, slot: int, call: str, row: Row) -> Future[Row]:
        """Begin `Member.<call>(row)` (`part` or `rank`). A lost member raises `WorkerLost` through the future."""
        ...

    def restart(self, slot: int) -> None:
        """A fresh member in that slot, after its loss."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Peak resident memory (`rss_peak_mib`), CPU seconds (`cpu_s`) of all members so far; engine facts."""
        ...

    def use(self) -> Mapping[str, Any]:
        """What the members use now, for `live.Meter`. Cheap; from any thread."""
        ...

    def close(self) -> None: ...


class Member:
    """One worker of an attempt.

    isolated: it has a process of its own, so it may set that process's GPU visibility and thread counts.
    address: of its node, where members of other nodes reach it.
    """

    def __init__(
        self, root: str, slot: int, *, isolated: bool, dask_get: Callable[..., Any] | None = None, gpu_env: str = "",
        address: str = gang.LOOPBACK,
    ) -> None:  # fmt: skip
        attempt = Attempt.read(AttemptPaths(Path(root)))
        if attempt is None:
            raise WorkloadError(f"There is no launch record of attempt {Path(root).name}.")
        self.attempt, self.slot, self.isolated, self._address = attempt, slot, isolated, address
        grant = attempt.grants[slot]
        self.threads = max(1, grant.cpu_milli // 1000)
        self._dask_get = dask_get
        self.device = self._claim_device(grant.flavor, grant.devices, gpu_env)
        if isolated:  # a Ray that somebody else has started gave it whatever environment that one had
            os.environ.update(silenced(os.environ))
        self._limit_threads()
        self._model: Any = None
        self._model_ready = False
        self._run_lock = threading.Lock()
        self._model_lock = threading.Lock()
        self._cache_lock = threading.Lock()
        self._map: Map | None = None

    # ------------------------------------------------------------------------------------- map

    def part(self, row: Row) -> Row:
        """Load, run and publish one part. Two calls may be under way: one loads while the other runs.

        row: part (as `part_row`) and its key. Returns name, key, slot, state, seconds, started (ms), the part's own
        records, and for FAILED code, reason, remedy. Exceptions of the workload become FAILED rows; a part that gave up
        because it was asked to is WAITING.
        """
        part = part_of(row["part"])
        records: list[Row] = []
        ledger = Ledger(self.attempt_home.ledger, self.attempt.spec.scope())
        writer = f"{self.attempt.job_id}.{self.attempt.number}"
        out = ledger.begin(row["key"], writer)
        ctx = self._context(0, 1).for_part(row["key"], out, lambda kind, **v: records.append({"kind": kind, **v}))
        started = wall_clock()
        clock = time.perf_counter()
        base: Row = {"name": part.name, "key": row["key"], "slot": self.slot, "started": started}
        try:
            values, findings, state = self._compute(part, ctx)
            check_fence(self.attempt.paths)
            record = {
                "state": state.value, "subject": part.subject, "part": part.name, "values": values,
                "findings": findings, "writer": writer, "at": wall_clock(),
                "seconds": round(time.perf_counter() - clock, 4),
            }  # fmt: skip
            entry, first = ledger.publish(row["key"], out, record)
            base |= {"state": entry.record["state"], "first": first}
        except StaleError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a part's failure must not stop the others
            shutil.rmtree(out, ignore_errors=True)
            if isinstance(error, StoppedError) and ctx.should_stop():
                base |= {"state": PartState.WAITING.value}
            else:
                base |= {"state": PartState.FAILED.value, **_reason(error)}
                ctx.log(f"part {part.name} failed: {traceback.format_exc(limit=-8)}")
        finally:
            ctx.digests.save()
        return base | {"seconds": round(time.perf_counter() - clock, 4), "records": records}

    def _compute(self, part: Part, ctx: WorkerContext) -> tuple[Mapping[str, Any], list[Row], PartState]:
        work = self._workload()
        try:
            data = work.load(part, ctx)
            model = self._loaded_model(work, ctx)
            data = work.prepare(data, model, ctx)
            with self._run_lock:
                if ctx.should_stop():  # while another part ran and this one was loaded
                    raise StoppedError("The attempt was asked to stop before the part began.")
                done = work.run(data, model, ctx)
            del data  # what was loaded need not last until all is written
            result = work.finish(done, ctx)
        except RefusedInput as refused:
            # Deterministic: remembered in the ledger, so that the same bytes are not read again to be refused again.
            return {"reason": str(refused)}, [refused.finding.as_dict()], PartState.REFUSED
        return as_json(result.values), [finding.as_dict() for finding in result.findings], PartState.DONE

    def _loaded_model(self, work: Map, ctx: WorkerContext) -> Any:
        """By the first part that asks; the others wait."""
        with self._model_lock:
            if not self._model_ready:
                with ctx.stage("model"):
                    self._model = work.model(self.attempt.spec, self._context(0, 1))
                self._model_ready = True
            return self._model

    def _workload(self) -> Map:
        if self._map is None:
            work = registry.find(self.attempt.spec).workload
            if not isinstance(work, Map):
                raise WorkloadError(f"{self.attempt.spec.workload} is not a map.")
            self._map = work
        return self._map

    # ------------------------------------------------------------------------------------- gang

    def rank(self, row: Row) -> Row:
        """Train as one rank. row: out (staging folder of the results), world, known (checkpoints, newest first).

        Returns rank 0's result, or stopped. A collective that breaks because another rank is gone raises `WorkerLost`
        with the code `peer-lost`: not this rank's fault.
        """
        work = registry.find(self.attempt.spec).workload
        if not isinstance(work, Gang):
            raise WorkloadError(f"{self.attempt.spec.workload} is not a gang.")
        records = Records(self.attempt.paths.records(f"rank-{self.slot}"))
        ctx = self._context(self.slot, row["world"])
        ctx.out, ctx.emit, ctx.known = Path(row["out"]), records.write, tuple(row["known"])
        ctx.terminated = gang.TERMINATION.asked
        try:
            with gang.TERMINATION:
                self._join(ctx, row["world"])
                result = work.train(self.attempt.spec, ctx)
                ctx.settle()
        except (Exception, SystemExit) as error:
            ctx.log(f"rank {self.slot} failed: {traceback.format_exc(limit=-8)}")
            if isinstance(error, PermedError):
                raise
            if row["world"] > 1 and gang.is_of_a_peer(error):
                raise WorkerLost(f"Rank {self.slot} lost its peers.", code="peer-lost") from None
            raise _rank_failed(self.slot, error) from None
        finally:
            gang.leave()
            records.close()
            ctx.digests.save()
        if result is None:
            return {"stopped": True}
        return {"stopped": False, "result": result_row(result) if self.slot == 0 else None}

    def _join(self, ctx: WorkerContext, world: int) -> None:
        if world > 1:
            alone = len({grant.node for grant in self.attempt.grants}) == 1
            ctx.collective = gang.join(
                self.attempt.paths.root / "rendezvous", self.slot, world, gpu=self.device.startswith("cuda"),
                address=gang.LOOPBACK if alone else self._address,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------- both

    @property
    def attempt_home(self) -> HomePaths:
        return HomePaths(self.attempt.home)

    def _context(self, rank: int, world: int) -> WorkerContext:
        scratch = self.attempt.paths.scratch / f"slot-{self.slot}"
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        return make_context(
            self.attempt, emit=lambda *a, **k: None, device=self.device, threads=self.threads, scratch=scratch,
            rank=rank, world=world, dask_get=self._dask_get,
        )  # fmt: skip

    def _claim_device(self, flavor: str, devices: tuple[int, ...], gpu_env: str) -> str:
        if flavor == "cpu":
            if self.isolated:
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
            return "cpu"
        if self.isolated:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu_env or ",".join(map(str, devices))
            return "cuda:0"
        return f"cuda:{devices[0]}"

    def _limit_threads(self) -> None:
        if self.isolated:
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
                os.environ[name] = str(self.threads)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(self.threads)


def make_context(
    attempt: Attempt, *, emit: Callable[..., None], device: str, threads: int, scratch: Path,
    rank: int = 0, world: int = 1, dask_get: Callable[..., Any] | None = None, out: Path | None = None,
) -> WorkerContext:  # fmt: skip
    """A context for one user of the attempt: a member, or the driver for plan and reduce."""
    home = HomePaths(attempt.home)
    return WorkerContext(
        spec=attempt.spec, home=home, paths=attempt.paths, emit=emit, digests=DigestCache(home.cache),
        salt=pseudonym_key(home), device=device, rank=rank, world=world, seed=attempt.spec.seed, threads=threads,
        scratch=scratch, out=out or scratch, get=dask_get,
    )  # fmt: skip


def _rank_failed(slot: int, error: BaseException) -> EngineError:
    failed = EngineError(f"Rank {slot}: {type(error).__name__}.", remedy="See `permed logs`.")
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it fitted when it was tried (`learning.training.fitting`)
        failed = EngineError(
            f"Rank {slot} ran out of GPU memory.", remedy="Make the batch smaller, or ask for more (gpu_memory)."
        )
        failed.code = "device-memory"
    return failed


def usage() -> Row:
    """Peak resident memory and CPU seconds of this process and its ended children."""
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "rss_peak_mib": max(mine.ru_maxrss, children.ru_maxrss) // 1024,
        "cpu_s": round(mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime, 2),
    }


def _reason(error: BaseException) -> Row:
    """A part's failure as a row. A foreign error's text may quote file names: only its kind leaves the log."""
    if isinstance(error, PermedError):
        return {"code": error.code, "reason": error.message, "remedy": error.remedy}
    code = "out-of-memory" if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ else "code-error"
    return {"code": code, "reason": f"{type(error).__name__} in the workload", "remedy": "See `permed logs`."}


def part_row(part: Part) -> Row:
    """A part as it travels."""
    return {
        "name": part.name, "inputs": list(part.inputs), "params": dict(part.params), "sources": list(part.sources),
        "subject": part.subject,
    }  # fmt: skip


def part_of(row: Mapping[str, Any]) -> Part:
    return Part(row["name"], tuple(row["inputs"]), row["params"], tuple(row["sources"]), row["subject"])


def result_row(result: Result) -> Row:
    """A result as it travels and as `result.json` starts."""
    return {
        "values": dict(result.values), "metrics": dict(result.metrics),
        "figures": [list(figure) for figure in result.figures],
        "findings": [finding.as_dict() for finding in result.findings],
    }  # fmt: skip


def result_of(row: Mapping[str, Any]) -> Result:
    findings = [Finding(f["code"], f["sentence"], f["severity"], f["about"], f["numbers"]) for f in row["findings"]]
    return Result(row["values"], row["metrics"], [(name, caption) for name, caption in row["figures"]], findings)
