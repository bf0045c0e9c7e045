"""What a site charges: units per hour by its published factors, reserved in full at the start, refunded at the end.

Factors and limits stand in `cluster/sites/*.yaml`, copied from the sites' pages and never worked out from node sizes
(one published factor of Betzy contradicts its nodes, and it is still what is charged). Exact: fractions, no floats.
Source of the rules: documentation.sigma2.no, jobs/projects_accounting.md (NRIS); LUMI's billing page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from permed_compute.errors import NotFoundError, SettingsError
from permed_compute.sites.profile import Per, Profile, load

HOUR_MS = 3_600_000
GPU_HOURS = "gpu hour"


@dataclass(frozen=True, slots=True)
class Ask:
    """What a whole job asks for: CPU cores, memory in MiB, GPUs and nodes, each a total over its workers."""

    cpus: Fraction = Fraction(0)
    memory: int = 0
    gpus: Fraction = Fraction(0)
    nodes: int = 0


@dataclass(frozen=True, slots=True)
class Rate:
    """What an hour costs: `units` of the site's billing, and GPU-hours of a quota of their own (0 where none is)."""

    units: Fraction
    gpu_hours: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class Factor:
    """Units per started `per`: 0.2577031 per GiB is (0.2577031, 0), one per started 64 GiB is (1, 64)."""

    units: Fraction
    per: Fraction = Fraction(0)

    def of(self, amount: Fraction) -> Fraction:
        return self.units * math.ceil(amount / self.per) if self.per else self.units * amount


@dataclass(frozen=True, slots=True)
class Tariff:
    """How one partition charges: the largest of its factors × what is asked for.

    `floor`: Slurm bills whole units per hour. `pool`: what the units are taken from (`gpu hour`: a quota of GPU-hours).
    """

    site: str
    partition: str
    factors: Mapping[str, Factor]
    times: Fraction
    floor: bool
    pool: str
    source: str

    def rate(self, ask: Ask) -> Rate:
        """Units and pooled GPU-hours that one hour of this job costs."""
        amounts = {
            "cpu": ask.cpus, "memory_gib": Fraction(ask.memory, 1024), "gpu": ask.gpus, "node": Fraction(ask.nodes),
        }  # fmt: skip
        units = self.times * max((factor.of(amounts[name]) for name, factor in self.factors.items()), default=0)
        units = Fraction(math.floor(units)) if self.floor else Fraction(units)
        if self.pool != GPU_HOURS:
            return Rate(units)
        # Olivia's GPU partition bills no units and takes the GPUs themselves from a quota of GPU-hours.
        return Rate(units, ask.gpus) if not any(f.units for f in self.factors.values()) else Rate(Fraction(0), units)


def tariff(site: str, partition: str = "") -> Tariff:
    """The tariff of a site's partition (its default one where none is named). Raises `NotFoundError`."""
    return tariff_of(load(site), partition)


def tariff_of(site: Profile, partition: str = "") -> Tariff:
    """The same of a profile that is read already."""
    name = partition or site.default_partition()
    charge = site.partitions[name].charge if name in site.partitions else None
    if charge is None or site.billing is None:
        billed = ", ".join(key for key, row in site.partitions.items() if row.charge is not None) or "none"
        raise NotFoundError(
            f"{site.name} has no billed partition {partition or '(default)'!r}.",
            remedy=f"Its billed partitions: {billed}.",
        )
    return Tariff(
        site.name, name, {key: _factor(value) for key, value in charge.factors.items()}, _exact(charge.times),
        site.billing.floor, charge.pool or site.billing.unit, site.cited(charge),
    )  # fmt: skip


def _factor(value: float | Per) -> Factor:
    return Factor(_exact(value.units), _exact(value.per)) if isinstance(value, Per) else Factor(_exact(value))


def _exact(value: Any) -> Fraction:
    """The number as it is written: 0.032 is 4/125, not the double nearest to it."""
    return Fraction(str(value))


# --------------------------------------------------------------------------------------------- periods


@dataclass(frozen=True, slots=True)
class Period:
    """From `start` up to `end`, ms since 1970 UTC. A grant holds for one period; what is left of it is lost."""

    start: int
    end: int

    def overlap(self, start: int, end: int) -> int:
        """Milliseconds of `start`..`end` that lie in it."""
        return max(0, min(end, self.end) - max(start, self.start))


def period_of(site: str, at: int) -> Period:
    """The site's period that `at` lies in, by the site's calendar days in UTC. A site without periods has one."""
    billing = load(site).billing
    starts = billing.periods.starts if billing is not None else ()
    if not starts:
        return Period(0, 1 << 62)
    year = datetime.fromtimestamp(at / 1000, UTC).year
    days = sorted(_midnight(y, day) for y in (year - 1, year, year + 1) for day in starts)
    first = max(day for day in days if day <= at)
    return Period(first, min(day for day in days if day > at))


def _midnight(year: int, day: str) -> int:
    try:
        month, of_month = (int(part) for part in day.split("-"))
        return int(datetime(year, month, of_month, tzinfo=UTC).timestamp()) * 1000
    except ValueError:
        raise SettingsError(f"{day!r} is not the start of a period.", remedy="Write month-day, e.g. 04-01.") from None


# --------------------------------------------------------------------------------------------- reserve, then refund


@dataclass(frozen=True, slots=True)
class Charge:
    """One attempt against one grant: `rate` units an hour from `start`, at most `asked` ms; no `end` while it runs."""

    rate: Fraction
    start: int
    asked: int
    end: int | None = None

    def reserved(self) -> Fraction:
        """Unit-hours held while it runs: all that was asked for."""
        return self.rate * self.asked / HOUR_MS if self.end is None else Fraction(0)

    def spent(self, period: Period) -> Fraction:
        """Unit-hours charged to the period once it has ended: what was used, by the side of a boundary it was used on.

        What NRIS does with a job that runs across a boundary is not published; by the clock is our choice.
        """
        return self.rate * period.overlap(self.start, self.end) / HOUR_MS if self.end is not None else Fraction(0)


@dataclass(frozen=True, slots=True)
class Standing:
    """A grant as it stands, in unit-hours. Derived from the charges; nothing counts up and down."""

    granted: Fraction
    spent: Fraction
    reserved: Fraction

    @property
    def left(self) -> Fraction:
        return self.granted - self.spent - self.reserved

    def holds(self, rate: Fraction, asked: int) -> bool:
        """True where a job of this rate may start: all that it asks for must fit, though it may use less."""
        return rate * asked / HOUR_MS <= self.left


def standing(granted: Fraction | int, charges: Iterable[Charge], period: Period) -> Standing:
    """The grant of one account for one period after these charges."""
    spent, reserved = Fraction(0), Fraction(0)
    for charge in charges:
        spent += charge.spent(period)
        reserved += charge.reserved()
    return Standing(Fraction(granted), spent, reserved)
