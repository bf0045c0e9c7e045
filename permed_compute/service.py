"""What a caller may do with jobs: the same for embedded use and, through the gateway's socket, for everybody else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from permed_compute.admission.commit import OF_ONE_ATTEMPT, rows
from permed_compute.admission.decide import decide
from permed_compute.admission.explain import Explanation, explain
from permed_compute.admission.fold import Picture
from permed_compute.admission.permission import check
from permed_compute.admission.policy import Policy
from permed_compute.admission.snapshot import Node, Plan, waiting_of
from permed_compute.admission.top import Standing, standing
from permed_compute.errors import NotFoundError, PermissionDeniedError, Problem, SpecError, StaleError, StateError
from permed_compute.execution.delegated import Word
from permed_compute.governance.desk import Desk, Person
from permed_compute.queue.port import Clock, Event, Job, Move, Queue, new_ids, wall_clock
from permed_compute.queue.rows import event_row, job_row
from permed_compute.spec import JobSpec, Purpose, from_json
from permed_compute.states import AWAITING_FILES, ENDED, LIVE, JobState
from permed_compute.transfer import receipts

_TRIES = 10
"""A job that the controller moves at the same moment is looked at again this often."""

ADMIN = {
    "policy": ("policy",), "drain": ("nodes",), "undrain": ("nodes",), "freeze": ("account",), "thaw": ("account",),
    "reserve": ("window",), "unreserve": ("name",),
}  # fmt: skip
"""What an operator may rule, and what the ruling must say; `admission.fold` gives it its meaning."""

_SPENT = ("losses", "continued", "not_before", "grants")
"""What a job that is resumed begins anew."""

_RESUMABLE = ENDED - {JobState.SUCCEEDED}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a user name from the operating system; `operator` for root and the user that the controller runs as."""

    name: str
    operator: bool
    groups: tuple[str, ...] = ()
    """Of the operating system; an account's members may be groups."""


class Service(Protocol):
    """What client and CLI stand on; `JobService` in this process, `client.RemoteService` through the socket."""

    def submit(self, specs: Sequence[JobSpec], *, held: bool = False) -> list[Job]: ...
    def job(self, job_id: str) -> Job: ...
    def jobs(
        self, *, states: Iterable[JobState] | None = None, owner: str | None = None, limit: int | None = None
    ) -> list[Job]: ...
    def cancel(self, job_id: str) -> Job: ...
    def hold(self, job_id: str) -> Job: ...
    def release(self, job_id: str) -> Job: ...
    def resume(self, job_id: str) -> Job: ...
    def arrived(self) -> list[Job]: ...
    def why(self, job_id: str) -> Explanation: ...
    def top(self) -> Standing: ...
    def preview(self, spec: JobSpec) -> Mapping[str, Any]: ...
    def preempt(self, job_id: str) -> Job: ...
    def admin(self, reason: str, data: Mapping[str, Any]) -> Event: ...
    def model(self, action: str, data: Mapping[str, Any]) -> Mapping[str, Any]: ...
    def models(self) -> list[dict[str, Any]]: ...
    def events(self, *, job_id: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]: ...


