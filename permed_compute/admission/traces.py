"""Work to simulate: published traces, Slurm's `sacct`, our own event log, and a synthetic hospital day.

A trace says when what was submitted and how long it took. What a source does not say (time limits, accounts,
checkpoints) is laid over it by a documented rule with a seed; `recipe` states it, and reports print it.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from permed_compute.admission.policy import Account, Policy, Quota, gpu_flavor
from permed_compute.admission.snapshot import CPU, Gpu, Node
from permed_compute.errors import Problem, SpecError
from permed_compute.queue.port import Event
from permed_compute.spec import Band, JobSpec, Resources, Workers
from permed_compute.states import ENDED, LIVE, JobState

HOUR_MS, MINUTE_MS, DAY_MS = 3_600_000, 60_000, 86_400_000
EPOCH_MS = 1_793_577_600_000
"""When simulated time begins where a trace has no date of its own: Monday 2026-11-02, 00:00 UTC."""


@dataclass(frozen=True, slots=True)
class TraceJob:
    """One job of a trace: what it asked for, and what only hindsight knows (`work`, `checkpoint`).

    Times in ms; `submit` counts from the trace's start. `work` is the time it computes with `workers_min` workers;
    an elastic job (min < max) is divided among however many it has. Resources are per worker, as in a snapshot.
    """

    name: str
    submit: int
    work: int
    limit: int
    account: str = "local"
    band: Band = Band.RESEARCH
    owner: str = "u0"
    workers_min: int = 1
    workers_max: int = 1
    cpu_milli: int = 1000
    memory: int = 4096
    gpu_milli: int = 0
    flavors: tuple[str, ...] = (CPU,)
    checkpoint: int = 0
    """Every so many ms its progress is safe; 0: it starts anew whenever it is stopped."""
    deadline: int = 0
    """ms from the trace's start, 0 = none."""
    kind: str = ""

    def spec(self, start: int) -> JobSpec:
        """What its user would have submitted; `start` is the trace's start in ms since 1970."""
        deadline = datetime.fromtimestamp((start + self.deadline) / 1000, UTC) if self.deadline else None
        resources = Resources.model_construct(
            workers=Workers.model_construct(min=self.workers_min, max=self.workers_max),
            cpus=self.cpu_milli / 1000, memory=self.memory, gpus=self.gpu_milli / 1000, gpu_memory=0,
            flavors=self.flavors,
        )  # fmt: skip
        return JobSpec(
            name=self.name, workload="simulated:work", account=self.account, band=self.band, resources=resources,
            time_limit=f"{max(1, self.limit // 1000)}s", deadline=deadline,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trace:
    """Jobs in order of submission, and where they would run where nothing else is said."""

    name: str
    jobs: tuple[TraceJob, ...]
    recipe: str
    """Where it comes from and what was laid over it, for people."""
    nodes: tuple[Node, ...] = ()
    policy: Policy | None = None
    start: int = EPOCH_MS
    left_out: Mapping[str, int] = None  # type: ignore[assignment]
    """Records of the source that are no work to place, counted by reason."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", dict(self.left_out or {}))

    @property
    def span(self) -> int:
        """ms from the start to the last submission."""
        return self.jobs[-1].submit if self.jobs else 0

    def load(self, nodes: Iterable[Node]) -> float:
        """GPU work (CPU work where no job asks for a GPU) offered over the span ÷ what the nodes have."""
        wants_gpu = any(job.gpu_milli for job in self.jobs)
        offered = sum(job.work * job.workers_min * (job.gpu_milli if wants_gpu else job.cpu_milli) for job in self.jobs)
        have = sum(1000 * len(node.gpus) if wants_gpu else node.cpu_milli for node in nodes)
        return offered / (have * self.span) if have and self.span else 0.0


def machines(
    count: int, gpus: int, flavor: str, *, cpus: int = 64, gib: int = 512, prefix: str = ""
) -> tuple[Node, ...]:
    """`count` equal nodes of `gpus` GPUs of 80 GiB each."""
    name = prefix or flavor
    devices = tuple(Gpu(flavor, index, 81_920) for index in range(gpus))
    return tuple(Node(f"{name}-{number:03d}", cpus * 1000, gib * 1024, devices) for number in range(1, count + 1))


def parse_machines(text: str) -> tuple[Node, ...]:
    """`16x4:a100` (16 nodes of 4 GPUs), `8x0` (CPU only), several joined by `+`. Raises `SpecError`."""
    nodes: tuple[Node, ...] = ()
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\d+)x(\d+)(?::([a-z0-9][a-z0-9-]*))?\s*", part)
        if match is None or (int(match[2]) and not match[3]):
            what = f"{part!r} is not a group of nodes"
            raise SpecError("--nodes", [Problem("nodes", what, remedy="Write e.g. 16x4:a100, or 16x4:a100+8x0.")])
        nodes += machines(int(match[1]), int(match[2]), match[3] or "cpu", prefix=f"{match[3] or 'cpu'}{len(nodes)}")
    return nodes


# --------------------------------------------------------------------------------------------- time limits

_LIMITS_H = (1, 2, 4, 8, 12, 24, 48, 96, 168, 336, 720, 1440, 2880, 5760)


def limit_for(work: int, chance: random.Random) -> int:
    """What a user would have asked for: 1.1 to 4 times what it took, rounded up to a usual number of hours.

    Users overestimate about twofold at the median and ask for round numbers (Mu'alem & Feitelson 2001, "Utilization,
    predictability, workloads, and user runtime estimates", IEEE TPDS 12(6)).
    """
    hours = work * chance.choice((1.1, 1.5, 2.0, 3.0, 4.0)) / HOUR_MS
    return next((h for h in _LIMITS_H if h >= hours), int(hours) + 24) * HOUR_MS


# --------------------------------------------------------------------------------------------- readers


def read(path: Path, **how: Any) -> Trace:
    """A trace file by its first line: our CSV (`submit_s,gpus,duration_s,kind`) or `sacct -P`. Raises `SpecError`."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [Problem("file", f"cannot be read ({error.__class__.__name__})")]) from None
    if "|" in head and "JobID" in head:
        return read_sacct(path, **how)
    if head.strip().split(",")[:3] == ["submit_s", "gpus", "duration_s"]:
        return read_philly(path, **how)
    raise SpecError(
        str(path),
        [Problem("file", "is no trace that we know", line=1,
                 remedy="Known: CSV with submit_s,gpus,duration_s,kind; `sacct -P -o " + ",".join(_SACCT) + "`.")],
    )  # fmt: skip


def read_philly(path: Path, *, seed: int = 0, accounts: tuple[str, ...] = ("philly",), gpus: int = 0) -> Trace:
    """The Philly-derived CSVs of Gavel (Narayanan et al., OSDI 2020): submit time, GPUs, duration, kind.

    The nodes have 8 GPUs each, as Philly's; their number is 90 % of the mean demand, so that there is a queue.
    """
    chance = random.Random(seed)
    jobs = []
    for line, row in enumerate(_csv(path), start=2):
        try:
            submit, work = round(float(row["submit_s"]) * 1000), round(float(row["duration_s"]) * 1000)
            workers = int(row["gpus"])
        except (TypeError, ValueError, KeyError):
            raise SpecError(str(path), [Problem("row", "has no submit_s, gpus and duration_s", line=line)]) from None
        jobs.append(
            TraceJob(
                f"{path.stem}-{line - 1:06d}", submit, max(1, work), limit_for(work, chance),
                account=accounts[(line - 2) % len(accounts)], workers_min=workers, workers_max=workers,
                cpu_milli=4000, memory=16_384, gpu_milli=1000, flavors=("v100",), checkpoint=15 * MINUTE_MS,
                kind=re.sub(r"\s*\(.*", "", row.get("kind") or ""),
            )
        )  # fmt: skip
    jobs.sort(key=lambda job: job.submit)
    trace = Trace(path.stem, tuple(jobs), "")
    demand = sum(job.work * job.workers_min for job in jobs) / max(1, trace.span)
    nodes = machines(max(1, round((gpus or demand * 0.9) / 8)), 8, "v100")
    recipe = (
        f"{path.name}: submit times, GPUs and durations as published (stanford-futuredata/gavel, MIT). Laid over"
        f" it, seed {seed}: time limits of 1.1 to 4 times the duration at usual hours; a checkpoint every 15 min; one"
        f" worker per GPU, together or not at all; {len(nodes)} nodes of 8 GPUs; account {', '.join(accounts)}."
    )
    return replace(trace, recipe=recipe, nodes=nodes)


def _csv(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


_SACCT = ("JobID", "User", "Account", "State", "Submit", "Start", "End", "TimelimitRaw", "AllocTRES")


def read_sacct(path: Path, *, checkpoint: int = 0) -> Trace:
    """`sacct -P -a -X -o JobID,User,Account,State,Submit,Start,End,TimelimitRaw,AllocTRES` (times in UTC).

    Users are replaced by a digest. Steps, and jobs that never started or still run, are left out and counted.
    """
    rows: list[tuple[datetime, dict[str, str]]] = []
    left_out: dict[str, int] = {}
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="|", quoting=csv.QUOTE_NONE)
        missing = [name for name in _SACCT if name not in (table.fieldnames or ())]
        if missing:
            what = f"lacks the columns {', '.join(missing)}"
            raise SpecError(str(path), [Problem("header", what, line=1, remedy=f"sacct -P -o {','.join(_SACCT)}")])
        for line, row in enumerate(table, start=2):
            why = _no_work(row)
            if why:
                left_out[why] = left_out.get(why, 0) + 1
                continue
            try:
                rows.append((_slurm_time(row["Submit"]), row))
            except ValueError:
                raise SpecError(str(path), [Problem("Submit", f"{row['Submit']!r} is no time", line=line)]) from None
    rows.sort(key=lambda pair: (pair[0], pair[1]["JobID"]))
    first = rows[0][0] if rows else datetime.fromtimestamp(EPOCH_MS / 1000, UTC)
    jobs = tuple(_slurm_job(row, submit, first, checkpoint) for submit, row in rows)
    recipe = (
        f"{path.name}: {len(jobs)} jobs of a Slurm accounting dump; each worker one GPU, or one node's share of the"
        f" cores. Left out: {_counts(left_out)}."
    )
    return Trace(path.stem, jobs, recipe, start=int(first.timestamp() * 1000), left_out=left_out)


def _no_work(row: Mapping[str, str]) -> str:
    if "." in row["JobID"]:
        return "step"
    if row["Start"] in ("", "Unknown", "None") or row["End"] in ("", "Unknown", "None"):
        return "never started, or runs still"
    return "" if row["AllocTRES"] else "no resources"


def _slurm_time(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _slurm_job(row: Mapping[str, str], submit: datetime, first: datetime, checkpoint: int) -> TraceJob:
    tres: dict[str, str] = dict(part.partition("=")[::2] for part in row["AllocTRES"].split(","))
    kinds = sorted(name.partition(":")[2] for name in tres if name.startswith("gres/gpu:"))
    gpus = int(tres.get("gres/gpu") or (tres.get(f"gres/gpu:{kinds[0]}", "0") if kinds else 0))
    workers = gpus or max(1, int(tres.get("node", "1")))
    work = round((_slurm_time(row["End"]) - _slurm_time(row["Start"])).total_seconds() * 1000)
    minutes = int(row["TimelimitRaw"]) if row["TimelimitRaw"].isdigit() else 0
    return TraceJob(
        f"slurm-{row['JobID']}".replace("[", "").replace("]", "").replace("+", "-"),
        round((submit - first).total_seconds() * 1000), max(1, work), minutes * MINUTE_MS or max(1000, work) * 2,
        account=re.sub(r"[^a-z0-9_/-]", "-", row["Account"].lower()) or "local",
        band=Band.OPPORTUNISTIC if "PREEMPTED" in row["State"] else Band.RESEARCH,
        owner="u" + hashlib.sha256(row["User"].encode()).hexdigest()[:8], workers_min=workers, workers_max=workers,
        cpu_milli=max(1, int(tres.get("cpu", "1")) * 1000 // workers),
        memory=max(1, _mib(tres.get("mem", "1G")) // workers),
        gpu_milli=1000 if gpus else 0, flavors=(kinds[0].lower() if kinds else "gpu",) if gpus else (CPU,),
        checkpoint=checkpoint, kind=row["State"].split(" ")[0],
    )  # fmt: skip


def _mib(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text)
    size = {"K": 1 / 1024, "M": 1.0, "": 1.0, "G": 1024.0, "T": 1024.0 * 1024}
    return round(float(match[1]) * size[match[2]]) if match else 1024


def _counts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(left_out.items())) or "nothing"


def of_history(events: Iterable[Event], spec_of: Callable[[str], JobSpec | None], *, since: int = 0) -> Trace:
    """Our own past from the event log: everything submitted since `since` (ms) that has run to its end.

    How long a job computed is the sum of its RUNNING spans; what a preempted attempt lost and did again counts as work,
    because the log does not say how much that was.
    """
    submitted: dict[str, tuple[int, str]] = {}
    began: dict[str, int] = {}
    work: dict[str, int] = {}
    workers: dict[str, int] = {}
    ended: set[str] = set()
    for event in events:
        job = event.job_id
        if event.action == "SUBMITTED" and event.at >= since:
            submitted[job] = (event.at, event.actor)
        elif event.action == "MOVED" and job in submitted:
            if event.after == JobState.RESERVED:
                workers[job] = len((event.data.get("detail") or {}).get("grants", ())) or 1
            if event.after == JobState.RUNNING:
                began.setdefault(job, event.at)
            elif event.after not in LIVE and job in began:
                work[job] = work.get(job, 0) + event.at - began.pop(job)
            (ended.add if event.after in ENDED else ended.discard)(job)
    first = min((at for at, _ in submitted.values()), default=EPOCH_MS)
    jobs: list[TraceJob] = []
    never = 0
    for job, (at, owner) in submitted.items():
        spec = spec_of(job)
        if spec is None or job not in ended or job not in work:
            never += 1
            continue
        jobs.append(_own_job(spec, at - first, max(1, work[job]), workers.get(job, 1), owner, len(jobs), first))
    left_out = {"not run to an end": never} if never else {}
    recipe = f"{len(jobs)} jobs of this home's own event log. Left out: {_counts(left_out)}."
    return Trace("history", tuple(jobs), recipe, start=first, left_out=left_out)


def _own_job(spec: JobSpec, submit: int, work: int, workers: int, owner: str, number: int, first: int) -> TraceJob:
    need = spec.resources
    return TraceJob(
        f"own-{number + 1:06d}", submit, max(1, work * workers // need.workers.min), spec.time_limit * 1000,
        account=spec.account, band=spec.band, owner="u" + hashlib.sha256(owner.encode()).hexdigest()[:8],
        workers_min=need.workers.min, workers_max=need.workers.max, cpu_milli=need.cpu_milli, memory=need.memory,
        gpu_milli=need.gpu_milli, flavors=need.order, checkpoint=MINUTE_MS,
        deadline=max(1, int(spec.deadline.timestamp() * 1000) - first) if spec.deadline else 0, kind=spec.workload,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- a hospital day

_REGIONS = {"sor-ost": (57, 26), "vest": (20, 12), "midt": (13, 10), "nord": (9, 8)}
"""Health region → (share of the clinical work in %, as of its population; guaranteed GPUs)."""
_UNIVERSITIES = {"uio": (40, 20), "uib": (20, 8), "ntnu": (25, 8), "uit": (15, 4)}
"""University → (share of research in %; guaranteed GPUs)."""
HOSPITAL_GPUS = 96


def hospital_nodes() -> tuple[Node, ...]:
    """24 nodes of 4 GPUs, 64 cores and 512 GiB."""
    return machines(HOSPITAL_GPUS // 4, 4, "a100")


def hospital_policy() -> Policy:
    """Two sectors, four regions, four universities; each lends what it does not use and may borrow what is free."""
    accounts = [Account("pool"), Account("helse", "pool", sector="health"), Account("uh", "pool", sector="university")]
    for sector, members in (("helse", _REGIONS), ("uh", _UNIVERSITIES)):
        for name, (_, gpus) in members.items():
            quotas = {gpu_flavor("a100"): Quota(nominal=gpus * 1000, weight=gpus)}
            accounts.append(Account(f"{sector}/{name}", parent=sector, region=name, quotas=quotas))
    return Policy(accounts=tuple(accounts)).sealed()


def hospital_day(*, seed: int = 0, days: int = 1, scale: float = 1.0) -> Trace:
    """A synthetic day (or several) of four health regions and four universities on 96 GPUs.

    Recipe, all draws from one `random.Random(seed)`; numbers of jobs × `scale`, on weekends research jobs × 0.4:

    * clinical batches (health regions by population, band clinical): 120 a day in the evening, 16:00–22:00, elastic
      1..4 workers of one GPU, log-normal median 90 min of work (σ 0.6), deadline 06:00; 40 a day from 08:00 to 16:00,
      median 15 min, deadline 3 h after submission. A checkpoint after every series (1 min).
    * training (universities 70 %, regions 30 %, band research): 110 a day, mostly 08:00–18:00, gangs of 1, 2, 4 or 8
      workers of one GPU (50, 20, 20, 10 %), median 3 h (σ 1.0, at most 36 h), a checkpoint every 15 min.
    * sweeps (universities, band research): 20 a day of 20 to 60 single-GPU runs, median 20 min (σ 0.7), every 5 min.
    * opportunistic (everybody): 60 a day, elastic 1..8 workers, median 6 h of work (σ 0.8), a checkpoint every 5 min.
    * omics on CPU (everybody, band research): 40 a day, 8 to 32 cores, median 1 h (σ 0.8), none.
    """
    chance = random.Random(seed)
    jobs = [job for day in range(days) for make in _KINDS for job in make(chance, day, scale)]
    jobs.sort(key=lambda job: job.submit)  # stable: ties stay in the order of the recipe
    jobs = [replace(job, name=f"day-{number:06d}") for number, job in enumerate(jobs, start=1)]
    recipe = (
        f"Synthetic hospital day, seed {seed}, {days} day(s), scale {scale:g}: {len(jobs)} jobs of four health regions"
        " and four universities (recipe: `permed_compute.admission.traces.hospital_day`); 24 nodes of 4 GPUs."
    )
    return Trace("hospital-day", tuple(jobs), recipe, nodes=hospital_nodes(), policy=hospital_policy())


def _draw(chance: random.Random, shares: Mapping[str, tuple[int, int]]) -> str:
    return chance.choices(list(shares), [share for share, _ in shares.values()])[0]


def _anybody(chance: random.Random, university: float) -> str:
    if chance.random() < university:
        return f"uh/{_draw(chance, _UNIVERSITIES)}"
    return f"helse/{_draw(chance, _REGIONS)}"


def _minutes(chance: random.Random, median: float, sigma: float, *, at_most: float) -> int:
    return max(MINUTE_MS, round(min(median * chance.lognormvariate(0, sigma), at_most) * MINUTE_MS))


def _moment(chance: random.Random, day: int, first: float, last: float) -> int:
    return day * DAY_MS + round(chance.uniform(first, last) * HOUR_MS)


def _research_count(day: int, count: float) -> int:
    return round(count * (0.4 if day % 7 in (5, 6) else 1.0))


def _job(chance: random.Random, submit: int, work: int, account: str, band: Band, **more: Any) -> TraceJob:
    gpu: dict[str, Any] = {"gpu_milli": 1000, "flavors": ("a100",), "cpu_milli": 8000, "memory": 65_536}
    owner = f"{account.replace('/', '-')}-{chance.randrange(12):02d}"
    return TraceJob("", submit, work, limit_for(work, chance), account=account, band=band, owner=owner, **(gpu | more))


def _clinical(chance: random.Random, day: int, scale: float) -> Iterator[TraceJob]:
    more: dict[str, Any] = {"workers_max": 4, "checkpoint": MINUTE_MS}
    for _ in range(round(120 * scale)):
        submit, work = _moment(chance, day, 16, 22), _minutes(chance, 90, 0.6, at_most=480)
        due = day * DAY_MS + 30 * HOUR_MS
        account = f"helse/{_draw(chance, _REGIONS)}"
        yield _job(chance, submit, work, account, Band.CLINICAL, deadline=due, kind="clinical night", **more)
    for _ in range(round(40 * scale)):
        submit, work = _moment(chance, day, 8, 16), _minutes(chance, 15, 0.6, at_most=90)
        due = submit + 3 * HOUR_MS
        account = f"helse/{_draw(chance, _REGIONS)}"
        yield _job(chance, submit, work, account, Band.CLINICAL, deadline=due, kind="clinical day", **more)


def _training(chance: random.Random, day: int, scale: float) -> Iterator[TraceJob]:
    for _ in range(_research_count(day, 110 * scale)):
        submit = _moment(chance, day, 8, 18) if chance.random() < 0.85 else _moment(chance, day, 0, 24)
        workers = chance.choices((1, 2, 4, 8), (50, 20, 20, 10))[0]
        work = _minutes(chance, 180, 1.0, at_most=36 * 60)
        account = _anybody(chance, 0.7)
        more: dict[str, Any] = {"workers_min": workers, "workers_max": workers, "checkpoint": 15 * MINUTE_MS}
        yield _job(chance, submit, work, account, Band.RESEARCH, kind="training", **more)


def _sweeps(chance: random.Random, day: int, scale: float) -> Iterator[TraceJob]:
    for _ in range(_research_count(day, 20 * scale)):
        submit, account = _moment(chance, day, 9, 20), f"uh/{_draw(chance, _UNIVERSITIES)}"
        for place in range(chance.randint(20, 60)):
            work = _minutes(chance, 20, 0.7, at_most=240)
            more: dict[str, Any] = {"checkpoint": 5 * MINUTE_MS}
            yield _job(chance, submit + place * 1000, work, account, Band.RESEARCH, kind="sweep", **more)


def _opportunistic(chance: random.Random, day: int, scale: float) -> Iterator[TraceJob]:
    for _ in range(round(60 * scale)):
        work = _minutes(chance, 360, 0.8, at_most=48 * 60)
        more: dict[str, Any] = {"workers_max": 8, "checkpoint": 5 * MINUTE_MS}
        account, submit = _anybody(chance, 0.6), _moment(chance, day, 0, 24)
        yield _job(chance, submit, work, account, Band.OPPORTUNISTIC, kind="opportunistic", **more)


def _omics(chance: random.Random, day: int, scale: float) -> Iterator[TraceJob]:
    for _ in range(_research_count(day, 40 * scale)):
        work = _minutes(chance, 60, 0.8, at_most=24 * 60)
        more: dict[str, Any] = {"gpu_milli": 0, "flavors": (CPU,), "cpu_milli": chance.choice((8000, 16_000, 32_000))}
        account, submit = _anybody(chance, 0.6), _moment(chance, day, 7, 20)
        yield _job(chance, submit, work, account, Band.RESEARCH, kind="omics", **more)


_KINDS = (_clinical, _training, _sweeps, _opportunistic, _omics)


# --------------------------------------------------------------------------------------------- made to measure


def flood(*, seed: int = 0, hours: int = 24, gpus: int = 96, factor: int = 12) -> Trace:
    """One region floods: at 00:00 `helse/sor-ost` submits `factor` × what the whole pool does in an hour, then all four
    regions ask steadily for a quarter of the pool each, in jobs of 20 minutes (10 to 30) on one GPU."""
    chance = random.Random(seed)
    regions = [f"helse/{name}" for name in _REGIONS]
    mean = 20 * MINUTE_MS

    def one(submit: int, account: str) -> TraceJob:
        work = round(chance.uniform(0.5, 1.5) * mean)
        return _job(chance, submit, work, account, Band.RESEARCH, checkpoint=5 * MINUTE_MS, kind="steady")

    jobs = [one(number, regions[0]) for number in range(factor * gpus * HOUR_MS // mean)]
    each = gpus // 4 * HOUR_MS // mean * hours
    step = hours * HOUR_MS // each
    jobs += [one(turn * step + place, region) for turn, (place, region) in
             itertools.product(range(each), enumerate(regions))]  # fmt: skip
    jobs.sort(key=lambda job: job.submit)
    jobs = [replace(job, name=f"flood-{number:06d}") for number, job in enumerate(jobs, start=1)]
    accounts = [Account("helse", sector="health")]
    quotas = {gpu_flavor("a100"): Quota(nominal=gpus // 4 * 1000)}
    accounts += [Account(region, parent="helse", region=region.partition("/")[2], quotas=quotas) for region in regions]
    recipe = (
        f"One region floods with {factor} hours of the whole pool's work, four ask for a quarter each; seed {seed}."
    )
    return Trace(
        "flood", tuple(jobs), recipe, nodes=machines(gpus // 4, 4, "a100"),
        policy=Policy(accounts=tuple(accounts)).sealed(),
    )  # fmt: skip


def saturated(count: int, *, seed: int = 0, gpus: int = 1000, load: float = 0.97, accounts: int = 16) -> Trace:
    """`count` jobs of 1 to 8 GPUs at a given offered load, for measuring the simulator and `decide` themselves.

    A backlog of half a thousand waits from the first moment; the rest comes as a Poisson stream.
    """
    chance = random.Random(seed)
    names = [f"a{number:02d}" for number in range(accounts)]
    jobs, at = [], 0.0
    mean_work, mean_workers = 60 * MINUTE_MS, 1 * 0.7 + 2 * 0.15 + 4 * 0.1 + 8 * 0.05
    gap = mean_work * mean_workers / (gpus * load)
    backlog = gpus // 2 + 600
    for number in range(count):
        workers = chance.choices((1, 2, 4, 8), (70, 15, 10, 5))[0]
        work = max(MINUTE_MS, round(mean_work * chance.expovariate(1.0)))
        at += chance.expovariate(1 / gap) if number >= backlog else 0.0
        jobs.append(
            TraceJob(
                f"load-{number + 1:06d}", round(at), work, limit_for(work, chance), account=chance.choice(names),
                workers_min=workers, workers_max=workers, cpu_milli=4000, memory=16_384, gpu_milli=1000,
                flavors=("a100",), checkpoint=15 * MINUTE_MS,
            )
        )  # fmt: skip
    quotas = {gpu_flavor("a100"): Quota(nominal=gpus * 1000 // accounts)}
    policy = Policy(accounts=(Account("pool"), *(Account(name, "pool", quotas=quotas) for name in names))).sealed()
    recipe = f"{count} jobs at offered load {load:g} of {gpus} GPUs, {accounts} accounts, seed {seed}."
    return Trace("saturated", tuple(jobs), recipe, nodes=machines(gpus // 8, 8, "a100"), policy=policy)
