"""The promises of docs/architecture.md, checked from an event log after a run, simulated or real.

    broken = examine(queue, acknowledged=ids, lives=lives)
    assert not broken, broken

Whoever ran the attempts adds what the log cannot know: `lives`, when the processes of each attempt began and ended, by
the number of the newest event at that moment. Then "released only on confirmed termination" is a question of numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from permed_compute.admission.commit import stopping_instead
from permed_compute.admission.decide import decide
from permed_compute.admission.explain import CODES
from permed_compute.admission.fold import fold, node_from_row
from permed_compute.admission.replay import replay
from permed_compute.admission.snapshot import Grant, Node, grants_of, used_by
from permed_compute.errors import AuditError
from permed_compute.execution.failure import KINDS
from permed_compute.queue.events import Anchor, verify
from permed_compute.queue.port import Event, Job, Queue
from permed_compute.states import ENDED, LIVE, JobState

STARTED = LIVE - {JobState.RESERVED}
"""States in which an attempt of the job may have processes."""
AT_REST = frozenset({"dependency-failed", "never-fits", "never-quota", "no-such-device", "unknown-account"})
"""Reasons for which a job may wait for ever."""


@dataclass(frozen=True, slots=True)
class Broken:
    """One promise that was not kept: which, and by what. `seq` is the event where it shows, 0 = at the end."""

    promise: str
    what: str
    seq: int = 0

    def __str__(self) -> str:
        return f"{self.promise}: {self.what}" + (f" (event {self.seq})" if self.seq else "")


@dataclass(slots=True, eq=False)
class Life:
    """The processes of one attempt on the nodes of `grants`: from event `born` on, until event `gone` (None: still).

    `cut`: on a node that was cut off from everything. It may go on there for a while; the fence keeps it from writing.
    """

    job_id: str
    number: int
    grants: tuple[Grant, ...]
    born: int
    gone: int | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Sighting:
    """Processes of an attempt were seen, at some moment between these two events (the newest before and after)."""

    job_id: str
    number: int
    before: int
    after: int
    what: str = "processes"


def sighted(queue: Queue, sightings: Iterable[Sighting]) -> list[Broken]:
    """Processes that were seen while their job held no reservation for that attempt: for runs on real machines."""
    log = _Log(queue)
    broken = []
    for one in sightings:
        track = log.tracks.get(one.job_id, [])
        at_first = [step for step in track if step[0] <= one.before][-1:]
        possible = at_first + [step for step in track if one.before < step[0] <= one.after]
        if not any(state in STARTED and number == one.number for _, state, number in possible):
            state = possible[-1][1] if possible else "not there"
            told = f"{one.what} of attempt {one.number} of job {one.job_id} seen while the job was {state}"
            broken.append(Broken("release", told, one.before))
    return broken


def examine(
    queue: Queue, *, acknowledged: Collection[str] = (), lives: Sequence[Life] = (),
    first_publications: Iterable[str] = (), writes: Iterable[tuple[str, int, int]] = (),
    ceilings: Mapping[str, Mapping[str, int]] | None = None, anchor: Anchor | None = None, ended: bool = True,
    decisions: bool = True,
) -> list[Broken]:  # fmt: skip
    """Every promise that the log, and what was seen beside it, shows broken.

    acknowledged: jobs whose `submit` was answered. first_publications: a part's key for each time that somebody was
    told to be the first to publish it. writes: (job, attempt, newest event then) of each publication. ceilings: account
    → resource → most that it may hold. ended: the run is over, so that every job must have come to an end. decisions:
    take every decision again (half of what all this costs).
    """
    try:
        verify(queue, anchor)
    except AuditError as error:
        return [Broken("audit chain", error.message, error.seq)]
    log = _Log(queue)
    broken = [*_capacity(log, ceilings or {}), *_promises(log, ceilings or {}), *_words(log), *_fold(log)]
    broken += [*_kept(log, acknowledged), *_alive(log, lives), *_once(first_publications), *_fenced(log, writes)]
    broken += [*(_decisions(log) if decisions else ()), *(_ended(log) if ended else ())]
    return broken


@dataclass(slots=True)
class _Log:
    queue: Queue
    jobs: dict[str, Job] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    tracks: dict[str, list[tuple[int, str, int]]] = field(default_factory=dict)
    """Job → (event, state, attempt), in order."""

    def __post_init__(self) -> None:
        self.events = self.queue.events()
        self.jobs = {job.id: job for job in self.queue.jobs()}
        for event in self.moves():
            track = self.tracks.setdefault(event.job_id, [])
            track.append((event.seq, event.after, event.data.get("attempt", track[-1][2] if track else 0)))

    def moves(self) -> Iterator[Event]:
        return (event for event in self.events if event.action != "NOTED")

    def spec_of(self, job_id: str) -> Any:
        return self.jobs[job_id].spec


def _rows(event: Event, name: str) -> tuple[Grant, ...] | None:
    detail = event.data.get("detail")
    return None if detail is None else tuple(Grant.from_row(row) for row in detail.get(name, ()))


# --------------------------------------------------------------------------------------------- 1, 4, 5


def overfull(nodes: Mapping[str, Node], grants: Iterable[Grant]) -> Iterator[str]:
    """Nodes and what of them these grants together take too much of."""
    used: Counter[tuple[str, str]] = Counter()
    for grant in grants:
        used[grant.node, "cpu"] += grant.cpu_milli
        used[grant.node, "memory"] += grant.memory
        for device in grant.devices:
            used[grant.node, f"device {device}"] += min(1000, grant.gpu_milli)
    for (name, what), amount in used.items():
        node = nodes.get(name)
        there = {"cpu": node.cpu_milli, "memory": node.memory}.get(what, 1000) if node else 0
        if amount > there:
            yield f"{amount} of {there} {what} on {name}"


def _capacity(log: _Log, ceilings: Mapping[str, Mapping[str, int]]) -> Iterator[Broken]:
    """Live reservations against what the nodes had when last seen, at every admission; workers all or none."""
    nodes: dict[str, Node] = {}
    held: dict[str, tuple[Grant, ...]] = {}
    for event in log.events:
        if event.reason == "nodes" and event.action == "NOTED":
            nodes |= {row["name"]: node_from_row(row) for row in event.data["nodes"]}
        elif event.action == "MOVED":
            grants = _rows(event, "grants")
            if event.after not in LIVE:
                held.pop(event.job_id, None)
                if grants:
                    yield Broken("release", f"a job that is {event.after} holds a reservation", event.seq)
            elif grants is not None:
                held[event.job_id] = grants
            if event.after == JobState.RESERVED:
                yield from (Broken("capacity", what, event.seq) for what in overfull(nodes, _all(held.values())))
                workers = log.jobs[event.job_id].spec.resources.workers
                if not workers.min <= len(grants or ()) <= workers.max:
                    yield Broken("all or nothing", f"{len(grants or ())} workers of {workers}", event.seq)
                yield from _over(log, held, ceilings, event.seq)


def _over(
    log: _Log, held: Mapping[str, tuple[Grant, ...]], ceilings: Mapping[str, Mapping[str, int]], seq: int
) -> Iterator[Broken]:
    for account, most in ceilings.items():
        grants = _all(grants for job_id, grants in held.items() if log.jobs[job_id].spec.account == account)
        for what, amount in used_by(grants).items():
            if amount > most.get(what, amount):
                yield Broken("quota", f"{account} holds {amount} of {most[what]} {what}", seq)


def _promises(log: _Log, ceilings: Mapping[str, Mapping[str, int]]) -> Iterator[Broken]:
    """What was preempted for a waiting job is nobody else's: promised and staying fit, whatever is admitted.

    But for a promise whose node was gone and is back: what it takes, devices and its account's quota, may have been
    promised to others meanwhile, who are owed nothing then.
    """
    nodes: dict[str, Node] = {}
    held: dict[str, tuple[Grant, ...]] = {}
    going: set[str] = set()
    promised: dict[str, tuple[Grant, ...]] = {}
    dormant: set[str] = set()
    """Promised what is on a node that is gone: until it is back, the rest is anybody's, and may be promised again."""
    for event, following in zip(log.events, [*log.events[1:], None], strict=True):
        if event.reason == "nodes" and event.action == "NOTED":
            there = {row["name"]: node_from_row(row) for row in event.data["nodes"]}
            nodes |= there
            lost = {name for name, wanted in promised.items() if any(grant.node not in there for grant in wanted)}
            dormant |= lost
            promised = {name: wanted for name, wanted in promised.items() if name not in lost}
        if event.action != "MOVED":
            continue
        grants = _rows(event, "grants")
        if event.after in LIVE and grants is not None:
            held[event.job_id] = grants
        elif event.after not in LIVE:
            held.pop(event.job_id, None)
        going.discard(event.job_id)
        if event.after in (JobState.PREEMPTING, JobState.CANCELLING):
            going.add(event.job_id)
        promised.pop(event.job_id, None)
        if event.job_id in dormant and event.after == JobState.RESERVED:
            taken = _devices(grants or ())
            promised = {
                name: wanted for name, wanted in promised.items()
                if not taken & _devices(wanted) and not any(_over(log, held | {name: wanted}, ceilings, event.seq))
            }  # fmt: skip
        dormant.discard(event.job_id)
        if event.reason == "promised" and event.after == JobState.QUEUED:
            promised[event.job_id] = _rows(event, "promised") or ()
        admits = event.after in (JobState.RESERVED, JobState.QUEUED)
        if promised and admits and not _together(event, following):
            staying = [grants for job_id, grants in held.items() if job_id not in going]
            wanted = _all([*staying, *promised.values()])
            yield from (Broken("promise", what, event.seq) for what in overfull(nodes, wanted))


