"""What a job will cost at a site, before it is submitted, and what is left there to pay for it.

The billing is admission's, with the factors of the site's profile.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction

from permed_compute.admission.billing import GPU_HOURS, Ask, Rate, tariff_of
from permed_compute.sites.request import Request

_ASK_S = 10.0


@dataclass(frozen=True, slots=True)
class Cost:
    """rate: per hour. seconds: the time limit. pool: what hours are taken from (`billing hour`, `gpu hour`)."""

    rate: Rate
    seconds: int
    pool: str
    source: str

    @property
    def per_hour(self) -> Fraction:
        """Hours of the pool that one hour of the job costs."""
        return self.rate.gpu_hours if self.pool == GPU_HOURS else self.rate.units

    @property
    def reserved(self) -> Fraction:
        """Hours of the pool that are taken at the start: all of the time limit."""
        return self.charged(self.seconds)

    def charged(self, seconds: int) -> Fraction:
        """Hours of the pool that stay charged when the job has run so long; the rest of the reservation comes back."""
        return self.per_hour * seconds / 3600


def of(request: Request) -> Cost:
    """Raises `NotFoundError` where the site publishes no factors for the partition."""
    tariff = tariff_of(request.site, request.partition)
    ask = Ask(
        Fraction(request.nodes * request.cpus), request.nodes * request.memory, Fraction(request.nodes * request.gpus),
        request.nodes,
    )  # fmt: skip
    return Cost(tariff.rate(ask), request.seconds, tariff.pool, tariff.source)


def left(request: Request) -> float | None:
    """Hours of the pool that the account has left, as Slurm here says; None where it cannot be asked or sets no limit.

    `scontrol show assoc_mgr` needs no accounting database on the side of the caller.
    """
    resource = "gres/gpu" if of(request).pool == GPU_HOURS else "billing"
    words = ["scontrol", "--oneliner", "show", "assoc_mgr", f"accounts={request.account}", "flags=assoc,qos"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=_ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return left_of(said, request.account, resource)


def left_of(said: str, account: str, resource: str) -> float | None:
    """The least of what is left by the limits in `scontrol show assoc_mgr`, in hours; None where nothing is limited.

    A limit stands with the account (NRIS and others also set it on a QOS of the account's name). Slurm counts minutes,
    as `name=limit(used)`; what running jobs have still reserved counts as used.
    """
    rows = [" ".join(row.split()) for row in re.split(r"\n(?=ClusterName=|QOS=)", said)]
    own = [
        row for row in rows
        if row.startswith(f"QOS={account}(") or (f" Account={account} " in row and re.search(r" UserName= ", row))
    ]  # fmt: skip
    found = []
    for row in own:
        limit, used = _pair(row, "GrpTRESMins", resource)
        if limit is not None:
            _, running = _pair(row, "GrpTRESRunMins", resource)
            found.append((limit - used - running) / 60)
    return min(found, default=None)


def _pair(row: str, field: str, resource: str) -> tuple[float | None, float]:
    """(limit or None, used) of a resource in a field such as `GrpTRESMins=cpu=N(0),billing=60000(123)`."""
    match = re.search(rf"\b{field}=\S*?(?:^|[=,]){re.escape(resource)}=(N|\d+)\((\d+)\)", row)
    if match is None:
        return None, 0.0
    return (None if match[1] == "N" else float(match[1])), float(match[2])
