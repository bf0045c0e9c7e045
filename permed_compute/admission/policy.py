"""The policy that `decide` follows: who has which quota, how bands behave, how fairness forgets. Integers only.

Units: resources as in a snapshot (cores and GPUs in thousandths, memory in MiB), times in seconds unless a name says
`_ms` or it is a moment (ms since 1970 UTC), parts of a whole in thousandths. A policy's `version` is a digest of
everything in it, so that a log says exactly what was in force.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from permed_compute.spec import Band, Purpose

CPU = "cpu"
MEMORY = "memory"


def gpu_flavor(flavor: str) -> str:
    """How a quota names the GPU flavor of a node or grant: `h100` → `gpu:h100`."""
    return f"gpu:{flavor}"


@dataclass(frozen=True, slots=True)
class Quota:
    """What an account has of one flavor. None means: no limit of that kind."""

    nominal: int = 0
    """Guaranteed to this account and what stands below it, beside what those have themselves."""
    lending_limit: int | None = None
    """So much of the unused subtree quota may others use at most."""
    borrowing_limit: int | None = None
    """So much above its subtree quota may this account use at most."""
    weight: int = 1
    """Share of this flavor among siblings."""


@dataclass(frozen=True, slots=True)
class Member:
    """An operating-system user or group, and what it may claim. Members of an account may use the accounts below."""

    user: str = ""
    group: str = ""
    bands: tuple[Band, ...] = (Band.RESEARCH, Band.OPPORTUNISTIC)
    purposes: tuple[Purpose, ...] = (Purpose.RESEARCH,)


@dataclass(frozen=True, slots=True)
class Account:
    """One node of the tree. Empty facts are inherited from the parent by `Policy.resolved`."""

    name: str
    parent: str = ""
    sector: str = ""
    region: str = ""
    legal_entity: str = ""
    funding: str = ""
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    members: tuple[Member, ...] = ()
    min_runtime: int | None = None
    effective_from: int = 0
    effective_until: int = 0
    """0: no end."""


@dataclass(frozen=True, slots=True)
class BandRule:
    """How one priority band behaves."""

    reclaims: bool = True
    """May take back what others borrow while its own account stays within its quota."""
    preempts_lower: bool = False
    """May end work of lower bands in its own account."""
    protected: bool = False
    """Never preempted."""
    always_preemptible: bool = False
    """By any higher band that reclaims or preempts, from the first second, wherever it runs."""


def _rules() -> Mapping[Band, BandRule]:
    return {
        Band.CLINICAL: BandRule(preempts_lower=True, protected=True),
        Band.RESEARCH: BandRule(),
        Band.OPPORTUNISTIC: BandRule(reclaims=False, always_preemptible=True),
    }


@dataclass(frozen=True, slots=True)
class Policy:
    """What an admin may set. Without accounts everybody may use everything: no quotas, no fairness, no preemption."""

    version: str = "open-1"
    bands: tuple[Band, ...] = (Band.CLINICAL, Band.RESEARCH, Band.OPPORTUNISTIC)
    """Highest first."""
    accounts: tuple[Account, ...] = ()
    rules: Mapping[Band, BandRule] = field(default_factory=_rules)
    capacity: Mapping[str, int] = field(default_factory=dict)
    """What the quotas divide; only `permed quota check` reads it."""
    charges: Mapping[str, int] = field(default_factory=lambda: {CPU: 1, MEMORY: 0})
    """Fairness: how much a thousandth of a core or device, or a MiB, counts per second."""
    gpu_charge: int = 32
    """The same for a GPU flavor that `charges` does not name."""
    half_life: int = 7 * 86400
    epoch: int = 600
    """Usage is decayed once per so many seconds."""
    entry_penalty: int = 300
    """A start counts at once as so many seconds of use."""
    idle_charge: int = 100
    """Thousandths at which use of capacity that nobody else wanted counts."""
    min_runtime: int = 600
    grace: int = 30
    backfill_depth: int = 16
    """So many waiting jobs have a reserved start that backfill never delays."""
    ageing: int = 2 * 86400
    """Whoever has waited so long has a reserved start beside those (one per account)."""
    short_first: int = 1000
    """Thousandths of a job's expected run time by which its turn within its account comes later: 0 is strict order of
    submission."""
    drain_after: int = 3600
    """After a policy lowers a quota below what is in use, so long until the excess is preempted."""
    grows: bool = True
    """Running elastic jobs grow into capacity that nobody waits for, where it at least doubles their workers."""
    effective_from: int = 0
    effective_until: int = 0

    def charge(self, flavor: str) -> int:
        """Fairness units per thousandth (or MiB) and second."""
        return self.charges.get(flavor, 0 if flavor == MEMORY else self.gpu_charge)

    def account(self, name: str) -> Account | None:
        return next((account for account in self.accounts if account.name == name), None)

    def path(self, name: str) -> tuple[Account, ...]:
        """The account and those above it, itself first; empty where there is no such account."""
        by_name = {account.name: account for account in self.accounts}
        found: list[Account] = []
        while name in by_name and len(found) <= len(by_name):
            found.append(by_name[name])
            name = by_name[name].parent
        return tuple(found)

    def fact(self, name: str, which: str) -> str:
        """`sector`, `region`, `legal_entity` or `funding` of an account: its own, else of the nearest above it."""
        return next((getattr(account, which) for account in self.path(name) if getattr(account, which)), "")

    def row(self) -> dict[str, Any]:
        """JSON form; `from_row` reads it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Policy:
        values = dict(row)
        values["bands"] = tuple(Band(band) for band in row["bands"])
        values["rules"] = {Band(band): BandRule(**rule) for band, rule in row["rules"].items()}
        values["accounts"] = tuple(_account(each) for each in row["accounts"])
        return cls(**values)

    def sealed(self) -> Policy:
        """The same policy with its digest as version."""
        text = json.dumps({**self.row(), "version": ""}, sort_keys=True, separators=(",", ":"))
        return replace(self, version=hashlib.sha256(text.encode()).hexdigest()[:12])


def _account(row: Mapping[str, Any]) -> Account:
    members = tuple(
        Member(
            each["user"], each["group"], tuple(Band(band) for band in each["bands"]),
            tuple(Purpose(purpose) for purpose in each["purposes"]),
        )
        for each in row["members"]
    )  # fmt: skip
    quotas = {flavor: Quota(**quota) for flavor, quota in row["quotas"].items()}
    return Account(**{**row, "members": members, "quotas": quotas})