def _devices(grants: Iterable[Grant]) -> set[tuple[str, int]]:
    return {(grant.node, device) for grant in grants for device in grant.devices}


def _together(event: Event, following: Event | None) -> bool:
    """Of one decision, committed at once: nobody can have looked in between."""

    def of(one: Event) -> Any:
        return (one.data.get("detail") or {}).get("decision")

    return following is not None and of(event) is not None and of(event)["seq"] == (of(following) or {}).get("seq")


def _all(grants: Iterable[Iterable[Grant]]) -> list[Grant]:
    return [grant for each in grants for grant in each]


# --------------------------------------------------------------------------------------------- 2, 7, 8


def _words(log: _Log) -> Iterator[Broken]:
    for event in log.events:
        if not (event.actor and event.reason):
            yield Broken("actor and reason", f"a move to {event.after} says neither who nor why", event.seq)
        decided = (event.data.get("detail") or {}).get("decision")
        if decided and event.after == JobState.RESERVED and not event.policy:
            yield Broken("actor and reason", "an admission without its policy's version", event.seq)


def _fold(log: _Log) -> Iterator[Broken]:
    state = fold(log.events, log.spec_of)
    for job_id in sorted(state.jobs.keys() | log.jobs.keys()):
        if state.jobs.get(job_id) != log.jobs.get(job_id):
            yield Broken("the log tells all", f"job {job_id} is not what its events make of it")


