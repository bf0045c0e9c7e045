"""The state that decisions stand on, as a fold of the event log: jobs, usage, policy, drains, windows, nodes.

`State.apply` takes one event after another; folding the same events gives the same state, so that a decision of the
past can be taken again. The controller keeps one `Picture` up to date from new events instead of reading the queue at
every look: a snapshot costs what has changed.

What an admin says is a NOTED event: `policy` {policy}, `drain`/`undrain` {nodes}, `freeze`/`thaw` {account},
`reserve`/`unreserve` {window}/{name}; what the controller sees: `nodes` {nodes}, `checkpoint` {at} of a job.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from permed_compute.admission.policy import Policy
from permed_compute.admission.snapshot import (
    Gpu,
    Node,
    Reservation,
    Snapshot,
    Waiting,
    Window,
    grants_of,
    reservation,
    used_by,
    waiting_of,
)
from permed_compute.admission.usage import Decayed
from permed_compute.governance.records import Register
from permed_compute.queue.port import Event, Job, Queue
from permed_compute.spec import JobSpec
from permed_compute.states import LIVE, JobState

SpecOf = Callable[[str], JobSpec]

EVERYWHERE = "*"
"""Drained instead of a node's name: all of them."""


@dataclass(slots=True)
class State:
    """The log up to event `seq`, folded. `grace_ms` is what a job is given beyond its time limit."""

    spec_of: SpecOf
    grace_ms: int = 30_000
    seq: int = 0
    at: int = 0
    jobs: dict[str, Job] = field(default_factory=dict)
    policies: list[tuple[int, Policy]] = field(default_factory=list)
    """(when it was applied, policy), oldest first."""
    nodes: tuple[Node, ...] = ()
    drained: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    windows: tuple[Window, ...] = ()
    models: Register = field(default_factory=Register)
    _usage: Decayed | None = None
    _held: dict[str, tuple[str, dict[str, int], int]] = field(default_factory=dict)
    _live: dict[str, Reservation | None] = field(default_factory=dict)
    """None: to be made when somebody looks, so that years of history cost only what is left of them."""
    _waiting: dict[str, Waiting] = field(default_factory=dict)
    _dependents: dict[str, set[str]] = field(default_factory=dict)
    _kept: dict[str, int] = field(default_factory=dict)
    _took: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """(account, workload, name) → seconds that the last of its like ran: what estimates learn from."""

    # ------------------------------------------------------------------------------------- what it says

    def policy(self, now: int) -> tuple[Policy, int]:
        """The policy in force and since when (ms); the open one where none has been applied.

        One that has been applied holds, though the clock was set back since: without it there would be no quotas."""
        for at, policy in reversed(self.policies):
            begins = max(at, policy.effective_from)
            if begins <= max(at, now) and (not policy.effective_until or now < policy.effective_until):
                return policy, begins
        return Policy(), 0

    def snapshot(self, now: int, nodes: tuple[Node, ...] | None = None) -> Snapshot:
        """What `decide` may look at, now. `nodes` where the log does not say what there is."""
        there = self.nodes if nodes is None else nodes
        drained = tuple(n.name for n in there) if EVERYWHERE in self.drained else self.drained
        for job_id, held in self._live.items():
            if held is None:
                self._live[job_id] = self._reservation(self.jobs[job_id])
        live = sorted((held for held in self._live.values() if held), key=lambda job: self.jobs[job.job_id].seq)
        waiting = sorted(self._waiting.values(), key=lambda job: job.seq)
        return Snapshot(
            there, tuple(live), tuple(waiting), self._usage.peek(now) if self._usage else {}, drained, self.frozen,
            tuple(window for window in self.windows if window.end > now), self.policy(now)[1], self.seq, self.grace_ms,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------- folding

    def apply(self, event: Event) -> None:
        """The next event."""
        if event.seq != self.seq + 1:
            raise ValueError(f"event {event.seq} does not follow event {self.seq}")
        self.seq, self.at = event.seq, event.at
        if event.action == "SUBMITTED":
            self._keep(_submitted(event, self.spec_of(event.job_id)), event.at)
        elif event.action == "MOVED":
            self._keep(_moved(self.jobs[event.job_id], event), event.at)
        else:
            self._noted(event)

    def _keep(self, job: Job, at: int) -> None:
        before = self.jobs.get(job.id)
        self.jobs[job.id] = job
        if before is None or before.detail is not job.detail or (before.state in LIVE) != (job.state in LIVE):
            self._account(job, at)
        self._live.pop(job.id, None)
        self._waiting.pop(job.id, None)
        if job.state in LIVE:
            self._live[job.id] = None
        elif job.state is JobState.QUEUED:
            for other in job.spec.dependencies:
                self._dependents.setdefault(other, set()).add(job.id)
            self._waiting[job.id] = self._wait(job)
        else:
            self._kept.pop(job.id, None)
            if job.state is JobState.SUCCEEDED and job.started_at:
                self._took[_like(job)] = max(1, (job.changed_at - job.started_at) // 1000)
        if before is None or before.state is not job.state:
            for other in self._dependents.get(job.id, ()):
                if other in self._waiting:
                    self._waiting[other] = self._wait(self.jobs[other])

    def _reservation(self, job: Job) -> Reservation:
        made = reservation(job, self.grace_ms)
        kept = self._kept.get(job.id, 0)
        return replace(made, kept_at=kept) if kept > made.kept_at else made

    def _wait(self, job: Job) -> Waiting:
        states = {other: self.jobs[other].state for other in job.spec.dependencies}
        made = waiting_of(job, states)
        took = self._took.get(_like(job), 0)
        return replace(made, estimate=min(took, made.time_limit)) if took and not made.estimate else made

    def _account(self, job: Job, at: int) -> None:
        """What is held changes here, and nowhere else is usage counted."""
        if self._usage is None:
            self._usage = Decayed(self.policy(at)[0], at)
        now = (job.spec.account, used_by(grants_of(job)), int(job.detail.get("charge", 1000)))
        held = now if job.state in LIVE and job.detail.get("grants") else None
        before = self._held.get(job.id)
        if held == before:
            return
        if before is not None:
            self._usage.hold(before[0], before[1], -before[2], at)
            del self._held[job.id]
        if held is not None:
            self._usage.hold(*held, at)
            self._held[job.id] = held

    def _noted(self, event: Event) -> None:
        data = event.data
        match event.reason:
            case "policy":
                policy = Policy.from_row(data["policy"])
                self.policies.append((event.at, policy))
                if self._usage is not None:
                    self._usage = self._usage.under(policy, event.at)
            case "nodes":
                self.nodes = tuple(node_from_row(row) for row in data["nodes"])
                self.grace_ms = int(data.get("grace_ms", self.grace_ms))
            case "drain":
                self.drained = tuple(sorted({*self.drained, *data["nodes"]}))
            case "undrain":
                self.drained = tuple(name for name in self.drained if name not in data["nodes"])
            case "freeze":
                self.frozen = tuple(sorted({*self.frozen, data["account"]}))
            case "thaw":
                self.frozen = tuple(name for name in self.frozen if name != data["account"])
            case "reserve":
                window = window_from_row(data["window"])
                self.windows = (*(w for w in self.windows if w.name != window.name), window)
            case "unreserve":
                self.windows = tuple(window for window in self.windows if window.name != data["name"])
            case "checkpoint" if event.job_id in self._live:
                self._kept[event.job_id] = int(data["at"])
                self._live[event.job_id] = None
            case _:
                self.models.apply(event)


def fold(events: Iterable[Event], spec_of: SpecOf, *, grace_ms: int = 30_000) -> State:
    """The state after these events, from the log's first on."""
    state = State(spec_of, grace_ms)
    for event in events:
        state.apply(event)
    return state


def _like(job: Job) -> tuple[str, str, str]:
    return job.spec.account, job.spec.workload, job.spec.name


def _submitted(event: Event, spec: JobSpec) -> Job:
    return Job(
        event.job_id, spec, JobState(event.after), 1, event.seq, event.actor, 0, event.reason, event.at, event.at, 0,
        str(event.data.get("array_id", "")), int(event.data.get("array_index", -1)),
    )  # fmt: skip


def _moved(job: Job, event: Event) -> Job:
    data = event.data
    return Job(
        job.id, job.spec, JobState(event.after), int(data["version"]), job.seq, job.owner,
        int(data.get("attempt", job.attempt)), event.reason, job.submitted_at, event.at,
        int(data.get("started_at", job.started_at)), job.array_id, job.array_index, data.get("detail", job.detail),
    )  # fmt: skip


def node_row(node: Node) -> dict[str, Any]:
    """A node as a `nodes` event holds it."""
    return asdict(node)


def node_from_row(row: dict[str, Any]) -> Node:
    return Node(row["name"], row["cpu_milli"], row["memory"], tuple(Gpu(**gpu) for gpu in row["gpus"]))


def window_from_row(row: dict[str, Any]) -> Window:
    return Window(row["name"], tuple(row["nodes"]), row["start"], row["end"], tuple(row["accounts"]))


# --------------------------------------------------------------------------------------------- kept up to date

_PAGE = 5_000


class Picture:
    """The folded state of a queue, brought up to date from its new events. Threads may share it."""

    def __init__(self, queue: Queue, *, grace_ms: int = 30_000) -> None:
        self._queue = queue
        self._specs: dict[str, JobSpec] = {}
        self._lock = threading.Lock()
        self._state = State(self._specs.__getitem__, grace_ms)
        self._begun = self._done = 0
        """The number of the newest look that began, and of the newest that saw all there was."""

    def look(self) -> State:
        """The state as the log stands now. Read it at once: the next look changes it."""
        before = self._begun
        with self._lock:
            if self._done > before:  # it began after this call did: many submitters at once share few looks
                return self._state
            self._begun += 1
            while events := self._queue.events(after=self._state.seq, limit=_PAGE):
                self._learn([event.job_id for event in events if event.action == "SUBMITTED"])
                for event in events:
                    self._state.apply(event)
                    if event.action == "SUBMITTED":
                        del self._specs[event.job_id]  # the state's job has it now
                if len(events) < _PAGE:
                    break
            self._done = self._begun
            return self._state

    def expect(self, jobs: Iterable[Job]) -> None:
        """Jobs that this process has just submitted: the next look need not read their specs."""
        with self._lock:
            self._specs |= {job.id: job.spec for job in jobs if job.seq > self._state.seq}

    def see(self, now: int, nodes: tuple[Node, ...] | None = None) -> tuple[Snapshot, Policy, dict[str, Job]]:
        """One consistent view: the snapshot, the policy in force, and the jobs that it names."""
        state = self.look()
        with self._lock:
            seen = state.snapshot(now, nodes)
            named = [job.job_id for job in seen.live] + [job.job_id for job in seen.waiting]
            return seen, state.policy(now)[0], {job_id: state.jobs[job_id] for job_id in named}

    def _learn(self, ids: list[str]) -> None:
        """The specs of new jobs, in few reads."""
        ids = [job_id for job_id in ids if job_id not in self._specs]
        if not self._state.seq:  # at first, of all there are
            self._specs |= {job.id: job.spec for job in self._queue.jobs()}
        elif len(ids) > 3:
            wanted = set(ids)
            self._specs |= {job.id: job.spec for job in self._queue.jobs(limit=len(ids)) if job.id in wanted}
        for job_id in ids:
            if job_id not in self._specs:
                self._specs[job_id] = self._queue.job(job_id).spec
