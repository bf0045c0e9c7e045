"""Where the pool stands: what every account uses, may use and waits for, and which starts are reserved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from permed_compute.admission.policy import Policy
from permed_compute.admission.quota import Tree
from permed_compute.admission.snapshot import Plan, Snapshot, used_by


@dataclass(frozen=True, slots=True)
class Standing:
    """JSON-able rows: `accounts` (name, level, per flavor used/quota/available, live, waiting by reason), `starts`
    (job, at), `promises` (job, victims), `flavors` (capacity and use of the whole pool)."""

    policy: str
    accounts: list[dict[str, Any]]
    flavors: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    promises: list[dict[str, Any]]
    drained: list[str]
    frozen: list[str]
    windows: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def standing(snapshot: Snapshot, policy: Policy, plan: Plan, now: int) -> Standing:
    """The picture and the decision that would be taken on it, as tables."""
    tree = Tree(policy, now)
    for job in snapshot.live:
        tree.add(job.account, job.uses)
    reasons = {wait.job_id: wait.code for wait in plan.waits}
    waits: dict[str, Counter[str]] = {}
    for each in snapshot.waiting:
        waits.setdefault(each.account, Counter())[reasons.get(each.job_id, "starts now")] += 1
    running = Counter(job.account for job in snapshot.live)
    names = [account.name for account in policy.accounts] or sorted({*running, *waits})
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
    )  # fmt: skip


def _figures(tree: Tree, name: str) -> dict[str, Mapping[str, int]]:
    place = tree.number.get(name, -1)
    if place < 0:
        return {}
    return {
        flavor: {"used": each.used[place], "quota": each.subtree[place], "available": each.available(place)}
        for flavor, each in tree.flavors.items()
    }


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