def _decisions(log: _Log) -> Iterator[Broken]:
    for seq in replay(log.events, log.spec_of, stopping_instead).different:
        yield Broken("decisions are pure", "the same state does not lead to it again", seq)


# --------------------------------------------------------------------------------------------- 3, 9, 10


def _kept(log: _Log, acknowledged: Collection[str]) -> Iterator[Broken]:
    submitted = Counter(event.job_id for event in log.events if event.action == "SUBMITTED")
    for job_id in acknowledged:
        if job_id not in log.jobs or not submitted[job_id]:
            yield Broken("no job lost", f"job {job_id} was acknowledged and is not there")


def _once(first_publications: Iterable[str]) -> Iterator[Broken]:
    for key, count in Counter(first_publications).items():
        if count > 1:
            yield Broken("part published once", f"part {key[:12]} was published {count} times")


def _alive(log: _Log, lives: Sequence[Life]) -> Iterator[Broken]:
    """As long as an attempt's processes lived, its job held the reservation for that very attempt."""
    for life in lives:
        if life.cut:
            continue
        track = log.tracks.get(life.job_id, [])
        before = [step for step in track if step[0] <= life.born][-1:]
        during = [step for step in track if life.born < step[0] and (life.gone is None or step[0] <= life.gone)]
        for seq, state, number in [*before, *during]:
            if state not in STARTED or number != life.number:
                what = f"attempt {life.number} of job {life.job_id} lived while the job was {state} (attempt {number})"
                yield Broken("release", what, seq)
                break
        if not before:
            yield Broken("release", f"attempt {life.number} of job {life.job_id} lived before the job", life.born)
        elif life.gone is None and log.jobs[life.job_id].state in ENDED:
            yield Broken("orphan", f"processes of attempt {life.number} of job {life.job_id} are left")
    yield from _beside(log, lives)


