"""One attempt from plan to exit record, on whatever crew the executor gives.

map:   plan → parts (reused from the ledger, or handed to members as they free up) → reduce → the next round, or results
gang:  all ranks together → results

The driver writes the attempt's records, its results folder and, last, its exit record. It opens no database.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from permed_compute.errors import Finding, ModelRefusedError, PermedError, StaleError, WorkloadError
from permed_compute.execution import failure, results
from permed_compute.execution.context import WorkerContext, check_fence
from permed_compute.execution.delegated import paused_file, pauses
from permed_compute.execution.live import Far, Meter, steps_of
from permed_compute.execution.port import Attempt
from permed_compute.execution.records import Records
from permed_compute.execution.worker import Crew, Row, WorkerLost, make_context, part_row, result_of
from permed_compute.paths import AttemptPaths, HomePaths, read_json, write_json
from permed_compute.queue.port import wall_clock
from permed_compute.states import PartState
from permed_compute.storage import checkpoints
from permed_compute.storage.ledger import Ledger, part_key
from permed_compute.workloads import registry
from permed_compute.workloads.port import DonePart, Gang, Map, Next, Part, Result, as_json

_BEAT_S = 2.0
_LAST_WORDS_S = 20.0
"""How long the others of a broken gang may take to say why, once one has lost them."""
_IN_FLIGHT = 2  # per member: one runs, the next one loads


class _StoppedEarly(Exception):  # noqa: N818 - not an error: the attempt did as it was asked
    """The attempt was asked to stop and has come to a point from which it can go on."""


def drive(paths: AttemptPaths, make_crew: Callable[[Attempt], Crew], engine: Mapping[str, Any]) -> None:
    """Run the attempt and write its exit record. Never raises: how it ended is the record's business.

    `engine` is what the executor says of itself, for the manifest.
    """
    records = Records(paths.records())
    records.write("started")
    done = threading.Event()
    threading.Thread(target=_beat, args=(records, done), name="permed-heartbeat", daemon=True).start()
    ending: Row
    try:
        attempt = Attempt.read(paths)
        if attempt is None:
            raise WorkloadError("The attempt has no launch record.")
        ending = _Drive(attempt, records, make_crew, engine).run()
    except StaleError as error:
        ending = {"outcome": "SUPERSEDED", "reason": error.code, "sentence": error.message}
    except _StoppedEarly:
        ending = {"outcome": "STOPPED", "reason": "stopped", "sentence": "It stopped where it can go on."}
    except WorkerLost as error:
        ending = {"outcome": "LOST", "reason": error.code, "sentence": error.message, "remedy": error.remedy}
    except PermedError as error:
        ending = {"outcome": "FAILED", "reason": error.code, "sentence": error.message, "remedy": error.remedy}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises ends this attempt, not the controller
        records.write("log", text=traceback.format_exc(limit=-12))
        sentence = f"{type(error).__name__} in the workload's plan, reduce or training."
        ending = {"outcome": "FAILED", "reason": "code-error", "sentence": sentence, "remedy": "See `permed logs`."}
    done.set()
    paused = ending["outcome"] == "STOPPED" and pauses(paths)
    write_json(paused_file(paths) if paused else paths.exit, {**ending, "at": wall_clock()})
    records.write("ended", outcome=ending["outcome"])
    records.close()


def _beat(records: Records, done: threading.Event) -> None:
    while not done.wait(_BEAT_S):
        records.beat()


@dataclass(slots=True)
class _Task:
    """A part that is not finished yet."""

    part: Part
    key: str
    failures: int = 0
    losses: int = 0
    alone: bool = False
    """It was in flight when a member was lost: run nothing beside it, so that the next loss has one suspect."""


@dataclass(slots=True)
class _Drive:
    attempt: Attempt
    records: Records
    make_crew: Callable[[Attempt], Crew]
    engine: Mapping[str, Any]
    stages: dict[str, float] = field(default_factory=dict)
    findings: list[Row] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    part_rows: dict[str, Row] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    planned: int = 0
    computed: int = 0

    def run(self) -> Row:
        check_fence(self.attempt.paths)  # a launch that came late, of an attempt that was given up
        found = registry.find(self.attempt.spec)
        self._ledger().abandon(self.attempt.job_id)  # of an attempt that was killed; the fence keeps it from writing
        staging = self.attempt.paths.root / "results.new"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, mode=0o700)
        scratch = self.attempt.paths.scratch / "driver"
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        ctx = make_context(
            self.attempt, emit=self._fold, device="cpu", threads=max(1, self.attempt.grants[0].cpu_milli // 1000),
            scratch=scratch, out=staging,
        )  # fmt: skip
        crew = self.make_crew(self.attempt)
        try:
            if isinstance(found.workload, Map):
                with Meter(self.records, crew.use, self._far):
                    result, model = self._map(found, found.workload, ctx, crew)
            else:
                with Meter(self.records, crew.use, lambda: steps_of(self.attempt.paths)):
                    result, model = self._gang(found.workload, ctx, crew), ""
            used = crew.facts()
        finally:
            crew.close()
            shutil.rmtree(self.attempt.paths.scratch, ignore_errors=True)
            self._ledger().abandon(self.attempt.job_id)
        ctx.digests.save()
        if result is not None:
            result = replace(result, values=as_json(result.values), metrics=as_json(result.metrics))
        return results.publish(
            self.attempt, staging, result=result, parts=list(self.part_rows.values()), findings=self.findings,
            metrics=self.metrics, stages=self.stages, used=used, engine=self.engine, version=found.version,
            code_digest=found.code_digest, model_digest=model, began=self.began,
        )  # fmt: skip

    def _far(self) -> Far:
        return Far(len(self.part_rows), self.planned, self.computed)

    def _ledger(self) -> Ledger:
        return Ledger(HomePaths(self.attempt.home).ledger, self.attempt.spec.scope())

    def _fold(self, kind: str, **values: Any) -> None:
        """Take a record of the driver itself or of a part."""
        if kind == "stage":
            self.stages[values["name"]] = self.stages.get(values["name"], 0.0) + values["seconds"]
        elif kind == "finding":
            self.findings.append(values)
        elif kind == "metric":
            self.metrics.append(values | {"t": wall_clock()})
        self.records.write(kind, **values)

    # ------------------------------------------------------------------------------------- map

    def _map(self, found: registry.Found, work: Map, ctx: WorkerContext, crew: Crew) -> tuple[Result | None, str]:
        spec = self.attempt.spec
        state_file = self.attempt.paths.job.state / "round.json"
        saved = read_json(state_file) or {"round": 0, "state": {}}
        model = work.model_digest(spec, ctx)
        if self.attempt.model and model != self.attempt.model:
            raise ModelRefusedError(
                f"The model has become another ({model[:16]}) since {self.attempt.model[:16]} was cleared for care.",
                rule="model-changed", remedy="Put the validated one back, then `permed resume`.",
            )  # fmt: skip
        while True:
            with ctx.stage("plan"):
                parts = _named_once(list(work.plan(spec, saved["state"], ctx)))
            ctx.digests.save()
            done = self._parts(parts, found, model, crew, ctx)
            if parts and not done:
                return None, model
            bad = (row for row in self.part_rows.values() if row["state"] in (PartState.FAILED, PartState.REFUSED))
            ctx.missed = {row["name"]: row.get("reason", "") for row in bad}
            with ctx.stage("reduce"):
                result = work.reduce(done, saved["state"], ctx)
            if isinstance(result, Result):
                return result, model
            if not isinstance(result, Next):
                raise WorkloadError(f"reduce returned {type(result).__name__}; it must return Result or Next.")
            saved = {"round": saved["round"] + 1, "state": as_json(result.state)}
            write_json(state_file, saved)
            self.records.write("round", round=saved["round"])

    def _parts(
        self, parts: list[Part], found: registry.Found, model: str, crew: Crew, ctx: WorkerContext
    ) -> list[DonePart]:
        ledger = self._ledger()
        waiting: deque[_Task] = deque()
        self.part_rows, self.planned = {}, len(parts)
        keys: dict[str, str] = {}
        for part in parts:
            key = part_key(
                inputs=part.inputs, params=part.params, model=model, workload=self.attempt.spec.workload,
                version=found.version, variant="eager-float32", seed=self.attempt.spec.seed,
            )  # fmt: skip
            keys[part.name] = key
            entry = ledger.find(key)
            if entry is None:
                waiting.append(_Task(part, key))
            else:
                refused = entry.record["state"] == PartState.REFUSED
                state = PartState.REFUSED if refused else PartState.REUSED
                self._settle({"name": part.name, "key": key, "state": state.value, "seconds": 0.0, "reused": True})
        self.records.write("plan", parts=len(parts), known=len(parts) - len(waiting))
        if waiting:
            _Handout(self, crew, waiting, ctx, self.attempt.spec.retries).run()
        done = []
        for part in parts:
            row, entry = self.part_rows[part.name], ledger.find(keys[part.name])
            row["input_digest"] = hashlib.sha256("".join(part.inputs).encode()).hexdigest()
            row["input_files"] = len(part.inputs)
            if entry is None:
                continue
            row |= {
                "values": entry.record["values"], "findings": entry.record["findings"],
                "files": [str(name) for name in entry.files], "folder": str(entry.folder),
            }  # fmt: skip
            if row["state"] == PartState.REFUSED:
                row["reason"] = entry.record["values"].get("reason", "refused")
                continue
            findings = [
                Finding(f["code"], f["sentence"], f["severity"], f["about"], f["numbers"]) for f in row["findings"]
            ]
            reused = row["state"] == PartState.REUSED
            done.append(DonePart(part, entry.record["values"], entry.folder, findings, reused))
        return done

    def _settle(self, row: Row) -> None:
        """A part has come to its end: keep its row and tell the controller."""
        for record in row.pop("records", ()):
            self._fold(**record)
        self.part_rows[row["name"]] = row
        self.computed += not row.get("reused", False)
        told = ("name", "key", "state", "seconds", "slot", "started", "first", "code", "reason", "remedy")
        self.records.write("part", **{name: row[name] for name in told if name in row})

    # ------------------------------------------------------------------------------------- gang

    def _gang(self, work: Gang, ctx: WorkerContext, crew: Crew) -> Result:
        (self.attempt.paths.root / "rendezvous").unlink(missing_ok=True)
        known = checkpoints.names(self.attempt.paths.job.state)
        self.records.write("gang", ranks=crew.size)
        row = {"world": crew.size, "out": str(ctx.out), "known": known}
        ranks = [crew.start(slot, "rank", row) for slot in range(crew.size)]
        with ctx.stage("train"):
            wait(ranks, return_when=FIRST_EXCEPTION)
            if any(future.done() and future.exception() for future in ranks):
                raise _first_cause(ranks)
            rows = [future.result() for future in ranks]
        if any(row["stopped"] for row in rows):
            raise _StoppedEarly
        return result_of(rows[0]["result"])


def _first_cause(ranks: Sequence[Future[Row]]) -> BaseException:
    """Why the gang broke. A rank that dies breaks its peers' collectives, and their word may come before its own: of a
    node that died Ray knows after seconds."""
    deadline = time.monotonic() + _LAST_WORDS_S
    while True:
        errors = [error for future in ranks if future.done() and (error := future.exception()) is not None]
        causes = [error for error in errors if not (isinstance(error, WorkerLost) and error.code == "peer-lost")]
        left = deadline - time.monotonic()
        silent = [future for future in ranks if not future.done()]
        if causes or not silent or left <= 0:
            lost = [error for error in causes if isinstance(error, WorkerLost)]
            return (lost or causes or errors)[0]
        wait(silent, timeout=left, return_when=FIRST_COMPLETED)


@dataclass(slots=True)
class _Handout:
    """Gives parts to members as they free up, and decides what a failure or a lost member means for them.

    Once a member's node is gone there is no place for another one in this attempt: what the others work on is waited
    for, and the next attempt goes on, as large as it was.
    """

    drive: _Drive
    crew: Crew
    waiting: deque[_Task]
    ctx: WorkerContext
    retries: int
    flying: dict[Future[Row], tuple[int, _Task]] = field(default_factory=dict)
    node_lost: WorkerLost | None = None
    stopping: bool = False

    def run(self) -> None:
        while self.waiting or self.flying:
            self.stopping = self.stopping or self.ctx.should_stop()
            if (self.stopping or self.node_lost) and not self.flying:
                raise _StoppedEarly if self.stopping or self.node_lost is None else self.node_lost
            if not (self.stopping or self.node_lost):
                self._hand_out()
            landed, _ = wait(self.flying, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in landed:
                self._land(future)

    def _hand_out(self) -> None:
        while self.waiting:
            slot = self._slot_for(self.waiting[0])
            if slot is None:
                return
            task = self.waiting.popleft()
            row = {"part": part_row(task.part), "key": task.key}
            self.flying[self.crew.start(slot, "part", row)] = (slot, task)

    def _slot_for(self, task: _Task) -> int | None:
        """The member with the least to do that may take this part, or None: wait for one to free up."""
        flying = {slot: [t for s, t in self.flying.values() if s == slot] for slot in range(self.crew.size)}
        room = 1 if task.alone else _IN_FLIGHT
        fit = [slot for slot, tasks in flying.items() if len(tasks) < room and not any(t.alone for t in tasks)]
        # A second part waits on a member only while every other member has work too.
        return min(fit, key=lambda slot: (len(flying[slot]), slot), default=None)

    def _land(self, future: Future[Row]) -> None:
        if future not in self.flying:
            return
        slot, task = self.flying.pop(future)
        error = future.exception()
        if error is None:
            self._landed(future.result(), task)
        elif isinstance(error, WorkerLost):
            self._lost(error, slot, task)
        else:
            raise error

    def _landed(self, row: Row, task: _Task) -> None:
        if row["state"] == PartState.WAITING:  # its member knew before us that the attempt is to stop
            self.stopping = True
            self.waiting.appendleft(task)
            return
        if row["state"] != PartState.FAILED:
            self.drive._settle(row)
            return
        task.failures += 1
        if failure.part_again(row["code"], task.failures, self.retries):
            task.alone = task.alone or row["code"] == "out-of-memory"
            self.drive.records.write("retry", name=task.part.name, code=row["code"], failures=task.failures)
            self.waiting.append(task)
        else:
            self.drive._settle(row)

    def _lost(self, error: WorkerLost, slot: int, task: _Task) -> None:
        beside = [future for future, (other, _) in self.flying.items() if other == slot]
        suspects = [task] + [self.flying.pop(future)[1] for future in beside]
        self.drive.records.write("lost", slot=slot, code=error.code, parts=[t.part.name for t in suspects])
        if error.code == "node-lost":  # no fault of theirs
            self.node_lost = error
            self.waiting.extendleft(suspects)
            return
        if len(suspects) == 1:
            task.losses += 1
        for suspect in suspects:
            suspect.alone = True
            if not failure.part_again(error.code, suspect.losses, self.retries):
                self.drive._settle(
                    {
                        "name": suspect.part.name,
                        "key": suspect.key,
                        "state": PartState.FAILED.value,
                        "seconds": 0.0,
                        "code": error.code,
                        "reason": error.message,
                        "remedy": error.remedy,
                    }
                )
            else:
                self.waiting.appendleft(suspect)
        self.crew.restart(slot)


def _named_once(parts: list[Part]) -> list[Part]:
    names = [part.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise WorkloadError(f"The plan names {len(twice)} parts twice, first {twice[0]!r}.", remedy="Names are unique.")
    return parts
