"""Rules to compare with, each a `decide` of its own: first come first served, EASY, DRF, age priority, least attained.

They see the same snapshot, place on the same nodes and are committed by the same committer. None of them knows quotas;
what they lack is what the comparison is about.

* `fifo`: strictly in order of submission; whoever does not fit stops everybody behind.
* `easy`: FIFO, and whoever ends before the first waiting job's reserved start, or beside it, passes (Lifka 1995;
  Mu'alem & Feitelson, IEEE TPDS 12(6), 2001).
* `drf`: the account with the smallest dominant share goes next (Ghodsi et al., NSDI 2011).
* `nris_age`: a start value by kind of job, plus one a minute, for ten jobs per user and account; size and fair share do
  not count; jobs at 20,000 have a reserved start (documentation.sigma2.no, jobs/submitting/job_scheduling.md).
* `tiresias_las`: two queues by attained service with preemption (Gu et al., NSDI 2019, discretised 2D-LAS).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from permed_compute.admission.placement import Cluster, held_until
from permed_compute.admission.policy import Policy
from permed_compute.admission.snapshot import (
    Admission,
    Grant,
    Need,
    Plan,
    Preemption,
    Reservation,
    Snapshot,
    Wait,
    Waiting,
    used_by,
)
from permed_compute.spec import Band

Decide = Callable[[Snapshot, Policy, int], Plan]


class _Round:
    """One decision in the making."""

    def __init__(self, snapshot: Snapshot, policy: Policy, now: int) -> None:
        self.now = now
        self.policy = policy.version
        self.cluster = Cluster(snapshot.nodes, snapshot.drained, snapshot.windows)
        for job in snapshot.live:
            self.cluster.hold(job.grants, held_until(job, now))
        self.grace = snapshot.grace_ms
        self.ready = sorted((job for job in snapshot.waiting if job.not_before <= now), key=lambda job: job.seq)
        self.all = snapshot.waiting
        self.admissions: list[Admission] = []
        self.preemptions: list[Preemption] = []
        self._full: set[tuple[Need, int]] = set()

    def start(self, job: Waiting, *, beside: bool = False) -> tuple[Grant, ...] | None:
        """Start it if it fits now. `beside`: only where that delays no reserved start."""
        need = job.need
        length = job.time_limit if beside else 0
        if any(known == need and length >= least for known, least in self._full):
            return None
        until = self.now + job.time_limit * 1000 + self.grace
        for flavor in self.cluster.meanings(need):
            placed = self.cluster.place(need, flavor, need.workers_max, job.account, self.now, until, beside=beside)
            if placed:
                self.cluster.hold(placed, until)
                self.admissions.append(Admission(job.job_id, job.version, placed, ""))
                return placed
        self._full.add((need, length))
        return None

    def reserve(self, job: Waiting) -> None:
        """The first moment at which it fits is its own from now on."""
        need, length = job.need, job.time_limit * 1000 + self.grace
        for flavor in self.cluster.meanings(need):
            found = self.cluster.earliest(need, flavor, need.workers_min, job.account, self.now, length)
            if found:
                self.cluster.claim(job.job_id, found[1], found[0], found[0] + length)
                return

    def plan(self) -> Plan:
        started = {admission.job_id for admission in self.admissions}
        waits = tuple(Wait(job.job_id, "capacity") for job in self.all if job.job_id not in started)
        return Plan(self.policy, tuple(self.admissions), waits, tuple(self.preemptions))

    def possible(self, job: Waiting) -> bool:
        need = job.need
        return any(self.cluster.capable(need, flavor) for flavor in self.cluster.meanings(need))


def fifo(snapshot: Snapshot, policy: Policy, now: int) -> Plan:
    """Strictly in order of submission."""
    round_ = _Round(snapshot, policy, now)
    for job in round_.ready:
        if round_.possible(job) and round_.start(job) is None:
            break
    return round_.plan()


def easy(snapshot: Snapshot, policy: Policy, now: int) -> Plan:
    """FIFO with backfill behind one reserved start."""
    round_ = _Round(snapshot, policy, now)
    _backfill(round_, round_.ready, 1)
    return round_.plan()


def _backfill(round_: _Round, order: Iterable[Waiting], reserved: int) -> None:
    held = 0
    for job in order:
        if not round_.possible(job) or round_.start(job, beside=held > 0) is not None:
            continue
        if held < reserved:
            round_.reserve(job)
            held += 1


def drf(snapshot: Snapshot, policy: Policy, now: int) -> Plan:
    """Dominant resource fairness between accounts, without reservations: who fits and has least goes next."""
    round_ = _Round(snapshot, policy, now)
    total: Counter[str] = Counter()
    for node in snapshot.nodes:
        total["cpu"] += node.cpu_milli
        total["memory"] += node.memory
        for gpu in node.gpus:
            total[f"gpu:{gpu.flavor}"] += 1000
    used: dict[str, Counter[str]] = {}
    for live in snapshot.live:
        used.setdefault(live.account, Counter()).update(used_by(live.grants))
    queues: dict[str, list[Waiting]] = {}
    for job in reversed(round_.ready):
        queues.setdefault(job.account, []).append(job)

    def share(account: str) -> tuple[int, str]:
        shares = [1_000_000 * amount // total[name] for name, amount in used.get(account, {}).items() if total[name]]
        return max(shares, default=0), account

    open_ = set(queues)
    while open_:
        account = min(open_, key=share)
        job = queues[account].pop()
        placed = round_.start(job)
        if placed:
            used.setdefault(account, Counter()).update(used_by(placed))
        if not queues[account] or (placed is None and round_.possible(job)):
            open_.discard(account)  # its first does not fit: the others may go on
    return round_.plan()


_NRIS_START = {Band.CLINICAL: 19_760, Band.RESEARCH: 19_760, Band.OPPORTUNISTIC: 1}
"""normal, normal, optimist: NRIS knows no clinical queue."""
_NRIS_CEILING = {Band.OPPORTUNISTIC: 10_080}
_NRIS_RESERVE = 20_000
_NRIS_AGEING = 10


def nris_age(snapshot: Snapshot, policy: Policy, now: int) -> Plan:
    """Start value and one a minute. Who submits is in the account here: a trace's users share one queue owner.

    Up to eight jobs at 20,000 hold reserved starts: NRIS does not publish how many its scheduler plans for.
    """
    round_ = _Round(snapshot, policy, now)
    ageing: Counter[str] = Counter()
    points: list[tuple[int, int, Waiting]] = []
    for job in round_.ready:
        start = _NRIS_START[job.band]
        aged = 0
        if ageing[job.account] < _NRIS_AGEING:
            ageing[job.account] += 1
            aged = (now - job.submitted_at) // 60_000
        points.append((-min(start + aged, _NRIS_CEILING.get(job.band, 1 << 30)), job.seq, job))
    points.sort(key=lambda point: point[:2])
    held = 0
    for priority, _, job in points:
        if not round_.possible(job) or round_.start(job, beside=held > 0) is not None:
            continue
        if -priority >= _NRIS_RESERVE and held < 8:
            round_.reserve(job)
            held += 1
    return round_.plan()


_LAS_BOUND = 3_600_000 * 1000
"""One GPU-hour (thousandths × ms): Tiresias' threshold between its two queues is of this size."""
_LAS_RUN_MS = 60_000
"""Nobody is stopped in its first minute: Tiresias re-examines jobs at that interval."""