@dataclass(slots=True)
class JobService:
    """User operations on a queue. `nodes` is what there is to reserve; `wake` tells a controller to look now."""

    queue: Queue
    caller: Caller
    nodes: Callable[[], tuple[Node, ...]]
    picture: Picture | None = None
    """The folded log, shared with the controller of this process."""
    grace_ms: int = 30_000
    clock: Clock = wall_clock
    wake: Callable[[], None] = lambda: None
    fits: Callable[[JobSpec], None] = lambda spec: None
    """Raises where the engine's site would refuse the job."""
    queued: Callable[[Sequence[Job]], None] = lambda jobs: None
    """Told of new jobs before anybody looks at them."""
    engine_says: Callable[[Job], Word | None] = lambda job: None
    """Of an engine that places jobs itself: what it says of one that it has."""
    desk: Desk | None = None
    """The gate between models and patients; without one nothing is taken for care."""
    received: Path | None = None
    """Receipts of the sets of files that are in place; without them none is."""

    def submit(self, specs: Sequence[JobSpec], *, held: bool = False) -> list[Job]:
        """Durable when this returns. Raises `NotFoundError` for a dependency that does not exist,
        `PermissionDeniedError` for an account, band or purpose that the policy does not give to the caller, or for
        received files more sensitive than the job says, and `ModelRefusedError` for care with a model that was not
        validated and promoted for it. A job whose files have not come in is HELD until they have (`arrived`)."""
        policy = self._policy()
        for spec in specs:
            check(policy, spec, self.caller.name, self.caller.groups, self.clock())
            self.fits(spec)
            self._files_fit(spec)
            if spec.purpose is Purpose.CARE:
                self._at_desk().clear_submission(spec, self.caller.name)
            for other in spec.dependencies:
                self.queue.job(other)
        jobs = self.queue.submit(specs, owner=self.caller.name, held=held)
        self._seen().expect(jobs)
        self.queued(jobs)
        if any(spec.transfers for spec in specs):
            self.arrived()
            jobs = [self.queue.job(job.id) for job in jobs]
        if not held:  # a held job cannot start: there is nothing to look at
            self.wake()
        return jobs

    def job(self, job_id: str) -> Job:
        return self.queue.job(job_id)

    def jobs(
        self, *, states: Iterable[JobState] | None = None, owner: str | None = None, limit: int | None = None
    ) -> list[Job]:
        return self.queue.jobs(states=states, owner=owner, limit=limit)

    def cancel(self, job_id: str) -> Job:
        """Ended at once where nothing runs; else signalled, given its grace, and confirmed by the controller."""

        def step(job: Job) -> JobState | None:
            if job.state in ENDED or job.state is JobState.CANCELLING:
                return None
            idle = job.state in (JobState.HELD, JobState.QUEUED, JobState.RESERVED)
            return JobState.CANCELLED if idle else JobState.CANCELLING

        return self._change(job_id, step, "cancelled-by-user")

    def hold(self, job_id: str) -> Job:
        """Keep a queued job from starting. Raises `StateError` for one that has: holding it would give away what its
        processes still use."""

        def step(job: Job) -> JobState | None:
            if job.state in LIVE - {JobState.RESERVED}:
                raise StateError(f"Job {job.id} is {job.state}: it does not wait.", remedy="`permed cancel` ends it.")
            by_user = job.state is JobState.HELD and job.reason != AWAITING_FILES
            return None if by_user else JobState.HELD

        return self._change(job_id, step, "held-by-user")

    def release(self, job_id: str) -> Job:
        """Let a held job wait for its turn again, or for its files where they have not come in."""

        def step(job: Job) -> JobState | None:
            if job.state is JobState.QUEUED:
                return None
            if job.state is not JobState.HELD:
                raise StateError(f"Job {job.id} is {job.state}, not HELD.", remedy="Only held jobs can be released.")
            return JobState.QUEUED

        return self._change(job_id, step, "released-by-user")

    def resume(self, job_id: str) -> Job:
        """Queue an interrupted or ended job again. Parts that are done are not computed again."""

        def step(job: Job) -> JobState | None:
            if job.state is JobState.SUCCEEDED:
                raise StateError(f"Job {job.id} has succeeded: there is nothing to resume.", remedy="permed results")
            return JobState.QUEUED if job.state in _RESUMABLE or job.state is JobState.HELD else None

        return self._change(job_id, step, "resumed-by-user", fresh=True)

    def arrived(self) -> list[Job]:
        """Queue the jobs that waited for sets of files, where those are in place now. Whoever may ask for that."""
        for _ in range(_TRIES):
            waiting = [job for job in self.queue.jobs(states={JobState.HELD}) if job.reason == AWAITING_FILES]
            moves = [
                Move(job.id, job.version, JobState.QUEUED, "files-received", self.caller.name)
                for job in waiting
                if not self._missing(job.spec)
            ]
            if not moves:
                return []
            try:
                moved = self.queue.apply(moves)
            except StaleError:
                continue
            self.wake()
            return moved
        raise StaleError("Jobs that wait for files keep moving.", remedy="Try again.")

    def why(self, job_id: str) -> Explanation:
        """Why the job is where it is: the decision that would be taken now, in words."""
        snapshot, policy, _ = self._seen().see(self.clock(), self._nodes())
        now = self.clock()
        job = self.queue.job(job_id)
        said = explain(job, decide(snapshot, policy, now), snapshot, self._name, self._missing(job.spec))
        word = self.engine_says(job) if job.state in (JobState.LAUNCHING, JobState.RUNNING, JobState.UNKNOWN) else None
        return replace(said, code=word.code, sentence=word.sentence, change=word.change) if word is not None else said

    def preview(self, spec: JobSpec) -> Mapping[str, Any]:
        """What would be decided now if it were submitted now, to a single job or an array's first element: starts_now,
        code, why, change, grants (rows). Raises as `submit` does; nothing is written."""
        now = self.clock()
        snapshot, policy, _ = self._seen().see(now, self._nodes())
        check(policy, spec, self.caller.name, self.caller.groups, now)
        self.fits(spec)
        self._files_fit(spec)
        if spec.purpose is Purpose.CARE:
            self._at_desk().clear(spec)
        first = spec.element(0) if spec.array else spec
        job = Job(new_ids(now, 1)[0], first, JobState.QUEUED, 1, 2**62, self.caller.name, 0, "preview", now, now, 0)
        states = {other: self.queue.job(other).state for other in first.dependencies}
        snapshot = replace(snapshot, waiting=(*snapshot.waiting, waiting_of(job, states)))
        plan = decide(snapshot, policy, now)
        missing = self._missing(first)
        if missing:
            job, plan = replace(job, state=JobState.HELD, reason=AWAITING_FILES), Plan("")
        said = explain(job, plan, snapshot, self._name, missing)
        admission = next((each for each in plan.admissions if each.job_id == job.id), None)
        return {
            "starts_now": admission is not None,
            "code": "admitted" if admission else said.code,
            "why": admission.why if admission else said.sentence,
            "change": "" if admission else said.change,
            "grants": rows(admission.grants) if admission else [],
        }

    def top(self) -> Standing:
        """Who uses what, who waits for what, and what starts when: the decision that would be taken now, as a table."""
        now = self.clock()
        snapshot, policy, jobs = self._seen().see(now, self._nodes())
        return standing(snapshot, policy, decide(snapshot, policy, now), now, jobs)

    def preempt(self, job_id: str) -> Job:
        """Stop a running job with its checkpoint and queue it again: an operator's hand on the scale."""
        self._operator("preempt")

        def step(job: Job) -> JobState | None:
            if job.state is JobState.PREEMPTING:
                return None
            if job.state not in (JobState.RUNNING, JobState.LAUNCHING):
                raise StateError(f"Job {job.id} is {job.state}: it does not run.", remedy="permed jobs --state running")
            return JobState.PREEMPTING

        return self._change(job_id, step, "preempted-by-operator")

    def admin(self, reason: str, data: Mapping[str, Any]) -> Event:
        """Record what an operator rules (`ADMIN`): decisions follow it from the next one on."""
        if reason not in ADMIN:
            raise NotFoundError(f"There is no ruling {reason!r}.", remedy=f"There are: {', '.join(ADMIN)}.")
        self._operator(reason)
        missing = [name for name in ADMIN[reason] if name not in data]
        if missing:
            raise NotFoundError(f"{reason} says no {missing[0]}.")
        version = Policy.from_row(data["policy"]).version if reason == "policy" else ""
        event = self.queue.note(reason, actor=self.caller.name, data=data, policy=version)
        self.wake()
        return event

    def model(self, action: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Validate, promote, retire a model, or record an issue (`governance.desk`); the record as it then stands."""
        return self._at_desk().rule(action, data, Person(self.caller.name, self.caller.operator))

    def models(self) -> list[dict[str, Any]]:
        """All records of validated models."""
        return self._at_desk().rows()

    def _at_desk(self) -> Desk:
        if self.desk is None:
            raise PermissionDeniedError(
                "No model can be cleared for care here.", remedy="Submit through the home's controller."
            )
        return self.desk

    def _name(self, job_id: str) -> str:
        return self.queue.job(job_id).spec.name

    def _missing(self, spec: JobSpec) -> tuple[str, ...]:
        """The sets of files that the job names and that have not come in."""
        return spec.transfers if self.received is None else receipts.missing(spec, self.received)

    def _files_fit(self, spec: JobSpec) -> None:
        """Raise `PermissionDeniedError` where files that have come in are more sensitive than the job says."""
        if self.received is not None:
            receipts.located(spec, self.received)

    def _operator(self, what: str) -> None:
        if not self.caller.operator:
            raise PermissionDeniedError(
                f"Only an operator may {what}.", remedy="root, or the user that the controller runs as."
            )

    def _seen(self) -> Picture:
        if self.picture is None:
            self.picture = Picture(self.queue, grace_ms=self.grace_ms)
        return self.picture

    def _nodes(self) -> tuple[Node, ...]:
        """What the controller saw last; before it has looked, this machine."""
        return self._seen().look().nodes or self.nodes()

    def _policy(self) -> Policy:
        return self._seen().look().policy(self.clock())[0]

    def events(self, *, job_id: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        return self.queue.events(job_id=job_id, after=after, limit=limit)

    def _change(self, job_id: str, step: Callable[[Job], JobState | None], reason: str, *, fresh: bool = False) -> Job:
        for _ in range(_TRIES):
            job = self.queue.job(job_id)
            if not (self.caller.operator or job.owner == self.caller.name):
                raise PermissionDeniedError(
                    f"Job {job.id} belongs to somebody else.", remedy="Its owner or an operator can do that."
                )
            to = step(job)
            if to is None:
                return job
            if to is JobState.QUEUED and (missing := self._missing(job.spec)):
                if job.state is not JobState.HELD or job.reason == AWAITING_FILES:
                    raise StateError(
                        f"Job {job.id} needs files that have not come in: {', '.join(missing)}.",
                        remedy="`permed receive SOURCE --name NAME` puts them in place.",
                    )
                to, reason = JobState.HELD, AWAITING_FILES
            spent = _SPENT if fresh else OF_ONE_ATTEMPT if job.state is JobState.RESERVED else ()
            detail = {name: job.detail[name] for name in job.detail if name not in spent}
            try:
                move = Move(job.id, job.version, to, reason, self.caller.name, detail=detail if spent else None)
                moved = self.queue.apply([move])[0]
            except StaleError:
                continue
            self.wake()
            return moved
        raise StaleError(f"Job {job_id} keeps moving.", remedy="Try again.")


# ----------------------------------------------------------------------------------------- over the socket

_CALLS = (
    "submit", "job", "jobs", "cancel", "hold", "release", "resume", "arrived", "why", "events", "top", "preview",
    "preempt", "admin", "model", "models",
)  # fmt: skip


def handle(service_for: Callable[[Any], JobService], caller: Any, call: str, args: Mapping[str, Any]) -> Any:
    """One call that came through the gateway, as JSON. `service_for(caller)` binds the service to its identity."""
    if call not in _CALLS:
        raise NotFoundError(f"There is no call {call!r}.", remedy=f"Calls are: {', '.join(_CALLS)}.")
    service = service_for(caller)
    values = dict(args)
    if call == "submit":
        specs = [_spec(text) for text in values["specs"]]
        # Without their specs, which the caller has: an array's answer would carry one per element.
        return [job_row(job, spec=False) for job in service.submit(specs, held=bool(values.get("held")))]
    if call == "jobs":
        states = [JobState(state) for state in values["states"]] if values.get("states") is not None else None
        return [
            job_row(job) for job in service.jobs(states=states, owner=values.get("owner"), limit=values.get("limit"))
        ]
    if call == "arrived":
        return [job_row(job) for job in service.arrived()]
    if call == "events":
        return [event_row(event) for event in service.events(**values)]
    if call == "why":
        return service.why(values["job_id"]).as_dict()
    if call == "top":
        return service.top().as_dict()
    if call == "preview":
        return service.preview(_spec(values["spec"]))
    if call == "model":
        return dict(service.model(values["action"], values["data"]))
    if call == "models":
        return service.models()
    if call == "admin":
        return event_row(service.admin(values["reason"], values["data"]))
    return job_row(getattr(service, call)(values["job_id"]))


def _spec(text: str) -> JobSpec:
    try:
        return from_json(text)
    except ValueError as error:
        raise SpecError("the submitted job", [Problem("spec", str(error).splitlines()[0])]) from None
