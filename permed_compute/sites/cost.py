"""What a job will cost at a site, before it is submitted, by admission's billing and the site's own factors."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from permed_compute.admission.billing import Ask, Rate, tariff_of
from permed_compute.sites.request import Request


@dataclass(frozen=True, slots=True)
class Cost:
    """rate: per hour. reserved: what all of the time limit costs, taken at the start. pool: what it is taken from."""

    rate: Rate
    reserved: Rate
    pool: str
    source: str

    @property
    def pooled(self) -> bool:
        """Whether GPU-hours of a quota of their own are what counts."""
        return bool(self.rate.gpu_hours)

    def charged(self, seconds: int) -> Rate:
        """Unit-hours that stay charged when the job has run so long; the rest of the reservation comes back."""
        return _times(self.rate, Fraction(seconds, 3600))


def of(request: Request) -> Cost:
    """Raises `NotFoundError` where the site publishes no factors for the partition."""
    tariff = tariff_of(request.site, request.partition)
    ask = Ask(
        Fraction(request.nodes * request.cpus), request.nodes * request.memory, Fraction(request.nodes * request.gpus),
        request.nodes,
    )  # fmt: skip
    rate = tariff.rate(ask)
    return Cost(rate, _times(rate, Fraction(request.seconds, 3600)), tariff.pool, tariff.source)


def _times(rate: Rate, hours: Fraction) -> Rate:
    return Rate(rate.units * hours, rate.gpu_hours * hours)
