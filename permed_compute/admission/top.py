"""Where the pool stands: what every account uses, may use and waits for, what runs where, which starts are reserved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from permed_compute.admission.policy import Policy
from permed_compute.admission.quota import Tree
from permed_compute.admission.snapshot import Grant, Plan, Reservation, Snapshot, used_by
from permed_compute.queue.port import Job


@dataclass(frozen=True, slots=True)
class Standing:
    """JSON-able rows: `accounts` (name, level, per flavor used/quota/available, live, waiting by reason), `starts`
    (job, at), `promises` (job, victims), `flavors` (capacity and use of the whole pool), `nodes` (what each has and
    what is reserved of it), `live` (job, name, account, owner, state, attempt, since in ms, what it was granted)."""

    policy: str
    accounts: list[dict[str, Any]]
    flavors: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    promises: list[dict[str, Any]]
    drained: list[str]
    frozen: list[str]
    windows: list[dict[str, Any]]
    nodes: list[dict[str, Any]] = field(default_factory=list)
    live: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def standing(snapshot: Snapshot, policy: Policy, plan: Plan, now: int, jobs: Mapping[str, Job]) -> Standing:
    """The picture and the decision that would be taken on it, as tables. `jobs`: at least those that live."""
    tree = Tree(policy, now)
    for job in snapshot.live:
        tree.add(job.account, job.uses)
    reasons = {wait.job_id: wait.code for wait in plan.waits}
    waits: dict[str, Counter[str]] = {}
    for each in snapshot.waiting:
        waits.setdefault(each.account, Counter())[reasons.get(each.job_id, "starts now")] += 1
    running = Counter(job.account for job in snapshot.live)
    known = [account.name for account in policy.accounts]
    names = known + sorted({*running, *waits}.difference(known))
    accounts = [
        {"account": name, "live": running[name], "waiting": dict(waits.get(name, {})), "flavors": _figures(tree, name),
         "usage": dict(snapshot.usage.get(name, {}))}
        for name in names
    ]  # fmt: skip
    return Standing(
        policy.version, accounts, _pool(snapshot),
        [{"job": start.job_id, "at": start.at} for start in plan.starts],
        [{"job": promise.job_id, "victims": list(promise.victims)} for promise in plan.promises],
        list(snapshot.drained), list(snapshot.frozen),
        [{"name": w.name, "nodes": list(w.nodes), "start": w.start, "end": w.end} for w in snapshot.windows],
        _nodes(snapshot), [_live(jobs[held.job_id], held) for held in snapshot.live],
    )  # fmt: skip


def _figures(tree: Tree, name: str) -> dict[str, Mapping[str, int]]:
    place = tree.number.get(name, -1)
    if place < 0:
        return {}
    return {
        flavor: {"used": each.used[place], "quota": each.subtree[place], "available": each.available(place)}
        for flavor, each in tree.flavors.items()
    }


def _live(job: Job, held: Reservation) -> dict[str, Any]:
    grants = held.grants
    return {
        "job": job.id, "name": held.name, "account": held.account, "owner": job.owner, "state": job.state.value,
        "attempt": job.attempt, "since": job.started_at, "workers": len(grants),
        "cpus": sum(grant.cpu_milli for grant in grants) / 1000, "memory_mib": sum(grant.memory for grant in grants),
        "gpus": sum(grant.gpu_milli for grant in grants) / 1000,
    }  # fmt: skip


def _nodes(snapshot: Snapshot) -> list[dict[str, Any]]:
    found = []
    on: dict[str, list[Grant]] = {}
    for held in snapshot.live:
        for grant in held.grants:
            on.setdefault(grant.node, []).append(grant)
    for node in snapshot.nodes:
        here = on.get(node.name, [])
        shares = Counter({gpu.index: 0 for gpu in node.gpus})
        for grant in here:
            shares.update({index: min(1000, grant.gpu_milli) for index in grant.devices})
        found.append({
            "node": node.name, "cpus": node.cpu_milli / 1000, "cpus_reserved": sum(g.cpu_milli for g in here) / 1000,
            "memory_mib": node.memory, "memory_reserved_mib": sum(g.memory for g in here),
            "gpus": [{"index": gpu.index, "flavor": gpu.flavor, "memory_mib": gpu.memory,
                      "reserved": shares[gpu.index] / 1000} for gpu in node.gpus],
        })  # fmt: skip
    return found


def _pool(snapshot: Snapshot) -> list[dict[str, Any]]:
    there: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for node in snapshot.nodes:
        there.update({"cpu": node.cpu_milli, "memory": node.memory})
        for gpu in node.gpus:
            there[f"gpu:{gpu.flavor}"] += 1000
    for job in snapshot.live:
        used.update(used_by(job.grants))
    return [{"flavor": flavor, "there": amount, "used": used[flavor]} for flavor, amount in sorted(there.items())]