def _fenced(log: _Log, writes: Iterable[tuple[str, int, int]]) -> Iterator[Broken]:
    for job_id, number, at in writes:
        newest = max((step[2] for step in log.tracks[job_id] if step[0] <= at), default=0)
        if newest > number:
            yield Broken("one attempt writes", f"attempt {number} of job {job_id} wrote beside attempt {newest}", at)


def _beside(log: _Log, lives: Sequence[Life]) -> Iterator[Broken]:
    """At no moment do the processes that there are exceed a node, and of one job only one attempt lives."""
    nodes: dict[str, Node] = {}
    for event in log.events:
        if event.reason == "nodes" and event.action == "NOTED":
            nodes |= {row["name"]: node_from_row(row) for row in event.data["nodes"]}
    there = [life for life in lives if not life.cut]
    for life in there:  # the fullest moment of any node is the birth of something on it
        beside = [each for each in there if each.born <= life.born and (each.gone is None or each.gone > life.born)]
        if life not in beside:
            beside.append(life)  # born and gone between two events
        for what in overfull(nodes, _all(other.grants for other in beside)):
            yield Broken("capacity", f"processes take {what}", life.born)
        same = [other for other in beside if other.job_id == life.job_id and other is not life]
        if same:
            yield Broken("one attempt writes", f"two attempts of job {life.job_id} live at once", life.born)


def _ended(log: _Log) -> Iterator[Broken]:
    """Nobody waits without a reason that lets it wait for ever, and a failure has used up its budget."""
    state = fold(log.events, log.spec_of)
    now = max((event.at for event in log.events), default=0)
    plan = decide(state.snapshot(now), state.policy(now)[0], now)
    codes = {wait.job_id: wait.code for wait in plan.waits}
    for job in log.jobs.values():  # in order of submission: a dependency stands before what depends on it
        if codes.get(job.id) == "dependency" and any(codes.get(each) in AT_REST for each in job.spec.dependencies):
            codes[job.id] = "dependency-failed"
    for job in log.jobs.values():
        if job.state is JobState.QUEUED and codes.get(job.id) not in AT_REST:
            yield Broken("no job lost", f"job {job.id} still waits ({codes.get(job.id, 'admissible')}, {job.reason})")
        elif job.state in LIVE:
            yield Broken("no job lost", f"job {job.id} is still {job.state} ({job.reason})")
        elif job.state is JobState.FAILED and (why := _too_soon(log, job)):
            yield Broken("no job lost", f"job {job.id} failed {why}")
        elif job.state is JobState.QUEUED and codes[job.id] not in CODES:
            yield Broken("one reason", f"job {job.id} waits for {codes[job.id]}")
        if job.state not in LIVE and grants_of(job):
            yield Broken("release", f"job {job.id} has ended and holds a reservation")


def _too_soon(log: _Log, job: Job) -> str:
    """Why the job should not have failed yet, or ''."""
    kind = KINDS.get(job.reason)
    if kind is None:
        return ""  # the workload's own word
    budget = job.spec.retries if kind.retries is None else kind.retries
    times = sum(event.job_id == job.id and event.reason == job.reason for event in log.moves())
    return f"after {times} times {job.reason}; {budget} more are allowed" if times <= budget else ""