def tiresias_las(attained: Callable[[str], int]) -> Decide:
    """Least attained service in two queues, FIFO within each; whoever stands lower gives way to who stands higher."""

    def decide(snapshot: Snapshot, policy: Policy, now: int) -> Plan:
        round_ = _Round(snapshot, policy, now)

        def level(job_id: str) -> int:
            return int(attained(job_id) >= _LAS_BOUND)

        order = sorted(round_.ready, key=lambda job: (level(job.job_id), job.seq))
        lower = [live for live in snapshot.live if live.stoppable and level(live.job_id)]
        victims = [live for live in lower if now - live.started_at >= _LAS_RUN_MS]
        victims.sort(key=lambda live: (live.started_at, live.version))
        coming = sum(_held(live) for live in snapshot.live if live.ends_by <= now + snapshot.grace_ms)
        for job in order:
            if not round_.possible(job) or round_.start(job) is not None or level(job.job_id):
                continue
            need = job.workers_min * job.gpu_milli
            if not need:  # least attained service is about GPUs
                continue
            if coming >= need:  # what was stopped before is on its way to being free
                coming -= need
                continue
            freed, chosen = coming, []
            for victim in reversed(victims):
                if freed >= need:
                    break
                chosen.append(victim)
                freed += _held(victim)
            if freed < need:
                continue
            coming = freed - need
            for victim in chosen:
                victims.remove(victim)
                round_.preemptions.append(Preemption(victim.job_id, victim.version, job.job_id, "least-attained"))
        return round_.plan()

    return decide


def _held(live: Reservation) -> int:
    return sum(grant.gpu_milli for grant in live.grants)


tiresias_las.wants_attained = True  # type: ignore[attr-defined]

BASELINES = {
    "fifo": fifo, "easy": easy, "drf": drf, "nris-age": nris_age, "tiresias-las": tiresias_las,
}  # fmt: skip
"""By the names that `permed simulate --policy` takes."""
